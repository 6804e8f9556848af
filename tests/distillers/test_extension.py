import copy

import pytest
import torch

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.distillers.extension import INNER_MODELS, extend, register_extension
from mmdistill_ext.distillers.teacher_student import DistilledModel
from mmdistill_ext.registry import MODELS
from tests import tiny_seg

SEL = dict(type='SelectiveLoss', temperature=2.0)


class LouderModel:
    """Multiplies what the model below it has lost."""

    def forward(self, inputs, data_samples=None, mode='tensor'):
        found = super().forward(inputs, data_samples, mode)
        if mode != 'loss':
            return found
        return {name: self.factor * value for name, value in found.items()}


@pytest.fixture
def louder():
    @register_extension('LouderTraining', inner='model')
    def build(model, factor=2.0, data_preprocessor=None):
        return extend(build_model(model, 'model'), LouderModel, factor=factor)

    yield build
    del MODELS.module_dict['LouderTraining'], INNER_MODELS['LouderTraining']


@pytest.fixture(scope='module')
def distilled(tmp_path_factory):
    path = tiny_seg.save_weights(tmp_path_factory.mktemp('t') / 't.pth', tiny_seg.model(16), seed=1)
    return dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=tiny_seg.model(8),
        teacher=dict(model=tiny_seg.model(16), checkpoint=path),
        losses=dict(sel=SEL),
    )


def batch():
    torch.manual_seed(0)
    return torch.randn(2, 3, 32, 40), tiny_seg.samples(torch.randint(0, 3, (2, 32, 40)))


def built(cfg):
    torch.manual_seed(5)
    model = build_model(cfg, 'model')
    model.init_weights()
    return model.train()


def test_extensions_stack(louder, distilled):
    inner = built(distilled)
    model = built(dict(type='mmdistill_ext.LouderTraining', model=distilled, factor=3.0))
    assert isinstance(model, LouderModel)
    assert isinstance(model, DistilledModel)
    assert type(model).__name__ == 'LouderDistilledEncoderDecoder'
    assert list(model.state_dict()) == list(inner.state_dict())
    expected, found = inner(*batch(), mode='loss'), model(*batch(), mode='loss')
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], 3 * value)
    assert torch.equal(model(*batch()), inner(*batch()))


def test_every_layer_of_the_stack_moves_and_is_copied(louder, distilled):
    model = built(dict(type='mmdistill_ext.LouderTraining', model=distilled)).double()
    teacher = model.distillation.teacher
    assert {p.dtype for p in (*model.parameters(), *teacher.parameters())} == {torch.float64}
    other = copy.deepcopy(model)
    assert (type(other), other.factor) == (type(model), 2.0)
    assert other.distillation is model.distillation


def test_inner_model_is_known_by_name(louder):
    assert INNER_MODELS['LouderTraining'] == 'model'
    assert INNER_MODELS['TeacherStudentDistiller'] == 'student'


def test_attribute_of_the_model_is_not_overwritten():
    model = build_model(tiny_seg.model(8))
    with pytest.raises(ValueError, match=r"LouderModel.*\['decode_head'\] in a EncoderDecoder"):
        extend(model, LouderModel, decode_head=3)
