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

from mmdistill_ext.distillers.build import build_model
from mmdistill_ext.export import export_student, load_student, plain_config
from tests import tiny_seg


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
