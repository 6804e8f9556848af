import copy

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from torch import nn

from mmdistill_ext.checkpoint import load_weights
from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.registry import MODELS
from tests import tiny_dense, tiny_det, tiny_seg, tiny_zoo, users_own  # noqa: F401  registers parts

CONV = dict(type='Conv1x1')
CWD = dict(type='CWDLoss', tap='backbone.3', connector=CONV)


def feature(tap, **kwargs):
    return dict(type='FeatureLoss', tap=tap, connector=CONV) | kwargs


def saved(folder, cfg):
    torch.manual_seed(1)
    model = build_model(cfg)
    tiny_zoo.set_level_embed(model) if isinstance(
        getattr(model, 'level_embed', None), torch.Tensor
    ) else None
    path = folder / 'teacher.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return dict(model=cfg, checkpoint=str(path))


def seg_batch():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 32, 40))
    labels[:, :4] = 255
    return torch.randn(2, 3, 32, 40), tiny_seg.samples(labels)


def seg(channels=8):
    return {'_scope_': 'mmseg', **tiny_seg.model(channels)}


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return saved(tmp_path_factory.mktemp('t'), seg(16))


def distilled(student, teacher, losses, **kwargs):
    torch.manual_seed(5)
    model = build_teacher_student(student, teacher, losses, **kwargs)
    model.init_weights()
    return model.train()


def mask2former(framework):
    sizes = tiny_zoo.SIZES | dict(feat_channels=16, out_channels=16, num_layers=2)
    sizes['num_stuff_classes'] = 0
    if framework == 'mmseg':
        cfg = resolve_model_cfg(
            'mmseg::mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024.py'
        )
        head = cfg.decode_head
        cfg.data_preprocessor.size = (32, 40)
        cfg.backbone.norm_cfg = dict(type='BN')
    else:
        cfg = resolve_model_cfg('mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py')
        head = cfg.panoptic_head
        cfg.data_preprocessor.batch_augments = None
        for part in (head, cfg.panoptic_fusion_head):
            part.update(num_things_classes=3, num_stuff_classes=0)
    tiny_zoo._shrink(cfg, sizes)
    cfg.backbone.update(depth=18, init_cfg=None, norm_eval=True, base_channels=8, stem_channels=8)
    head.update(in_channels=[8, 16, 32, 64], num_queries=12)
    head.loss_cls.class_weight = [1.0, 1.0, 1.0, 0.1]
    return cfg


ONE_STAGE = dict(
    backbone=feature('backbone'),
    level=feature('neck.0', weight_by='teacher_score'),
    neck=dict(type='CWDLoss', tap='neck', weight_by='labels'),
    head=feature('bbox_head.input.1', grid='teacher'),
)
TWO_STAGE = dict(
    backbone=feature('backbone'),
    level=feature('neck.0', weight_by='teacher_score'),
    neck=dict(type='CWDLoss', tap='neck', weight_by='labels'),
    head=feature('rpn_head.input.0'),
)
QUERIES = dict(
    backbone=feature('backbone'),
    level=feature('neck.0', weight_by='labels'),
    memory=feature('forward_encoder.output.memory'),
    queries=feature('bbox_head.input.hidden_states.1', connector=None),
)


def case(name):
    """Student, teacher, losses and batch of a kind of model."""
    if name == 'fcn':
        losses = dict(
            stage=feature('backbone.layer2.0'),
            head=feature('decode_head.input.3', weight_by='labels'),
            logits=dict(type='CWDLoss', tap='decode_head', weight_by='teacher_score'),
        )
        return seg(8), seg(16), losses, lambda model: seg_batch()
    if name.startswith('mask2former'):
        cfg = mask2former(name.split('-')[1])
        head = 'decode_head' if name.endswith('mmseg') else 'panoptic_head'
        losses = dict(
            backbone=feature('backbone'),
            pixels=feature(f'{head}.pixel_decoder.output.0', weight_by='labels'),
            head=feature(f'{head}.input'),
        )
        batch = tiny_zoo.batch if name.endswith('mmdet') else lambda model: seg_batch()
        return cfg, cfg, losses, batch
    if name in tiny_det.FAMILIES:
        make = tiny_det.FAMILIES[name]
        cfgs = ({'_scope_': 'mmdet', **make(channels)} for channels in (8, 16))
        return *cfgs, ONE_STAGE, tiny_det.batch
    cfg = {'_scope_': 'mmdet', **tiny_zoo.config(name)}
    losses = TWO_STAGE if name in tiny_zoo.ROI else dict(QUERIES)
    if name == 'dino':
        del losses['queries']  # its student has denoising queries besides
    return cfg, cfg, losses, tiny_zoo.batch


@pytest.mark.parametrize(
    'name',
    ['fcn', 'mask2former-mmseg', 'mask2former-mmdet', *tiny_det.FAMILIES, *tiny_zoo.ZOO],
)
def test_features_of_every_kind_of_model_are_distilled(tmp_path, name):
    student, other, losses, batch = case(name)
    model = distilled(student, saved(tmp_path, other), losses)
    found = model(*batch(model), mode='loss')
    assert {f'loss_{term}' for term in losses} <= found.keys()
    assert all(torch.isfinite(found[f'loss_{term}']) for term in losses)
    assert all(found[f'loss_{term}'] > 0 for term in losses if term != 'queries')
    total, _ = model.parse_losses(found)
    total.backward()
    parameters = dict(model.named_parameters())
    of_connectors = [n for n in parameters if n.startswith('connectors.')]
    assert of_connectors
    assert all(parameters[n].grad is not None for n in of_connectors)
    assert not any(p.requires_grad for p in model.distillation.teacher.parameters())


def test_loss_is_that_of_the_plain_formula(teacher):
    model = distilled(seg(), teacher, dict(f=feature('backbone.2'), cwd=CWD))
    inputs, samples = seg_batch()
    found = model(inputs, samples, mode='loss')
    own = model.distillation.teacher
    with torch.no_grad():
        other = own.model.backbone(inputs)
    mine = model.backbone(inputs)
    through = model.connectors['f']['levels'][0](mine[2])
    torch.testing.assert_close(found['loss_f'], (through - other[2]).square().mean())
    through = model.connectors['cwd']['levels'][0](mine[3])
    s, t = (x.flatten(2).div(4).log_softmax(-1) for x in (through, other[3]))
    expected = (t.exp() * (t - s)).sum(-1).mean() * 16
    torch.testing.assert_close(found['loss_cwd'], expected)


def test_own_losses_are_those_of_the_plain_student(teacher):
    plain_losses = {}
    for name, build in (
        ('plain', lambda: build_model(seg())),
        ('distilled', lambda: build_teacher_student(seg(), teacher, dict(cwd=CWD))),
    ):
        torch.manual_seed(5)
        model = build()
        model.init_weights()
        plain_losses[name] = model.train()(*seg_batch(), mode='loss')
    found = plain_losses['distilled']
    assert found.keys() - plain_losses['plain'].keys() == {'loss_cwd'}
    for key, value in plain_losses['plain'].items():
        assert torch.equal(found[key], value)


def test_weight_0_trains_as_the_plain_student_bit_by_bit(teacher):
    def trained(build):
        torch.manual_seed(5)
        model = build()
        model.init_weights()
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        for _ in range(2):
            total, _ = model.parse_losses(model(*seg_batch(), mode='loss'))
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        return model.state_dict()

    losses = dict(cwd={**CWD, 'weight': 0})
    off = trained(lambda: build_teacher_student(seg(), teacher, losses))
    for key, value in trained(lambda: build_model(seg())).items():
        assert torch.equal(off[key], value)


def test_idle_terms_keep_their_parameters_in_the_graph(teacher, iteration):
    losses = dict(now=feature('backbone.2'), later={**CWD, 'begin': 10})
    model = distilled(seg(), teacher, losses)
    iteration(0)
    found = model(*seg_batch(), mode='loss')
    assert found['loss_later'] == 0
    model.parse_losses(found)[0].backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'connectors' in n)
    assert not any(p.grad.any() for p in model.connectors['later'].parameters())


def count_calls(module, calls, name):
    module.register_forward_hook(lambda *_: calls.append(name))


def test_teacher_stops_where_the_last_wanted_tap_is(tmp_path):
    cfgs = [{'_scope_': 'mmdet', **tiny_det.retina(channels)} for channels in (8, 16)]
    model = distilled(cfgs[0], saved(tmp_path, cfgs[1]), dict(f=feature('neck.0')))
    calls, own = [], model.distillation.teacher.model
    for name in ('backbone', 'neck', 'bbox_head'):
        count_calls(getattr(own, name), calls, name)
    model(*tiny_det.batch(model), mode='loss')
    assert calls == ['backbone']  # the neck is left as soon as its output is there
    losses = dict(f=feature('neck.0', weight_by='teacher_score'))
    model = distilled(cfgs[0], saved(tmp_path, cfgs[1]), losses)
    count_calls(model.distillation.teacher.model.bbox_head.retina_cls, calls, 'head')
    model(*tiny_det.batch(model), mode='loss')
    assert 'head' in calls


def test_connectors_are_part_of_the_student_and_of_nothing_that_is_shipped(teacher, tmp_path):
    model = distilled(seg(), teacher, dict(cwd=CWD, f=dict(type='FeatureLoss', tap='decode_head')))
    keys = [key for key in model.state_dict() if key.startswith('connectors')]
    assert keys == ['connectors.cwd.levels.0.0.weight', 'connectors.cwd.levels.0.0.bias']
    assert {id(p) for p in model.connectors.parameters()} <= {id(p) for p in model.parameters()}
    average = ExponentialMovingAverage(model)
    assert 'module.connectors.cwd.levels.0.0.weight' in average.state_dict()
    path = str(tmp_path / 'run.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    plain = build_model(seg())
    plain.load_state_dict(load_weights(path)['state_dict'])
    assert keys == [k for k in load_weights(path, connectors=True)['state_dict'] if k in keys]


def test_a_copy_trains_its_own_connectors(teacher):
    model = distilled(seg(), teacher, dict(cwd=CWD))
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.connectors['cwd']['levels'][0][0].weight.zero_()
    first, second = (m(*seg_batch(), mode='loss')['loss_cwd'] for m in (model, other))
    assert first != second
    second.backward()
    assert model.connectors['cwd']['levels'][0][0].weight.grad is None


def test_moves_and_casts_reach_the_connectors(teacher):
    model = distilled(seg(), teacher, dict(cwd=CWD)).double()
    assert {p.dtype for p in model.connectors.parameters()} == {torch.float64}


def test_losses_are_float32_under_autocast(teacher):
    model = distilled(seg(), teacher, dict(cwd=CWD, f=feature('backbone.3')))
    with torch.autocast('cpu', torch.bfloat16):
        found = model(*seg_batch(), mode='loss')
    assert found['loss_cwd'].dtype == found['loss_f'].dtype == torch.float32


# With parts that a user writes outside of the package: tests/users_own.py.


def test_parameters_and_memory_of_a_loss_belong_to_the_student(teacher):
    model = distilled(seg(), teacher, dict(w=dict(type='Growing', tap='decode_head')))
    assert 'connectors.w.loss.scale' in dict(model.named_parameters())
    assert 'connectors.w.loss.steps' in model.state_dict()
    found = model(*seg_batch(), mode='loss')
    assert {'loss_w', 'loss_w_scale'} <= found.keys()
    assert model.state_dict()['connectors.w.loss.steps'] != 0
    model.parse_losses(found)[0].backward()
    assert model.connectors['w']['loss'].scale.grad != 0


@pytest.mark.parametrize('first', ['gap', 'kd'])
def test_a_loss_that_forms_no_own_loss_never_deletes_it(teacher, first):
    losses = dict(gap=dict(type='LogitGap'), kd=dict(type='KDLoss'))
    losses = {name: losses[name] for name in sorted(losses, key=lambda name: name != first)}
    expected = distilled(seg(), teacher, losses)(*seg_batch(), mode='loss')
    model = distilled(seg(), teacher, losses, fuse_task_loss=True)
    found = model(*seg_batch(), mode='loss')
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5)
    model.parse_losses(found)[0].backward()
    assert model.connectors['gap']['loss'].conv.weight.grad.any()


@pytest.mark.parametrize('key', ['fuse_task_loss=True', 'fit'])
def test_own_loss_needs_a_loss_that_forms_it(teacher, key):
    asked = dict(fuse_task_loss=True)
    if key == 'fit':
        asked = dict(fit=dict(function=dict(type='ConstantFit')))
    with pytest.raises(ValueError, match=rf'`{key}` needs a loss on .decode_head.*LogitGap'):
        build_teacher_student(seg(), teacher, dict(gap=dict(type='LogitGap')), **asked)
    with pytest.raises(ValueError, match=f'`{key}` needs one of the `losses` on a head'):
        build_teacher_student(seg(), teacher, dict(cwd=CWD), **asked)


@pytest.mark.parametrize(
    ('losses', 'message'),
    [
        (dict(a=dict(type='mmseg.CrossEntropyLoss')), '`losses.a`.*DistillLoss.*CrossEntropyLoss'),
        (dict(a=dict(type='torch.nn.MSELoss')), '`losses.a`.*DistillLoss.*MSELoss'),
        (dict(a=dict(type='NoLoss')), '`losses.a.type`.*NoLoss'),
        (
            dict(a={**CWD, 'tap': 'nekc.0'}),
            "`losses.a.tap`.*'nekc.0'.*only: data_prep",
        ),
        (dict(a={**CWD, 'teacher_tap': 'nekc.0'}), "`losses.a.teacher_tap`.*'nekc.0'"),
        (dict(a=dict(type='CWDLoss')), '`losses.a.tap` should be a dotted path.*None'),
        (dict(a={**CWD, 'connector': None}), '`losses.a`.*Found 64 at.*128'),
        (dict(a={**CWD, 'head': 'decode_head'}), "`losses.a` should have `tap`.*Found 'head'"),
        (dict(a=dict(type='KDLoss', tap='neck')), "`losses.a` should have `head`.*Found 'tap'"),
        (dict(a={**CWD, 'grid': 'x'}), "`losses.a.grid`.*'x'"),
        (dict(a={**CWD, 'weight_by': 'x'}), "`losses.a.weight_by`.*'x'"),
        ({'a.b': CWD}, "`losses` should have names without a dot. Found 'a.b'"),
    ],
)
def test_mistakes_are_refused_at_start_by_their_key(teacher, losses, message):
    with pytest.raises(ValueError, match=message):
        build_teacher_student(seg(), teacher, losses)


def test_names_of_the_students_own_losses_are_refused(teacher):
    model = distilled(seg(), teacher, dict(ce=dict(type='KDLoss')))
    with pytest.raises(ValueError, match="`losses`.*'ce', and 'decode.loss_ce' is there already"):
        model(*seg_batch(), mode='loss')


def test_tap_that_predicting_does_not_reach_is_refused(teacher):
    with pytest.raises(ValueError, match='`losses.a.tap` should be called.*loss_decode'):
        build_teacher_student(seg(), teacher, dict(a={**CWD, 'tap': 'decode_head.loss_decode'}))


# Teachers that are no detectors or segmenters.


class Patches(nn.Module):
    """A little vision transformer's outputs: a class token, then one token per patch of 8."""

    def __init__(self, channels=6):
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 8, 8)

    def forward(self, x):
        assert not any(side % 8 for side in x.shape[2:])
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        return dict(patches=torch.cat((tokens[:, :1] * 0 + 99, tokens), 1))


@MODELS.register_module('patches_function')
def build_patches(channels=6):
    torch.manual_seed(0)
    return Patches(channels)


PATCHES = dict(
    model=dict(type='mmdistill_ext.patches_function', channels=5),
    pretrained=True,
    patch_size=8,
    data_preprocessor=dict(mean=[120.0] * 3, std=[60.0] * 3, bgr_to_rgb=True),
)


def test_a_function_of_a_config_gives_a_teacher_of_patches():
    losses = dict(a=feature('backbone.3', teacher_tap='output.patches'))
    model = distilled(seg(), PATCHES, losses)
    inputs, samples = seg_batch()
    inputs, size = inputs[:, :, :30], (32, 40)  # not made of whole patches
    found = model(
        inputs, [tiny_seg.sample(x.gt_sem_seg.data[0, :30]) for x in samples], mode='loss'
    )
    own = model.distillation.teacher
    converted = (inputs * 64 + 127.5 - 120) / 60
    resized = nn.functional.interpolate(converted, size, mode='bilinear', antialias=True)
    expected = own.model.embed(resized)
    mine = model.connectors['a']['levels'][0](model.backbone(inputs)[3])
    assert mine.shape == (2, 5, 4, 5)
    torch.testing.assert_close(found['loss_a'], (mine - expected).square().mean())


def test_a_class_given_itself_is_a_teacher():
    spec = dict(model=dict(type=Patches), pretrained=True, patch_size=8)
    model = distilled(seg(), spec, dict(a=feature('backbone.3', teacher_tap='output.patches')))
    assert model(*seg_batch(), mode='loss')['loss_a'] > 0


@pytest.mark.parametrize('scope', ['mmdet', 'mmseg'])
def test_a_bare_backbone_of_any_registry_is_a_teacher(tmp_path, scope):
    cfg = dict(type=f'{scope}.ResNet', depth=18, base_channels=16, stem_channels=16)
    torch.manual_seed(0)
    state = {f'backbone.{k}': v for k, v in build_model(cfg).state_dict().items()}
    torch.save(dict(state_dict={**state, 'neck.w': torch.ones(1)}), tmp_path / 't.pth')
    spec = dict(model=cfg, checkpoint=str(tmp_path / 't.pth'), prefix='backbone.')
    model = distilled(seg(), spec, dict(a=feature('backbone.3', teacher_tap='output.3')))
    own = model.distillation.teacher.model
    assert torch.equal(own.conv1.weight, state['backbone.conv1.weight'])
    assert model(*seg_batch(), mode='loss')['loss_a'] > 0
    losses = dict(a=feature('backbone.3', teacher_tap='output.3'))
    with pytest.raises(ValueError, match=r"`teacher.prefix`.*Found 'x\.'.*'backbone.conv1"):
        build_teacher_student(seg(), {**spec, 'prefix': 'x.'}, losses).init_weights()


def test_units_need_a_teacher_with_heads():
    with pytest.raises(ValueError, match='`losses.a.teacher_head`|`teacher.model`'):
        build_teacher_student(seg(), PATCHES, dict(a=dict(type='KDLoss')))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(pretrained=False), '`teacher.checkpoint` should be the file'),
        (dict(checkpoint='x.pth'), '`teacher.pretrained=True`.*x.pth'),
        (dict(patch_size=0), '`teacher.patch_size`.*Found 0'),
        (dict(data_preprocessor=dict(mean=[1.0])), '`teacher.data_preprocessor`'),
        (dict(model=dict(type='nowhere.function')), 'nowhere'),
    ],
)
def test_mistakes_of_such_a_teacher_name_the_key(change, message):
    losses = dict(a=feature('backbone.3', teacher_tap='output.patches'))
    with pytest.raises((ValueError, KeyError), match=message):
        build_teacher_student(seg(), {**PATCHES, **change}, losses).init_weights()


def test_failing_dry_forward_says_whose_it_is():
    losses = dict(a=feature('backbone.3', teacher_tap='output.patches'))
    with pytest.raises(ValueError, match='A forward of the teacher.*should show'):
        spec = dict(model=dict(type=nn.Linear, in_features=2, out_features=2), pretrained=True)
        build_teacher_student(seg(), spec, dict(a={**losses['a'], 'teacher_tap': 'output'}))


def test_taps_inside_of_a_compiled_teacher_are_refused(teacher, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module: None)
    with pytest.raises(ValueError, match="`losses.a.teacher_tap`.*compile.*'backbone.layer1'"):
        losses = dict(a=feature('backbone.layer1'))
        build_teacher_student(seg(), {**teacher, 'compile': True}, losses)


def test_queries_of_different_numbers_are_refused(tmp_path):
    cfg = {'_scope_': 'mmdet', **tiny_zoo.config('dino')}
    losses = dict(a=QUERIES['queries'])
    model = distilled(cfg, saved(tmp_path, cfg), losses)
    with pytest.raises(ValueError, match='`losses.a` should have maps, or as many tokens'):
        model(*tiny_zoo.batch(model), mode='loss')


def test_scores_of_guided_anchors_weigh_the_features_of_a_batch(tmp_path):
    """In eval mode such a head looks at one image only, and on GPUs only."""
    cfgs = [{'_scope_': 'mmdet', **tiny_dense.guided(channels)} for channels in (8, 16)]
    losses = dict(f=feature('neck.0', weight_by='teacher_score'))
    model = distilled(cfgs[0], saved(tmp_path, cfgs[1]), losses)
    found = model(*tiny_det.batch(model), mode='loss')
    assert found['loss_f'] > 0
    assert not any(module.training for module in model.distillation.teacher.modules())
