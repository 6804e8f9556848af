import copy
from pathlib import Path

import pytest
import torch

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.teacher import Teacher
from tests import tiny_det, tiny_seg


def model_cfg(**preprocessor):
    cfg = tiny_seg.model(8)
    cfg['data_preprocessor'].update(preprocessor)
    cfg['decode_head']['dropout_ratio'] = 0.5
    return cfg


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return tiny_seg.save_weights(tmp_path_factory.mktemp('teacher') / 't.pth', model_cfg(), seed=1)


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 40), tiny_seg.samples(torch.randint(0, 3, (2, 32, 40)))


def test_it_stays_frozen_and_in_eval_mode(checkpoint, batch):
    teacher = Teacher(model_cfg(), checkpoint).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = copy.deepcopy(teacher.state_dict())
    first, second = (teacher(*batch, ['decode_head'])['decode_head'].output for _ in range(2))
    assert torch.equal(first, second)  # no dropout
    assert not first.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


def test_output_is_that_of_tensor_mode(checkpoint, batch):
    teacher = Teacher(model_cfg(), checkpoint)
    plain = build_model(model_cfg()).eval()
    plain.load_state_dict(torch.load(checkpoint)['state_dict'])
    call = teacher(*batch, ['decode_head'])['decode_head']
    assert torch.equal(call.output, plain(batch[0], mode='tensor'))


def test_building_it_draws_no_random_number(checkpoint):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    Teacher(model_cfg(), checkpoint)
    assert torch.equal(torch.rand(1), expected)


def test_auxiliary_head_runs_on_the_features(tmp_path, batch):
    cfg = model_cfg()
    cfg['auxiliary_head'] = dict(copy.deepcopy(cfg['decode_head']), in_channels=32, in_index=2)
    path = tiny_seg.save_weights(tmp_path / 't.pth', cfg, seed=1)
    teacher = Teacher(cfg, path)
    calls = teacher(*batch, ['decode_head', 'auxiliary_head'])
    features = teacher.model.extract_feat(batch[0])
    assert torch.equal(calls['auxiliary_head'].output, teacher.model.auxiliary_head(features))


@pytest.mark.parametrize(
    'own',
    [
        dict(),
        dict(mean=[10.0, 20.0, 30.0], std=[50.0, 60.0, 70.0], pad_val=3),
        dict(mean=[10.0, 20.0, 30.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False),
        dict(mean=None, std=None, bgr_to_rgb=False),
    ],
)
def test_teacher_gets_the_input_it_was_trained_on(tmp_path, own):
    cfg = model_cfg(**own)
    teacher = Teacher(cfg, tiny_seg.save_weights(tmp_path / 't.pth', cfg, seed=1))
    student = build_model(model_cfg())
    teacher.input.match(student)
    images = [torch.randint(0, 256, size, dtype=torch.uint8) for size in ((3, 32, 40), (3, 20, 28))]
    labels = [torch.zeros(size[1:], dtype=torch.int64) for size in ((3, 32, 40), (3, 20, 28))]

    def preprocessed(model):
        data = dict(inputs=images, data_samples=[tiny_seg.sample(label) for label in labels])
        return model.data_preprocessor(data, training=True)

    data = preprocessed(student)
    converted = teacher.input.convert(data['inputs'].clone(), data['data_samples'])
    expected = preprocessed(teacher.model)['inputs']
    torch.testing.assert_close(converted, expected, atol=1e-3, rtol=1e-5)
    if not own:
        assert teacher.input.convert(data['inputs'], data['data_samples']) is data['inputs']


@pytest.mark.parametrize('channels', [1, 2, 3, 6])
@pytest.mark.parametrize('swaps', [False, True])
@pytest.mark.parametrize(
    ('own', 'of_student'),
    [
        (dict(mean=None, std=None), dict(mean=None, std=None)),
        (dict(mean=None, std=None), dict(mean=[100.0], std=[50.0])),
        (dict(mean=[90.0], std=[40.0]), dict(mean=[100.0], std=[50.0])),
        (dict(mean=[90.0], std=[40.0], pad_val=7), dict(mean=None, std=None)),
    ],
)
def test_images_have_any_number_of_channels(tmp_path, channels, swaps, own, of_student):
    cfg = model_cfg(**own, bgr_to_rgb=swaps)
    cfg['backbone']['in_channels'] = channels
    teacher = Teacher(cfg, tiny_seg.save_weights(tmp_path / 't.pth', cfg, seed=1))
    student = build_model(model_cfg(**of_student, bgr_to_rgb=False))
    teacher.input.match(student)
    images = [torch.randint(0, 256, (channels, *size), dtype=torch.uint8) for size in SIZES]
    batches = []
    for model in (student, teacher.model):
        samples = [tiny_seg.sample(torch.zeros(size, dtype=torch.int64)) for size in SIZES]
        batches.append(model.data_preprocessor(dict(inputs=images, data_samples=samples), True))
    converted = teacher.input.convert(batches[0]['inputs'].clone(), batches[0]['data_samples'])
    torch.testing.assert_close(converted, batches[1]['inputs'], atol=1e-3, rtol=1e-5)


SIZES = ((32, 40), (20, 28))


def test_means_of_other_numbers_of_channels_are_refused(checkpoint):
    teacher, student = Teacher(model_cfg(), checkpoint), build_model(model_cfg())
    student.data_preprocessor.mean = torch.zeros(4, 1, 1)
    with pytest.raises(ValueError, match=r'`data_preprocessor\.mean`.*Found 3, 4 in `student`'):
        teacher.input.match(student)


def test_compiled_and_channels_last_teachers_say_the_same(checkpoint, batch, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda module: compiled.append(module))
    plain, fast = (
        Teacher(model_cfg(), checkpoint),
        Teacher(model_cfg(), checkpoint, compile=True, channels_last=True),
    )
    assert compiled == [fast.model.backbone]
    outputs = [t(*batch, ['decode_head'])['decode_head'].output for t in (plain, fast)]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(checkpoint=None), ValueError, '`teacher.checkpoint` should be the file or URL'),
        (dict(checkpoint='nowhere.pth'), FileNotFoundError, "`teacher.checkpoint`.*'nowhere.pth'"),
        (dict(model=tiny_seg.model(4)), ValueError, '`teacher.checkpoint`.*is of another model'),
        (dict(model='nowhere.py'), FileNotFoundError, "`teacher.model`.*'nowhere.py'"),
    ],
)
def test_errors_at_start_name_the_key(checkpoint, arguments, error, message):
    with pytest.raises(error, match=message):
        Teacher(**{**dict(model=model_cfg(), checkpoint=checkpoint), **arguments})


def with_auxiliary_head(cfg):
    head = dict(copy.deepcopy(cfg['decode_head']), in_channels=32, in_index=2)
    return {**cfg, 'auxiliary_head': head}


@pytest.mark.parametrize('without', [dict(), dict(auxiliary_head=None)])
def test_a_head_that_only_training_needs_may_be_left_out(tmp_path, without):
    path = tiny_seg.save_weights(tmp_path / 't.pth', with_auxiliary_head(model_cfg()), seed=1)
    state = Teacher({**model_cfg(), **without}, path).model.state_dict()
    saved = torch.load(path)['state_dict']
    assert len(state) < len(saved)
    assert all(torch.equal(value, saved[key]) for key, value in state.items())
    with pytest.raises(ValueError, match='missing keys .e.g. auxiliary_head'):
        Teacher(
            with_auxiliary_head(model_cfg()),
            tiny_seg.save_weights(tmp_path / 'u.pth', model_cfg(), seed=1),
        )


@pytest.mark.parametrize('family', ['rtmdet', 'yolox'])
def test_published_detectors_are_teachers(tmp_path, family):
    """As mmdet's zoo has them: with the normalisation, mmdet 2's averages, DDP's names."""
    cfg = tiny_det.FAMILIES[family]()
    path = Path(tiny_det.save_weights(tmp_path / 't.pth', cfg, seed=1))
    state = torch.load(path)['state_dict']
    averages = {f'ema_{key.replace(".", "_")}': value for key, value in state.items()}
    more = {f'data_preprocessor.{name}': torch.ones(3, 1, 1) for name in ('mean', 'std')}
    whole = {f'module.{key}': value for key, value in {**state, **averages, **more}.items()}
    torch.save(dict(state_dict=whole), path)
    teacher = Teacher({'_scope_': 'mmdet', **cfg}, path)
    assert all(torch.equal(value, state[key]) for key, value in teacher.model.state_dict().items())
