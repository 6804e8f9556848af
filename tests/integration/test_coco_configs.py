"""The COCO configs are ready to run: built with real models, stepped on tiny images."""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from tests import tiny_det, tiny_zoo

CONFIGS = Path(__file__).parents[2] / 'configs'
ZOO = Path(mmdet.__file__).parent / '.mim'
KD = {'bbox.loss_kd', 'bbox.loss_kd_box'}
SEL = {'bbox.loss_sel', 'bbox.loss_sel_box', 'bbox.teacher_better'}
FIT = {'bbox.l_soft', 'bbox.l_hard'}
LOGGED = {  # those of one teacher side by side: its weights are saved once
    'selective/sel_retinanet_r101_retinanet_r18_1x_coco.py': SEL,
    'kd/kd_retinanet_r101_retinanet_r18_1x_coco.py': KD,
    'fit/fit-sel_retinanet_r101_retinanet_r18_1x_coco.py': SEL | FIT,
    'features/feature_retinanet_r101_retinanet_r18_1x_coco.py': {'loss_neck'},
    'selective/sel_gfl_r101_gfl_r18_1x_coco.py': SEL,
    'kd/kd_gfl_r101_gfl_r18_1x_coco.py': KD,
    'selective/sel_atss_r101_atss_r50_1x_coco.py': SEL,
    'selective/sel_fcos_r101_fcos_r50_1x_coco.py': SEL,
    'selective/sel_rtmdet_l_rtmdet_s_300e_coco.py': SEL,
    'selective/sel_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py': SEL,
    'kd/kd_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py': KD,
    'fit/fit-sel_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py': SEL | FIT,
    'selective/sel_mask-rcnn_r101_mask-rcnn_r50_1x_coco.py': SEL
    | {'mask.loss_sel_mask', 'mask.teacher_better'},
    'selective/sel_dino_r50_dino_r18_12e_coco.py': SEL,
    'fit/fit-sel_dino_r50_dino_r18_12e_coco.py': SEL | FIT,
}
PLAIN = {
    'plain/gfl_r18_1x_coco.py': 'selective/sel_gfl_r101_gfl_r18_1x_coco.py',
    'plain/dino_r18_12e_coco.py': 'selective/sel_dino_r50_dino_r18_12e_coco.py',
}
TOGETHER = {
    'collaborative/col_gfl-atss_r18_1x_coco.py': dict(
        gfl='plain/gfl_r18_1x_coco.py', atss='plain/atss_r18_1x_coco.py'
    )
}


@pytest.fixture(scope='module')
def save_weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """Save random weights of a teacher, unless they are those of the last call."""
    path = tmp_path_factory.mktemp('coco') / 'teacher.pth'
    saved = []

    def save(cfg: ConfigDict) -> str:
        if saved != [cfg]:
            model = build_model(cfg)
            tiny_zoo.set_level_embed(model)
            torch.save(dict(state_dict=model.state_dict()), path)
            saved[:] = [cfg]
        return str(path)

    yield save
    path.unlink()


@cache
def load(name: str) -> Config:
    """Read a config, once."""
    return Config.fromfile(CONFIGS / name)


@cache
def load_teacher(name: str) -> ConfigDict:
    """Read the model of mmdet's config, once."""
    return resolve_model_cfg(name)


def shrink(model: ConfigDict) -> None:
    """Let a detector look for as much as there is room for in a tiny image."""
    if 'num_queries' in model:
        model.num_queries = 20
    if 'roi_head' in model:
        model.train_cfg.rpn_proposal.max_per_img = 50
        model.train_cfg.rcnn.sampler.num = 32


def batch(model: torch.nn.Module) -> tuple[torch.Tensor, list]:
    """Return two images, one without a box, with masks if the model needs them."""
    raw = (tiny_zoo if getattr(model, 'with_mask', False) else tiny_det).raw()
    data = {name: values[:2] for name, values in raw.items()}
    data = model.data_preprocessor(data, training=True)
    return data['inputs'], data['data_samples']


def test_every_config_is_tried():
    files = {path.relative_to(CONFIGS).as_posix(): path for path in CONFIGS.rglob('*.py')}
    students = {name for names in TOGETHER.values() for name in names.values()}
    tried = {*LOGGED, *PLAIN, *TOGETHER, *students}
    assert {n for n, p in files.items() if '_coco' in p.name + p.read_text()} == tried


@pytest.mark.parametrize('name', LOGGED)
def test_built_and_stepped(save_weights: Callable[..., str], name: str):
    cfg = copy.deepcopy(load(name))
    init_default_scope(cfg.default_scope)
    teacher = cfg.model.teacher
    teacher.model = copy.deepcopy(load_teacher(teacher.model))
    for detector in (cfg.model.student, teacher.model):
        shrink(detector)
        detector.backbone.init_cfg = None
    teacher.checkpoint = save_weights(teacher.model)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    tiny_zoo.set_level_embed(model)
    hooks = {hook.type.split('.')[-1] for hook in cfg.custom_hooks}
    compares = not name.startswith('features/')
    wanted = {'StartCheckHook'} | ({'TeacherShareHook', 'ContrastMaskHook'} if compares else set())
    assert wanted <= hooks
    assert ('FitHook' in hooks) == (model.distillation.fit is not None)
    if model.distillation.fit is not None:
        model.distillation.fit.has_hook = True  # as that hook says
    total, log = model.parse_losses(model(*batch(model), mode='loss'))
    total.backward()
    assert torch.isfinite(total)
    ours = ('bbox.', 'mask.', 'loss_neck')
    assert {key for key in log if key.startswith(ours)} == LOGGED[name]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.mark.parametrize('name', TOGETHER)
def test_networks_that_learn_together_are_built_and_stepped(name: str):
    cfg = copy.deepcopy(load(name))
    init_default_scope(cfg.default_scope)
    for student, plain in TOGETHER[name].items():
        cfg.model.students[student] = copy.deepcopy(load(plain).model)
        cfg.model.students[student].backbone.init_cfg = None
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    data = {key: values[:2] for key, values in tiny_det.raw().items()}
    total, log = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    total.backward()
    assert torch.isfinite(total)
    pulls = {f'{student}/loss_kl{box}' for student in TOGETHER[name] for box in ('', '_box')}
    assert pulls | {'ensemble/loss', 'ensemble/loss_box'} < log.keys()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in trained)
    assert cfg.val_evaluator.metrics.ann_file == 'data/coco/annotations/instances_val2017.json'
    first, *others = TOGETHER[name].items()
    assert load(name).model.students[first[0]] == load(first[1]).model
    assert all(load(name).model.students[key] == f'mmdistill_ext::{plain}' for key, plain in others)


@pytest.mark.parametrize('name', LOGGED)
def test_teacher_is_published_and_the_data_are_mmdets(name: str):
    cfg = load(name)
    config = Path('configs', cfg.model.teacher.model.removeprefix('mmdet::'))
    models = yaml.safe_load((ZOO / config.parent / 'metafile.yml').read_text())['Models']
    weights = {entry['Config']: entry.get('Weights') for entry in models}
    assert weights[config.as_posix()] == cfg.model.teacher.checkpoint
    assert cfg.train_dataloader.dataset.data_root == 'data/coco/'
    assert cfg.val_evaluator.ann_file == 'data/coco/annotations/instances_val2017.json'
    assert cfg.default_hooks.checkpoint.type == 'CheckpointHook'
    assert ('segm' in cfg.val_evaluator.metric) == ('mask-rcnn' in name)


@pytest.mark.parametrize('name', PLAIN)
def test_plain_config_is_the_student_alone(name: str):
    plain, distilled = (load(path) for path in (name, PLAIN[name]))
    assert plain.model == distilled.model.student
    assert plain.optim_wrapper == distilled.optim_wrapper
