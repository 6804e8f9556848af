"""Several tiny networks that learn together, segmenters and detectors."""

import copy

import torch

from mmdistill_ext.distillers import CollaborativeDistiller
from tests import tiny_det, tiny_seg

MIN_LOSS = dict(type='MinLoss')
WEIGHTS = torch.tensor([0.9, 0.3, -0.2])
WEIGHTED = dict(type='ValidationWeighted', metric='mIoU', temperature=1.0)


def segmenter(channels=8, aligned=False, strides=(1, 2, 1, 1), **head):
    cfg = tiny_seg.model(channels)
    cfg['backbone']['strides'] = strides
    cfg['decode_head'].update(align_corners=aligned, **head)
    return cfg


def segmenters(count=2):
    """Of different widths, strides and ways to upsample."""
    made = dict(
        a=segmenter(),
        b=segmenter(4, True, (1, 2, 2, 2)),
        c=segmenter(6, False, (1, 1, 1, 1)),
    )
    return dict(list(made.items())[:count])


def varied(model):
    """Weights that give predictions as different as after a while of training."""
    for network in model.students.values():
        if hasattr(network, 'decode_head'):
            torch.nn.init.normal_(network.decode_head.conv_seg.weight, 0, 0.5)
        else:
            tiny_det.vary(network)
            for name, parameter in network.bbox_head.named_parameters():
                if 'cls' in name and name.endswith('bias'):
                    parameter.data.zero_()  # scores of about a half, not of 1 %
    return model


def distiller(students=None, seed=0, **options):
    torch.manual_seed(seed)
    options.setdefault('second', MIN_LOSS)
    model = CollaborativeDistiller(students or segmenters(), **options)
    model.init_weights()
    return varied(model).train()


def alone(model):
    """The networks as they are, each a model of its own."""
    return copy.deepcopy(dict(model.students.items()))


def seg_batch(dtype=torch.float64):
    torch.manual_seed(1)
    labels = torch.randint(0, 3, (2, 32, 40))
    labels[:, :4] = 255
    return torch.randn(2, 3, 32, 40, dtype=dtype), tiny_seg.samples(labels)


def for_all(model, inputs, samples):
    """The same for every network."""
    return dict.fromkeys(model.names, inputs), dict.fromkeys(model.names, samples)


def gradients(model, losses):
    """Of a whole step, by the parameter's name."""
    total, _ = model.parse_losses(losses)
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters()}


def detectors(names):
    made = {}
    for place, name in enumerate(names.split()):
        made[f'n{place}'] = cfg = tiny_det.FAMILIES[name](8 if place else 12)
        cfg['test_cfg'].update(max_per_img=50)
    return made
