"""Pictures of label, student and teacher while validating."""

import random
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer

from mmdistill_ext.hooks.box_comparison_hook import (
    BoxComparisonHook,
    check_samples,
    predict_as_teacher,
)
from mmdistill_ext.visualization.boxes import GAP
from tests import tiny_det, tiny_seg
from tests.runs import assert_identical
from tests.tiny_boxes import BOXES, META, SIZES, config

SCORE_THR = 0.5
PANELS = ('label', 'student', 'teacher')


def build_runner(root: Path, hook: dict | None = None, **options: object) -> Runner:
    tiny_seg.forget_runs()
    cfg = config(root, hook)
    cfg.merge_from_dict(options)
    return Runner.from_cfg(cfg)


class Keep(Hook):
    """Keeps what the student predicts, batch by batch."""

    def __init__(self) -> None:
        self.outputs = []

    def after_val_iter(self, runner, batch_idx, data_batch=None, outputs=None) -> None:
        self.outputs.append(outputs)


class Teachers:
    """Notes what state the teacher predicts in."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.calls = []
        self.teacher = model.distillation.teacher.model
        self.forward, self.teacher.forward = self.teacher.forward, self.note

    def note(self, *args: object, mode: str = 'tensor', **kwargs: object):
        if mode == 'predict':
            self.calls.append((self.teacher.training, torch.is_grad_enabled()))
        return self.forward(*args, mode=mode, **kwargs)


def draw(image: np.ndarray, kind: str, instances: InstanceData) -> np.ndarray:
    """Draw with mmdet alone."""
    visualizer = DetLocalVisualizer()
    visualizer.dataset_meta = META
    kwargs = dict(draw_gt=kind == 'gt', draw_pred=kind == 'pred', pred_score_thr=SCORE_THR)
    sample = DetDataSample(**{f'{kind}_instances': instances})
    visualizer.add_datasample('x', image, sample, **kwargs)
    return visualizer.get_image()


def split(picture: np.ndarray, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the three panels of a picture, captions and gaps cut off."""
    height, width = size
    return {
        name: picture[-height:, i * (width + GAP) :][:, :width] for i, name in enumerate(PANELS)
    }


def read(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


def written(runner: Runner) -> list[str]:
    folder = Path(runner.log_dir, 'vis_data/boxes')
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*.*'))


def test_a_run_shows_label_student_and_teacher(tmp_path: Path):
    """Every panel is what mmdet draws of the labels in the file, or of the predictions."""
    runner = build_runner(tmp_path / 'data', dict(score_thr=SCORE_THR))
    keep = Keep()
    runner.register_hook(keep)
    runner.train()

    steps = [f'iter_{n}/{i}_cells{i}.png' for n in (1, 2) for i in range(4)]
    assert written(runner) == steps
    model = runner.model
    model.eval()
    with torch.no_grad():
        batches = list(runner.val_dataloader)
        taught = [x for batch in batches for x in model.distillation.teacher.model.val_step(batch)]
    learned = [sample for outputs in keep.outputs[2:] for sample in outputs]
    drawn = dict(student=0, teacher=0)
    for i, size in enumerate(SIZES):
        image = read(tmp_path / f'data/img/cells{i}.png')
        picture = read(Path(runner.log_dir, f'vis_data/boxes/iter_2/{i}_cells{i}.png'))
        assert picture.shape == (size[0] + 16, 3 * size[1] + 2 * GAP, 3)
        assert np.array_equal(
            picture, read(Path(runner.log_dir, f'vis_data/vis_image/boxes_{i}_2.png'))
        )
        label = InstanceData(
            bboxes=torch.tensor([[x, y, x + w, y + h] for x, y, w, h in BOXES[i]]).reshape(-1, 4),
            labels=torch.arange(len(BOXES[i])),
        )
        panels = split(picture, size)
        assert np.array_equal(panels['label'], draw(image, 'gt', label))
        for name, found in (('student', learned[i]), ('teacher', taught[i])):
            assert np.array_equal(panels[name], draw(image, 'pred', found.pred_instances))
            drawn[name] += int((found.pred_instances.scores > SCORE_THR).sum())
        assert not np.array_equal(panels['student'], panels['teacher'])
    assert min(drawn.values()) > 0


def test_label_panel_differs_from_the_image_where_the_box_is(tmp_path: Path):
    """Nothing is drawn without a box, nor of predictions below the threshold."""
    runner = build_runner(tmp_path / 'data', dict(max_images=3, score_thr=1))
    runner.train()
    folder = Path(runner.log_dir, 'vis_data/boxes/iter_1')
    image = read(tmp_path / 'data/img/cells1.png')
    panels = split(read(folder / '1_cells1.png'), SIZES[1])
    assert np.array_equal(panels['student'], image)
    assert np.array_equal(panels['teacher'], image)
    changed = (panels['label'] != image).any(2)
    x, y, width, height = BOXES[1][0]
    for edge in (
        changed[y, x : x + width],
        changed[y + height, x : x + width],
        changed[y : y + height, x],
        changed[y : y + height, x + width],
    ):
        assert edge.all()
    changed[y - 3 : y + height + 3, x - 3 : x + width + 3] = False
    assert not changed.any()
    empty = split(read(folder / '2_cells2.png'), SIZES[2])['label']
    assert np.array_equal(empty, read(tmp_path / 'data/img/cells2.png'))


def test_captions_name_the_panels(tmp_path: Path):
    """The strips hold three different texts and nothing outside the panels."""
    runner = build_runner(tmp_path / 'data', dict(max_images=1))
    runner.train()
    picture = read(Path(runner.log_dir, 'vis_data/boxes/iter_1/0_cells0.png'))
    height, width = SIZES[0]
    strips = [picture[:-height, i * (width + GAP) :][:, :width] for i in range(3)]
    ink = [np.argwhere(strip.min(2) < 128) for strip in strips]
    assert len({len(points) for points in ink}) == 3
    for points in ink:
        assert len(points) > 10
        assert points.max(0)[1] < width - 2
    for i in (1, 2):
        assert (picture[:, i * width + (i - 1) * GAP :][:, :GAP] == 255).all()


@pytest.mark.parametrize(
    ('arguments', 'names', 'calls'),
    [
        (dict(interval=3), ['0_cells0', '1_cells3'], 2),
        (dict(max_images=2), ['0_cells0', '1_cells1'], 1),
        (dict(interval=2, max_images=1), ['0_cells0'], 1),
        (dict(interval=5), ['0_cells0'], 1),
    ],
)
def test_teacher_runs_for_batches_with_an_image_to_draw_only(tmp_path, arguments, names, calls):
    runner = build_runner(tmp_path / 'data', arguments)
    teachers = Teachers(runner.model)
    runner.train()
    assert teachers.calls == [(False, False)] * (calls * 2 + 1)  # once before the start
    assert written(runner) == [f'iter_{n}/{name}.png' for n in (1, 2) for name in names]


def test_training_is_bit_identical_with_and_without_the_hook(tmp_path: Path):
    """So are the student's boxes and the random numbers, though mmdet draws masks with some."""
    kept = []
    for name, hook in (('with', dict(score_thr=SCORE_THR)), ('without', None)):
        options = {'val_dataloader.dataset.pipeline.2.with_mask': True}
        options['work_dir'] = str(tmp_path / name)
        runner = build_runner(tmp_path / 'data', hook, **options)
        keep = Keep()
        runner.register_hook(keep, priority='LOWEST')
        runner.train()
        found = [sample.pred_instances for outputs in keep.outputs for sample in outputs]
        kept.append(
            dict(
                checkpoint=torch.load(tmp_path / name / 'iter_2.pth', weights_only=False),
                boxes=torch.cat([instances.bboxes for instances in found]),
                scores=torch.cat([instances.scores for instances in found]),
                random=(torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()),
            )
        )
        if hook:
            picture = read(Path(runner.log_dir, 'vis_data/boxes/iter_2/1_cells1.png'))
            inside = split(picture, SIZES[1])['label'][40:55, 50:75]
            assert inside.std((0, 1)).max() < 8  # the mask covers most of the noise
    first, second = kept
    for part in ('state_dict', 'optimizer'):
        assert_identical(first['checkpoint'][part], second['checkpoint'][part])
    assert len(first['boxes']) > 8
    assert torch.equal(first['boxes'], second['boxes'])
    assert torch.equal(first['scores'], second['scores'])
    assert first['random'] == second['random']


def test_the_runs_own_visualizer_is_left_alone(tmp_path: Path):
    runner = build_runner(tmp_path / 'data', dict())
    hook = next(hook for hook in runner.hooks if isinstance(hook, BoxComparisonHook))
    names = list(Visualizer._instance_dict), list(DetLocalVisualizer._instance_dict)
    runner.train()
    assert (list(Visualizer._instance_dict), list(DetLocalVisualizer._instance_dict)) == names
    assert Visualizer.get_current_instance() is runner.visualizer
    assert hook.visualizer is not runner.visualizer
    assert hook.visualizer.dataset_meta['classes'] == tiny_det.CLASSES


def test_validation_without_training_is_shown_too(tmp_path: Path):
    runner = build_runner(tmp_path / 'data', dict(max_images=1))
    runner.val()
    assert written(runner) == ['iter_0/0_cells0.png']


def test_teacher_without_a_preprocessor_gets_the_students_input(tmp_path: Path):
    runner = build_runner(tmp_path / 'data')
    batch = next(iter(runner.val_dataloader))
    model = runner.model.eval()
    expected = predict_as_teacher(model, batch)
    bare = build_runner(tmp_path / 'data', **{'model.teacher.model.data_preprocessor': None})
    found = predict_as_teacher(bare.model.eval(), batch)
    for one, other in zip(expected, found, strict=True):
        assert len(one.pred_instances) > 0
        assert torch.equal(one.pred_instances.bboxes, other.pred_instances.bboxes)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(interval=0), r'interval` should be an integer >= 1\. Found 0'),
        (dict(interval=1.5), r'interval` should be an integer\. Found 1\.5'),
        (dict(max_images=0), r'max_images` should be an integer >= 1\. Found 0'),
        (dict(score_thr=1.5), r'score_thr` should be in \[0, 1\]\. Found 1\.5'),
        (dict(score_thr=float('nan')), r'score_thr` should be in \[0, 1\]\. Found nan'),
        (dict(score_thr=None), r'score_thr` should be a number\. Found None'),
    ],
)
def test_arguments_are_checked(arguments: dict, message: str):
    with pytest.raises(ValueError, match=r'`BoxComparisonHook\.' + message):
        BoxComparisonHook(**arguments)


def test_model_without_a_teacher_is_refused(tmp_path: Path):
    cfg = config(tmp_path / 'data', dict())
    cfg.model = cfg.model.student
    tiny_seg.forget_runs()
    with pytest.raises(ValueError, match='needs a detector with a teacher.*Found RetinaNet'):
        Runner.from_cfg(cfg).train()


def test_segmentor_is_refused(tmp_path: Path):
    tiny_seg.forget_runs()
    tiny_seg.write_data(tmp_path, 'train')
    tiny_seg.write_data(tmp_path, 'val')
    weights = tiny_seg.save_weights(tmp_path / 't.pth', tiny_seg.model(16), seed=1)
    hook = dict(type='mmdistill_ext.BoxComparisonHook')
    cfg = tiny_seg.distil(tiny_seg.config(tmp_path, tmp_path / 'work'), weights, boxes=hook)
    with pytest.raises(ValueError, match='needs a detector.*Found DistilledEncoderDecoder'):
        Runner.from_cfg(cfg).train()


def test_run_without_validation_is_refused(tmp_path: Path):
    none = dict(val_dataloader=None, val_evaluator=None, val_cfg=None)
    runner = build_runner(tmp_path / 'data', dict(), **none)
    with pytest.raises(ValueError, match='needs a `val_dataloader`. Found none'):
        runner.train()


def test_labels_that_are_resized_are_refused(tmp_path: Path):
    """They would be drawn in the wrong place: predictions are of the original image's size."""
    runner = build_runner(tmp_path / 'data', dict())
    steps = runner.val_dataloader.dataset.pipeline.transforms
    check_samples(runner.val_dataloader.dataset)
    steps[1:3] = steps[2:0:-1]
    with pytest.raises(ValueError, match=r'after Resize.*LoadAnnotations.*Resize'):
        runner.train()


def test_samples_without_the_images_path_are_refused(tmp_path: Path):
    keys = ('img_id', 'ori_shape', 'img_shape', 'scale_factor')
    options = {'val_dataloader.dataset.pipeline.3.meta_keys': keys}
    runner = build_runner(tmp_path / 'data', dict(), **options)
    with pytest.raises(ValueError, match=r"should pack 'img_path'.*Found \[.*'img_id'"):
        runner.train()


def test_hooks_are_imported_where_there_is_no_mmdet():
    code = (
        'import sys; sys.modules["mmdet"] = sys.modules["mmcv"] = None\n'
        'import mmdistill_ext.hooks as hooks; hooks.BoxComparisonHook()'
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, '-c', code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
