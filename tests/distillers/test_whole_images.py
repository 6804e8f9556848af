import copy

import pytest
import torch

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.whole_images import whole_logits
from mmdistill_ext.units.pixel.head import find_head
from tests import tiny_seg
from tests.stock import segmenters

BCE = dict(type='CrossEntropyLoss', use_sigmoid=True)


def build(test_cfg=None, **head):
    torch.manual_seed(0)
    cfg = tiny_seg.model(8)
    aux = dict(copy.deepcopy(cfg['decode_head']), in_channels=16, in_index=1, **head)
    cfg['decode_head'].update(head)
    cfg.update(auxiliary_head=[aux], test_cfg=test_cfg or dict(mode='whole'))
    return build_model({'_scope_': 'mmseg', **cfg}).eval()


def data():
    """One image as a loader gives it, which is padded in the batch and was resized before."""
    torch.manual_seed(1)
    sample = tiny_seg.sample(torch.randint(0, 2, (28, 36)))
    sample.set_metainfo(dict(img_shape=(28, 36), ori_shape=(42, 54), pad_shape=(28, 36)))
    return dict(inputs=[torch.randint(0, 256, (3, 28, 36)).byte()], data_samples=[sample])


@pytest.mark.parametrize('mode', ['whole', 'slide'])
def test_the_main_head_predicts_as_in_validation(mode):
    model = build(dict(mode=mode, crop_size=(24, 24), stride=(16, 16)))
    batch = data()
    logits, (sample,) = whole_logits(model, find_head(model, 'decode_head', 'k'), batch)
    assert logits.shape == (1, 3, 42, 54)
    assert torch.equal(logits[0], model.test_step(data())[0].seg_logits.data)
    assert 'seg_logits' not in batch['data_samples'][0]
    assert 'gt_sem_seg' in sample


@pytest.mark.parametrize('scale', [1, 400])
def test_one_channel_keeps_its_logit_however_certain_it_is(scale):
    model = build(num_classes=2, out_channels=1, loss_decode=BCE)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight, 0, scale)
    logits, _ = whole_logits(model, find_head(model, 'decode_head', 'k'), data())
    assert logits.shape == (1, 1, 42, 54)
    assert logits.isfinite().all()
    assert (logits.abs().amax() > 17) == (scale == 400)
    expected = model.test_step(data())[0].seg_logits.data
    torch.testing.assert_close(logits[0].sigmoid(), expected)


def test_another_head_sees_the_whole_image():
    model = build(dict(mode='slide', crop_size=(24, 24), stride=(16, 16)))
    found = find_head(model, 'auxiliary_head', 'k')
    logits, _ = whole_logits(model, found, data())
    model.decode_head = model.auxiliary_head[0]
    model.test_cfg['mode'] = 'whole'
    expected, _ = whole_logits(model, find_head(model, 'decode_head', 'k'), data())
    torch.testing.assert_close(logits, expected)


def test_scores_of_a_mask_classifier_become_logits():
    name = 'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512'
    model = segmenters.build(name).eval()
    logits, _ = whole_logits(model, find_head(model, 'decode_head', 'k'), data())
    torch.testing.assert_close(
        logits[0].exp(), model.test_step(data())[0].seg_logits.data, rtol=0.05, atol=0.01
    )
