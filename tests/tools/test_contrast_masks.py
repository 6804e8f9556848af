"""What the tool compares: the heads that a loss names, binary ones, of different activations."""

import copy
import json

import cv2
import numpy as np
import pytest
import torch

from tests import tiny_seg
from tests.tiny_seg import tool

BCE = dict(type='CrossEntropyLoss', use_sigmoid=True)
ONE = dict(num_classes=1, loss_decode=BCE)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    """Two images with labels 0 and 1 and ignored ones: in the upper half 1, below 0."""
    root = tmp_path_factory.mktemp('data')
    for folder in ('img', 'ann'):
        (root / folder / 'val').mkdir(parents=True)
    label = np.zeros((32, 40), np.uint8)
    label[:16], label[:, :4] = 1, 255
    for i in range(2):
        image = np.random.default_rng(i).integers(0, 256, (32, 40, 3), np.uint8)
        cv2.imwrite(str(root / f'img/val/{i}.png'), image)
        cv2.imwrite(str(root / f'ann/val/{i}.png'), label)
    return root


def model(channels, **head):
    cfg = tiny_seg.model(channels, num_classes=2)
    cfg['decode_head'].update(head)
    cfg['auxiliary_head'] = copy.deepcopy(cfg['decode_head'])
    return cfg


def constant(path, cfg, **biases):
    """Save weights with which a head gives the same logits everywhere."""
    tiny_seg.save_weights(path, cfg, seed=0)
    loaded = torch.load(path, weights_only=True)
    for head, bias in biases.items():
        loaded['state_dict'][f'{head}.conv_seg.weight'].zero_()
        loaded['state_dict'][f'{head}.conv_seg.bias'].copy_(torch.tensor(bias))
    torch.save(loaded, path)
    return str(path)


def compare(data, folder, student, teacher, losses, *options, classes=('back', 'front')):
    """Run the tool; both are (model, biases)."""
    cfg = tiny_seg.config(data, folder)
    cfg.val_dataloader.dataset.metainfo = dict(classes=classes, palette=[[0, 0, 0]] * len(classes))
    saved = [
        constant(folder / f'{i}.pth', *x[:1], **x[1]) for i, x in enumerate((student, teacher))
    ]
    cfg.model = dict(
        type='mmdistill_ext.TeacherStudentDistiller',
        student=student[0],
        teacher=dict(model=teacher[0], checkpoint=saved[1]),
        losses=losses,
    )
    cfg.custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
    cfg.dump(folder / 'run.py')
    tool('contrast_masks')(folder / 'run.py', saved[0], folder / 'out', *options)
    summary = json.loads((folder / 'out/summary.json').read_text())
    return summary, cv2.imread(str(folder / 'out/masks/0.png'), cv2.IMREAD_UNCHANGED)


KD = dict(kd=dict(type='KDLoss'))


@pytest.mark.parametrize(('student', 'teacher'), [(1.0, 2.0), (-40.0, 40.0), (40.0, -40.0)])
def test_one_channel_however_certain(data, tmp_path, student, teacher):
    """Who is surer of 1 wins where the label is 1, and loses where it is 0."""
    better = teacher > student
    two = ((model(c, **ONE), dict(decode_head=[x])) for c, x in ((8, student), (16, teacher)))
    summary, mask = compare(data, tmp_path, *two, KD, classes=('road',))
    assert np.unique(mask[:16, 4:]).tolist() == [255 * better]
    assert np.unique(mask[16:, 4:]).tolist() == [255 * (not better)]
    assert np.unique(mask[:, :4]).tolist() == [128]
    assert summary['difference'] == 'bce'
    shares = {name: row['teacher_better'] for name, row in summary['classes'].items()}
    assert shares == dict(background=float(not better), road=float(better))


def test_the_heads_that_the_loss_names(data, tmp_path):
    """The main heads are equal; the auxiliary one of the student is worse where the label is 1."""
    cfg, other = model(8), model(16)
    same = dict(decode_head=[0.0, 1.0])
    losses = dict(
        a=dict(type='KDLoss'),
        cwd=dict(type='CWDLoss', tap='backbone.3', connector=dict(type='Conv1x1')),
        b=dict(type='KDLoss', head='auxiliary_head', difference='ce'),
    )
    two = (cfg, dict(same, auxiliary_head=[1.0, 0.0])), (other, same)
    summary, mask = compare(data, tmp_path, *two, losses, '--loss', 'b')
    assert summary['loss'] == 'b'
    assert summary['heads'] == ['auxiliary_head', 'decode_head']
    assert np.unique(mask[:16, 4:]).tolist() == [255]
    assert np.unique(mask[16:, 4:]).tolist() == [0]
    summary, mask = compare(data, tmp_path, *two, losses)
    assert (summary['loss'], summary['heads']) == ('a', ['decode_head', 'decode_head'])
    assert np.unique(mask[:, 4:]).tolist() == [0]
    with pytest.raises(ValueError, match=r"`--loss` .*\['a', 'b'\]. Found 'cwd'"):
        compare(data, tmp_path, *two, losses, '--loss', 'cwd')


def test_a_softmax_teacher_of_a_sigmoid(data, tmp_path):
    """Its probability of 1 is 0.73, more than the student's 0.69, though its logits are lower."""
    student = model(8, num_classes=2, out_channels=1, loss_decode=BCE), dict(decode_head=[0.8])
    teacher = model(16), dict(decode_head=[-5.0, -4.0])
    summary, mask = compare(data, tmp_path, student, teacher, KD)
    assert np.unique(mask[:16, 4:]).tolist() == [255]
    assert np.unique(mask[16:, 4:]).tolist() == [0]
    assert summary['difference'] == 'bce'
