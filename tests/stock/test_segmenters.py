"""Every head that mmseg ships: distilled, together, and with FIT where its loss allows it."""

import pytest
import torch
from mmcv.cnn.bricks import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmdistill_ext.isolation import eval_mode
from mmdistill_ext.taps import Taps
from mmdistill_ext.units.pixel.head import find_head
from mmdistill_ext.units.pixel.mmseg_heads import MaskClasses
from tests.stock import segmenters
from tests.stock.segmenters import CONFIGS, KD, SEL

STOCHASTIC = (_BatchNorm, _DropoutNd, DropPath, nn.MultiheadAttention)
WITHOUT_FIT = {
    'danet': '`loss_by_feat` of its own',
    'ddrnet': '`loss_by_feat` of its own',
    'encnet': '`loss_by_feat` of its own',
    'fastscnn': 'sigmoid',
    'knet': '`loss_by_feat` of its own',
    'mask2former': '`loss_by_feat` of its own',
    'maskformer': '`loss_by_feat` of its own',
    'pidnet': '`loss_by_feat` of its own',
    'point_rend': '`loss_by_feat` of its own',
    'san': '`loss_by_feat` of its own',
    'stdc': 'sampler',
    'unet_dice': r'\[CrossEntropyLoss, DiceLoss\]',
}


@pytest.mark.parametrize('name', CONFIGS)
def test_distils(name):
    """By units, by features, and the units are what contrast masks show."""
    model = segmenters.distilled(name, kd=KD, sel=SEL, feature=segmenters.feature(name))
    pair = model.distillation.head_terms[0].pair
    model.distillation.losses['sel'].records.keep_contrast = True
    losses = segmenters.step(model, name)
    ours = {
        key: value for key, value in losses.items() if key.endswith(('_kd', '_sel', '_feature'))
    }
    assert len(ours) == 3
    assert all(value > 0 for value in ours.values())
    assert pair.predicts
    (ours[f'{pair.prefix}.loss_kd'] + ours[f'{pair.prefix}.loss_sel']).backward()
    learning = [x for x in pair.head.parameters() if x.grad is not None and x.grad.any()]
    assert learning
    assert all(x.grad.isfinite().all() for x in learning)
    wins, valid = model.distillation.losses['sel'].records.pop_contrast().maps()['']
    size = segmenters.size_of(name)
    assert wins.shape == valid.shape == (2, *size)
    assert valid.any()
    assert not valid[:, :5].any()
    assert not (wins & ~valid).any()
    reason = WITHOUT_FIT.get('unet_dice' if 'dice' in name else name.split('/')[0])
    if reason is None:
        assert pair.fused_loss('fit').name == 'loss_ce'
    else:
        with pytest.raises(ValueError, match=f'`fit` needs a head .*{reason}'):
            pair.fused_loss('fit')


@pytest.mark.parametrize('name', CONFIGS)
def test_trains_together(name):
    """And the errors in eval mode, which set the weights of some ensembles, can be measured."""
    model = segmenters.together(name)
    losses = segmenters.step(model, name)
    assert all(losses[f'{network}/loss_kl'] > 0 for network in 'ab')
    (losses['ensemble/loss'] + losses['a/loss_kl']).backward()
    inputs, samples = (dict.fromkeys('ab', x) for x in segmenters.batch(name))
    with torch.no_grad(), eval_mode(model):
        units = model.joint.evaluated(model.students, inputs, samples)
        correlation = model.collaboration.error_correlation(units)
    assert correlation.shape == (2, 2)
    assert (correlation.diagonal() > 0).all()
    for network in model.students.values():
        assert any(x.grad is not None and x.grad.any() for x in network.parameters())


@pytest.mark.parametrize('name', CONFIGS)
def test_reads_the_logits_that_are_predicted_with(name):
    """Of a teacher in eval mode, and of a student while it computes its loss."""
    model = segmenters.build(name).eval()
    inputs, samples = segmenters.batch(name)
    found = find_head(model, 'decode_head', 'k')
    with Taps(model, dict(output=found.output)) as taps, torch.no_grad():
        torch.manual_seed(0)
        predicted = model.encode_decode(inputs, [sample.metainfo for sample in samples])
    logits = found.logits.of_output(taps['output'])
    expected = found.logits.of_map(predicted)
    accuracy = 0.02 if isinstance(found.logits, MaskClasses) else 1e-5  # upsampled after the log
    torch.testing.assert_close(upsampled(logits, model), expected, rtol=0, atol=accuracy)

    for part in model.modules():
        part.training = not isinstance(part, STOCHASTIC)
    loss = dict(loss=found.loss, output=found.path)
    with Taps(model, loss) as taps:
        torch.manual_seed(0)
        model(inputs, samples, mode='loss')
    in_training = found.logits.of_loss(taps['loss'])
    if found.logits.every_pixel:
        torch.testing.assert_close(in_training, logits, rtol=1e-4, atol=1e-4)
    else:
        assert in_training is taps['output'].output
        assert in_training.shape[2] == found.logits.points(taps['loss']).shape[1]


def upsampled(logits, model):
    size = model.data_preprocessor.size
    return nn.functional.interpolate(
        logits, size, mode='bilinear', align_corners=model.align_corners
    )


STOCK = {name.split('/')[0]: name for name in CONFIGS if 'dice' not in name}


@pytest.mark.parametrize(
    ('student', 'teacher'),
    [
        ('pspnet', 'mask2former'),
        ('mask2former', 'pspnet'),
        ('maskformer', 'knet'),
        ('point_rend', 'pspnet'),
        ('pidnet', 'point_rend'),
        ('fastscnn', 'danet'),  # sigmoids learn from a softmax
        ('fastscnn', 'ocrnet'),
        ('san', 'ddrnet'),
        ('ddrnet', 'san'),
    ],
)
def test_pairs_of_different_heads(student, teacher):
    """Any teacher teaches any student: nothing is compared but classes of pixels."""
    name, other = STOCK[student], STOCK[teacher]
    model = segmenters.distilled(name, other, kd=KD, sel=SEL)
    losses = segmenters.step(model, name)
    ours = [value for key, value in losses.items() if key.endswith(('_kd', '_sel'))]
    assert len(ours) == 2
    assert all(value > 0 for value in ours)
    sum(ours).backward()
    head = model.distillation.head_terms[0].pair.head
    assert any(x.grad is not None and x.grad.any() for x in head.parameters())


def test_a_row_of_the_table_of_coverage():
    """By doing it; what is refused says why."""
    row = segmenters.row(STOCK['danet'])
    assert row | dict(fit='') == dict(
        config=STOCK['danet'],
        head='DAHead',
        units='pixels',
        fit='',
        features='yes',
        together='yes',
        note='',
    )
    assert row['fit'].startswith('refused: `fit` needs a head whose loss is one softmax')
    built = {STOCK[name]: segmenters.build(STOCK[name]) for name in ('pspnet', 'fastscnn')}
    assert segmenters.pairs_with(STOCK['pspnet'], built) == 'all but fastscnn'
    assert segmenters.pairs_with(STOCK['fastscnn'], built) == 'all'
