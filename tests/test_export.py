"""The exported student: complete, plain, and equal to the trained one."""

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.optim import build_optim_wrapper

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.export import export_student, load_student
from mmdistill_ext.plain_config import plain_config
from tests import tiny_seg
from tests.tiny_collaboration import add_views


@pytest.fixture
def cfg(tmp_path: Path) -> Config:
    return tiny_seg.distil(
        tiny_seg.config(tmp_path / 'data', tmp_path / 'work'),
        str(tmp_path / 'teacher.pth'),
        masks=dict(type='mmdistill_ext.ContrastMaskHook', interval=1),
        ema=dict(type='EMAHook'),
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    """What a run leaves: weights, a connector, optimizer and logs, numpy in the meta data."""
    torch.manual_seed(3)
    model = build_model({'_scope_': 'mmseg', **tiny_seg.model(8)})
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5) if buffer.is_floating_point() else buffer.fill_(7)
    content = dict(
        state_dict={**model.state_dict(), 'connectors.0.weight': torch.ones(2)},
        optimizer=dict(state={0: torch.ones(5)}),
        message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1]))),
        meta=dict(
            iter=2,
            dataset_meta=dict(classes=tiny_seg.CLASSES, palette=np.array(tiny_seg.PALETTE)),
        ),
    )
    torch.save(content, tmp_path / 'iter_2.pth')
    return str(tmp_path / 'iter_2.pth')


def test_plain_config_of_a_plain_config_is_itself(tmp_path: Path):
    cfg = tiny_seg.config(tmp_path, tmp_path)
    assert plain_config(cfg) is cfg


def test_plain_config_is_the_same_run_without_us(cfg: Config, tmp_path: Path):
    plain = plain_config(cfg).to_dict()
    expected = tiny_seg.config(tmp_path / 'data', tmp_path / 'work').to_dict()
    assert plain == {**expected, 'custom_hooks': [dict(type='EMAHook')]}
    assert 'mmdistill_ext' not in plain_config(cfg).pretty_text


def test_plain_config_keeps_other_imports_and_hooks(cfg: Config):
    cfg.custom_imports.imports = ['mmdistill_ext.hooks', 'json']
    cfg.default_hooks.share = dict(type='TeacherShareHook', _scope_='mmdistill_ext')
    plain = plain_config(cfg)
    assert plain.custom_imports == dict(imports=['json'], allow_failed_imports=False)
    assert set(plain.default_hooks) == {'timer', 'logger', 'checkpoint', 'visualization'}


def test_plain_config_resolves_named_students(cfg: Config, tmp_path: Path):
    inline = plain_config(cfg).model
    tiny_seg.config(tmp_path, tmp_path).dump(tmp_path / 'named.py')
    cfg.model.student = str(tmp_path / 'named.py')
    assert plain_config(cfg).model == inline
    cfg.model.student = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    assert plain_config(cfg).model.backbone.depth == 50


def test_plain_config_moves_the_data_preprocessor_into_the_model(cfg: Config):
    preprocessor = cfg.model.student.pop('data_preprocessor')
    cfg.data_preprocessor = preprocessor
    assert plain_config(cfg).model.data_preprocessor == preprocessor


def test_export_holds_the_weights_and_nothing_else(cfg: Config, checkpoint: str, tmp_path: Path):
    config_path, weights_path = export_student(cfg, checkpoint, tmp_path / 'out')
    assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['student.pth', 'student.py']
    pipeline = plain_config(cfg).test_dataloader.dataset.pipeline
    expected = {**plain_config(cfg).to_dict(), 'test_pipeline': pipeline}
    assert Config.fromfile(config_path).to_dict() == expected
    exported = torch.load(weights_path, weights_only=True)
    before = torch.load(checkpoint, weights_only=False)['state_dict']
    del before['connectors.0.weight']
    assert list(exported['state_dict']) == list(before)
    assert all(torch.equal(exported['state_dict'][key], before[key]) for key in before)
    assert set(exported) == {'state_dict', 'meta'}
    meta = exported['meta']
    assert meta['dataset_meta'] == dict(classes=tiny_seg.CLASSES, palette=tiny_seg.PALETTE)
    assert (meta['iter'], meta['exported_from']) == (2, 'iter_2.pth')


def test_export_of_a_plain_config_strips_the_checkpoint(checkpoint: str, tmp_path: Path):
    tiny_seg.config(tmp_path, tmp_path).dump(tmp_path / 'plain.py')
    _, weights_path = export_student(tmp_path / 'plain.py', checkpoint, tmp_path / 'out')
    exported = torch.load(weights_path, weights_only=True)
    assert set(exported) == {'state_dict', 'meta'}
    assert 'connectors.0.weight' not in exported['state_dict']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda state: state.pop('decode_head.conv_seg.bias'), r'missing.*conv_seg\.bias'),
        (lambda state: state.update(extra=torch.ones(1)), r'unexpected.*extra'),
        (
            lambda state: state.update({'decode_head.conv_seg.bias': torch.ones(19)}),
            r'conv_seg\.bias: \(19,\) in the file, \(3,\)',
        ),
    ],
)
def test_export_refuses_another_model_and_writes_nothing(
    cfg: Config, checkpoint: str, tmp_path: Path, change, message: str
):
    content = torch.load(checkpoint, weights_only=False)
    change(content['state_dict'])
    torch.save(content, checkpoint)
    with pytest.raises(ValueError, match=message):
        export_student(cfg, checkpoint, tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


def test_export_says_what_is_missing(cfg: Config, checkpoint: str, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r'`checkpoint`.*none\.pth'):
        export_student(cfg, str(tmp_path / 'none.pth'), tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=r'`config`.*none\.py'):
        export_student(tmp_path / 'none.py', checkpoint, tmp_path / 'out')


WITHOUT_US = """
import json, sys
sys.modules['mmdistill_ext'] = None  # importing it fails
from mmseg.apis import MMSegInferencer, inference_model, init_model

config, weights, image = sys.argv[1:]
model = init_model(config, weights, device='cpu')
inferencer = MMSegInferencer(config, weights, device='cpu')
alone = MMSegInferencer(None, weights, device='cpu')
print(json.dumps(dict(
    model=inference_model(model, image).seg_logits.data.tolist(),
    inferencer=inferencer(image)['predictions'].tolist(),
    alone=alone(image)['predictions'].tolist(),
    classes=list(model.dataset_meta['classes']),
)))
"""


def test_mmseg_alone_predicts_the_same(cfg: Config, checkpoint: str, tmp_path: Path):
    image = np.random.default_rng(0).integers(0, 256, (32, 40, 3), np.uint8)
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    paths = map(str, export_student(cfg, checkpoint, tmp_path / 'out'))
    script = [sys.executable, '-c', WITHOUT_US, *paths, str(tmp_path / 'image.png')]
    run = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.strip().splitlines()[-1])

    model, _ = load_student(plain_config(cfg), checkpoint)
    with torch.no_grad():
        data = dict(inputs=[torch.from_numpy(image.transpose(2, 0, 1))], data_samples=None)
        inputs = model.data_preprocessor(data)['inputs']
        logits = model(inputs, mode='predict')[0].seg_logits.data
    assert torch.allclose(torch.tensor(found['model']), logits, atol=1e-5)
    labels = logits.argmax(0).tolist()
    assert found['inferencer'] == found['alone'] == labels
    assert tuple(found['classes']) == tiny_seg.CLASSES


@pytest.fixture
def together(tmp_path: Path) -> Config:
    """Networks that learn together, with everything in the config that names one of them."""
    cfg = tiny_seg.config(tmp_path / 'data', tmp_path / 'work')
    students = dict(a=tiny_seg.model(4), ab=tiny_seg.model(8))
    second = dict(type='MinLoss')
    cfg.model = dict(type='mmdistill_ext.CollaborativeDistiller', students=students, second=second)
    evaluator = dict(type='mmdistill_ext.NetworksEvaluator', metrics=cfg.val_evaluator)
    cfg.val_evaluator = cfg.test_evaluator = evaluator
    add_views(cfg.train_dataloader.dataset.pipeline, dict(a=[], ab=[]))
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='RepeatDataset', times=2, dataset=inner)
    cfg.custom_hooks = [
        dict(type='mmdistill_ext.CollaborationHook'),
        dict(type='EarlyStoppingHook', monitor='ab/mIoU'),
    ]
    cfg.custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
    return cfg


def test_plain_config_of_one_of_several_networks(together: Config, tmp_path: Path):
    assert plain_config(together) is together
    plain = plain_config(together, 'ab').to_dict()
    expected = tiny_seg.config(tmp_path / 'data', tmp_path / 'work').to_dict()
    inner = expected['train_dataloader']['dataset']
    expected['train_dataloader']['dataset'] = dict(type='RepeatDataset', times=2, dataset=inner)
    assert plain == {**expected, 'custom_hooks': [dict(type='EarlyStoppingHook', monitor='mIoU')]}
    assert together.custom_hooks[1].monitor == 'ab/mIoU'
    with pytest.raises(ValueError, match=r"`network` should be one of a, ab\. Found 'b'"):
        plain_config(together, 'b')


@pytest.mark.parametrize(
    ('hook', 'expected'),
    [
        (dict(save_best='ab/mIoU'), dict(save_best='mIoU')),
        (dict(save_best='ensemble/coco/bbox_mAP'), dict(save_best='coco/bbox_mAP')),
        (dict(save_best='auto'), dict(save_best='auto')),
        (dict(save_best='coco/bbox_mAP'), dict(save_best='coco/bbox_mAP')),
        (dict(save_best=['a/mIoU', 'ab/mIoU']), dict(save_best=['mIoU'])),
        (
            dict(save_best=['ab/x', 'a/y', 'ensemble/x'], rule=['less', 'greater', 'less']),
            dict(save_best=['x', 'y'], rule=['less', 'greater']),
        ),
        (
            dict(save_best=['a/mIoU', 'ab/mAcc'], rule='greater'),
            dict(save_best=['mIoU', 'mAcc'], rule='greater'),
        ),
    ],
)
def test_plain_config_names_the_best_by_the_plain_metric(together: Config, hook, expected):
    together.default_hooks.checkpoint = dict(type='CheckpointHook', **hook)
    plain = plain_config(together, 'a').default_hooks.checkpoint.to_dict()
    assert plain == dict(type='CheckpointHook', **expected)


def test_plain_config_has_the_networks_own_optimizer_and_schedule(together: Config):
    wrappers = {n: dict(optimizer=dict(type='SGD', lr=lr)) for n, lr in (('a', 0.1), ('ab', 0.2))}
    constructor = dict(constructor='mmdistill_ext.PerNetworkOptimWrapperConstructor')
    together.optim_wrapper = dict(**constructor, **wrappers)
    plateau = dict(type='ReduceOnPlateauLR', monitor='ab/mIoU')
    together.param_scheduler = dict(a=[dict(type='PolyLR')], ab=[plateau])
    plain = plain_config(together, 'ab')
    assert plain.optim_wrapper.to_dict() == wrappers['ab']
    assert plain.param_scheduler[0].to_dict() == {**plateau, 'monitor': 'mIoU'}
    together.param_scheduler = [dict(type='PolyLR')]
    assert plain_config(together, 'a').param_scheduler[0].type == 'PolyLR'


def test_plain_config_has_the_networks_share_of_one_optimizer(together: Config):
    keys = {
        'students.a': dict(lr_mult=2.0),
        'students.ab.backbone': dict(lr_mult=0.1),
        'students.ab.decode_head.': dict(lr_mult=10.0),
        'norm': dict(decay_mult=0.0),
    }
    together.optim_wrapper.paramwise_cfg = dict(custom_keys=keys)
    together.optim_wrapper.optimizer.weight_decay = 0.01
    found = [plain_config(together, n).optim_wrapper.paramwise_cfg.custom_keys for n in ('a', 'ab')]
    assert found[0].to_dict() == {'': dict(lr_mult=2.0), 'norm': dict(decay_mult=0.0)}
    assert found[1].to_dict() == {
        'backbone': dict(lr_mult=0.1),
        'decode_head.': dict(lr_mult=10.0),
        'norm': dict(decay_mult=0.0),
    }
    assert together.optim_wrapper.paramwise_cfg.custom_keys.to_dict() == keys
    plain = plain_config(together, 'a')
    model = build_model({'_scope_': 'mmseg', **plain.model})
    assert set(build_optim_wrapper(model, plain.optim_wrapper).get_lr()['lr']) == {0.2}


@pytest.fixture
def shared(together: Config, tmp_path: Path) -> str:
    """What a run of both leaves."""
    networks = {name: build_model({'_scope_': 'mmseg', **x}) for name, x in students(together)}
    state = {
        f'students.{name}.{key}': value
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
    path = str(tmp_path / 'iter_4.pth')
    torch.save(dict(state_dict={**state, 'weights': torch.ones(2) / 2}, meta=dict(iter=4)), path)
    return path


def students(cfg: Config) -> list:
    return list(cfg.model.students.to_dict().items())


def test_networks_whose_names_begin_alike_are_kept_apart(together, shared, tmp_path):
    whole = torch.load(shared, weights_only=True)['state_dict']
    for name, _ in students(together):
        _, path = export_student(together, shared, tmp_path / name, name)
        alone = torch.load(path, weights_only=True)['state_dict']
        assert len(alone) > 50
        assert all(torch.equal(whole[f'students.{name}.{key}'], alone[key]) for key in alone)


def write_scores(folder: Path, **best: str | None) -> None:
    entries = {iteration.strip('_'): dict(best=name) for iteration, name in best.items()}
    (folder / 'networks.json').write_text(json.dumps(entries))


def test_the_best_is_that_of_the_last_validation_until_then(together, shared, tmp_path):
    sizes = {}
    for best, entries in (
        ('a', dict(_2='ab', _4='a', _6='ab')),
        ('ab', dict(_2='ab', _4=None, _10='a')),
        ('ab', dict(_3='ab', _30='a')),
    ):
        write_scores(tmp_path, **entries)
        _, path = export_student(together, shared, tmp_path / 'out', 'best')
        sizes.setdefault(best, set()).add(path.stat().st_size)
    assert len(sizes['a']) == len(sizes['ab']) == 1
    assert sizes['a'] != sizes['ab']


def test_an_export_of_several_says_what_is_missing(together, shared, cfg, checkpoint, tmp_path):
    with pytest.raises(ValueError, match=r'`network` should be one of a, ab, or best\. Found none'):
        export_student(together, shared, tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=r"'best' needs.*networks\.json.*name a network"):
        export_student(together, shared, tmp_path / 'out', 'best')
    write_scores(tmp_path, _6='a')
    with pytest.raises(ValueError, match=r"before the checkpoint's iteration 4.*\['6'\]"):
        export_student(together, shared, tmp_path / 'out', 'best')
    with pytest.raises(ValueError, match=r"`network` should be one of those in `checkpoint`.*'a'"):
        export_student(together, checkpoint, tmp_path / 'out', 'a')
    with pytest.raises(ValueError, match=r"`network` should be one of those in `checkpoint`.*'a'"):
        export_student(cfg, checkpoint, tmp_path / 'out', 'a')
    assert not (tmp_path / 'out').exists()


def test_the_tools_say_that_they_need_one_network(together, shared, tmp_path, capsys):
    path = tmp_path / 'run.py'
    together.dump(path)
    with pytest.raises(ValueError, match=r'`--network` should be one of a, ab\. Found none'):
        tiny_seg.tool('print_config')(path, '--plain')
    tiny_seg.tool('print_config')(path, '--plain', '--network', 'a')
    assert 'mmdistill_ext' not in capsys.readouterr().out
    for option in (['--out', tmp_path / 'out'], ['--tta']):
        with pytest.raises(ValueError, match=rf'`{option[0]}`.* export a network first'):
            tiny_seg.tool('test')(path, shared, '--work-dir', tmp_path / 'work', *option)
