"""Logits of a head for whole images, at their original size."""

from __future__ import annotations

from copy import deepcopy

import torch
import torch.nn.functional as F
from mmseg.models.segmentors import BaseSegmentor
from mmseg.structures import SegDataSample
from torch import Tensor

from mmdistill_ext.distillers.tapped_forward import tapped_forward
from mmdistill_ext.units.pixel.head import MAIN, FoundHead, check_logits, find_head


@torch.no_grad()
def whole_logits(
    model: BaseSegmentor, head: FoundHead, data: dict
) -> tuple[Tensor, list[SegDataSample]]:
    """Logits of a head, in eval mode, with padding cut off and resized as mmseg does it.

    The head that the model predicts with does it as in validation, with sliding windows if the
    config asks for them; another one sees the image as a whole.

    Args:
        model: A segmentor.
        head: One of its heads.
        data: What a loader gives, of images of one size.

    Returns:
        Logits ``(B, C, H, W)`` of the images, and the data samples. They are logits of one channel
        too, for which mmseg returns probabilities.
    """
    data = model.data_preprocessor(deepcopy(data), False)
    inputs, samples = data['inputs'], data['data_samples']
    if head.logits.head is find_head(model, MAIN, MAIN).logits.head:
        predicted = model.inference(inputs, [sample.metainfo for sample in samples])
        logits = head.logits.of_map(predicted)
    else:
        (call,) = tapped_forward(model, inputs, samples, {head.output: 1})[head.output]
        coarse = check_logits(head.logits.of_output(call), head.path)
        corners = head.logits.head.align_corners
        logits = F.interpolate(coarse, inputs.shape[2:], mode='bilinear', align_corners=corners)
    channels = logits.shape[1]
    if channels == 1:  # mmseg turns one channel into a probability, of two it leaves the logits
        logits = logits.repeat(1, 2, 1, 1)
    results = model.postprocess_result(logits, samples)
    return torch.stack([sample.seg_logits.data[:channels] for sample in results]), results
