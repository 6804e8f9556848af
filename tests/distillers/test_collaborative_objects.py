"""Several two-stage detectors, or several with queries, that teach each other."""

import copy

import pytest
import torch

from mmdistill_ext.distillers import CollaborativeDistiller
from mmdistill_ext.functional import min_loss, unit_difference, unit_distillation
from mmdistill_ext.taps import Taps
from tests import tiny_zoo
from tests.tiny_networks import MIN_LOSS, gradients

ROIS = ('faster cascade', 'cascade mask faster', 'mask seesaw', 'htc scnet', 'sabl double')
QUERIES = ('detr detr', 'dino deformable', 'sparse dino', 'ddq two_stage')
SEED = 3


def distiller(names, **options):
    """Networks with varied weights in training mode; nothing is dropped."""
    students = {
        f'n{place}': {'_scope_': 'mmdet', **tiny_zoo.config(name)}
        for place, name in enumerate(names.split())
    }
    options.setdefault('second', MIN_LOSS)
    model = CollaborativeDistiller(students, **options)
    for place, network in enumerate(model.students.values()):
        torch.manual_seed(place)
        tiny_zoo.vary(network)
        tiny_zoo.calm(network)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def batch(model, boxes=True):
    return model.data_preprocessor(tiny_zoo.raw(boxes), True)


def step(model, data):
    torch.manual_seed(SEED)
    return model(**copy.deepcopy(data), mode='loss')


def last(head):
    return head[-1] if isinstance(head, torch.nn.ModuleList) else head


def on_rois(network, images, rois):
    """Scores and boxes of a network's last box head on given RoIs, as when it predicts."""
    roi_head = network.roi_head
    features = network.extract_feat(images)
    context = {}
    if getattr(roi_head, 'with_semantic', False):
        context['semantic_feat'] = roi_head.semantic_head(features)[1]
    if getattr(roi_head, 'with_glbctx', False):
        context['glbctx_feat'] = roi_head.glbctx_head(features)[1]
    stage = (-1,) if isinstance(roi_head.bbox_head, torch.nn.ModuleList) else ()
    found = roi_head._bbox_forward(*stage, features, rois, **context)
    scores = found['cls_score']
    if getattr(last(roi_head.bbox_head), 'custom_activation', False):
        scores = last(roi_head.bbox_head).loss_cls.get_activation(scores).log()
    return scores


def joint_of_rois(networks, data):
    """Logits of all networks for the first one's sampled RoIs, ``(N, 1, C, n)``, and labels."""
    (name, lead), *others = networks.items()
    stages = lead.roi_head.bbox_head
    path = 'roi_head.bbox_head'
    path += f'.{len(stages) - 1}' if isinstance(stages, torch.nn.ModuleList) else ''
    torch.manual_seed(SEED)
    with Taps(lead, dict(own=f'{path}.loss')) as taps:
        lead(data['inputs'][name], copy.deepcopy(data['data_samples'][name]), mode='loss')
        scores, _, rois, labels, weights = taps['own'].args[:5]
    assert (weights > 0).all()
    logits = [scores, *(on_rois(x, data['inputs'][key], rois) for key, x in others)]
    return torch.stack(logits).transpose(1, 2).unsqueeze(1), labels[None]


def matched(network, images, samples):
    """Scores of the query of every object, ``(G, C)``, by mmdet's own targets."""
    torch.manual_seed(SEED)
    samples = copy.deepcopy(samples)
    if hasattr(network, 'roi_head'):
        with Taps(network, dict(own='roi_head.bbox_head.1.loss_and_target')) as taps:
            network(images, samples, mode='loss')
            scores, _, results = taps['own'].args[:3]
        scores = scores.unflatten(0, (len(samples), -1))
        pairs = [(r.pos_assigned_gt_inds, r.pos_inds) for r in results]
        picked = [
            s[queries[objects.argsort()]]
            for s, (objects, queries) in zip(scores, pairs, strict=True)
        ]
        return torch.cat(picked)
    head = network.bbox_head
    layers = 2
    with Taps(network, dict(one='bbox_head._get_targets_single')) as taps:
        network(images, samples, mode='loss')
        calls = taps.all('one')[(layers - 1) * len(samples) :][: len(samples)]
    picked = []
    for call, sample in zip(calls, samples, strict=True):
        scores, queries = call.args[0], call.output[4]
        boxes, truth = call.output[2][queries], sample.gt_instances.bboxes
        sizes = torch.tensor(sample.img_shape[::-1]).repeat(2)
        centres = (truth[:, :2] + truth[:, 2:]) / 2 / sizes[:2]
        order = torch.cdist(centres, boxes[:, :2]).argmin(1) if len(truth) else queries
        picked.append(scores[queries[order]])
    assert head.num_classes == 3
    return torch.cat(picked)


def joint_of_queries(networks, data):
    """Logits of all networks' queries of all objects, ``(N, 1, C, G)``, and labels."""
    logits = [
        matched(network, data['inputs'][name], data['data_samples'][name])
        for name, network in networks.items()
    ]
    samples = next(iter(data['data_samples'].values()))
    labels = torch.cat([sample.gt_instances.labels for sample in samples])
    return torch.stack(logits).transpose(1, 2).unsqueeze(1), labels[None]


@pytest.mark.parametrize('names', [*ROIS, *QUERIES])
def test_losses_equal_those_of_the_networks_run_alone(names):
    model = distiller(names, second_weight=0.5, kl=dict(weight=0.3, temperature=2.0))
    networks, data = copy.deepcopy(dict(model.students.items())), batch(model)
    losses = step(model, data)
    joint = joint_of_rois if names in ROIS else joint_of_queries
    logits, labels = joint(networks, data)
    sigmoid = names in QUERIES and 'detr detr' not in names
    kinds = ('bce', 'bce') if sigmoid else ('ce', 'kl')
    mixture = min_loss(logits, labels, difference=kinds[0], ignore_index=-1, background=sigmoid)
    positive = (labels < 3).sum()
    assert positive > 2
    second = unit_difference(mixture, labels, kinds[0], -1, sigmoid).sum()
    expected = {'ensemble/loss': 0.5 * second / positive}
    for name, own in zip(networks, logits, strict=True):
        pull = unit_distillation(own, mixture.detach(), kinds[1], 2.0).sum()
        expected[f'{name}/loss_kl'] = 0.3 * pull / positive
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-4, atol=1e-5)
    total = sum(losses[name] for name in expected)
    own, other = (
        [p for network in x.values() for p in network.parameters() if p.requires_grad]
        for x in (model.students, networks)
    )
    found = torch.autograd.grad(total, own, allow_unused=True)
    wanted = torch.autograd.grad(sum(expected.values()), other, allow_unused=True)
    learning = 0
    for own, other in zip(found, wanted, strict=True):
        assert (own is None) == (other is None)
        if own is not None:
            learning += 1
            torch.testing.assert_close(own, other, rtol=1e-3, atol=2e-4)
    assert learning > 20


@pytest.mark.parametrize('names', ['cascade mask', 'sabl faster', 'dino sparse', 'detr detr'])
@pytest.mark.parametrize('boxes', [True, False])
def test_boxes_have_a_second_prediction_too(names, boxes):
    model = distiller(names, box=dict(distance='iou'))
    losses = step(model, batch(model, boxes))
    assert (losses['ensemble/loss_box'] > 0) == boxes
    pulls = [losses[f'{name}/loss_kl_box'] for name in model.names]  # 0 for the best network
    assert (max(pulls) > 0) == boxes
    found = gradients(model, losses)
    assert all(g.isfinite().all() for g in found.values() if g is not None)
    assert any(g is not None and g.abs().sum() > 0 for g in found.values())


@pytest.mark.parametrize('names', ['cascade mask', 'dino deformable'])
def test_activations_may_be_recomputed(names):
    model = distiller(names)
    data, found = batch(model), []
    for model.sequential_backward in (False, True):
        losses = step(model, data)
        found.append((losses, gradients(model, losses)))
    for first, second in zip(*found, strict=True):
        assert first.keys() == second.keys()
        for key, value in first.items():
            torch.testing.assert_close(value, second[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('names', ['htc mask', 'dino ddq', 'sparse deformable'])
def test_errors_are_measured_without_leaving_a_trace(names):
    model = distiller(names)
    step(model, batch(model))  # DDQ gets a part of its state then
    model.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = model.error_correlation(tiny_zoo.raw())
    assert found.shape == (2, 2)
    assert torch.linalg.eigvalsh(found).min() >= 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize('names', ['cascade faster', 'mask scoring', 'dino deformable'])
def test_they_predict_by_the_boxes_of_all(names):
    model = distiller(names).eval()
    found = model.val_step(tiny_zoo.raw())
    assert len(found) == 3
    for sample in found:
        each = [x.pred_instances for x in sample.networks.values()]
        merged = sample.pred_instances
        assert 0 < len(merged) <= sum(map(len, each))
        boxes = torch.cat([x.bboxes for x in each]).tolist()
        places = [boxes.index(box) for box in merged.bboxes.tolist()]
        if 'mask' in names:
            masks = torch.cat([x.masks for x in each])
            assert torch.equal(merged.masks, masks[places])
        assert merged.scores.max() == torch.cat([x.scores for x in each]).max()
        assert (merged.scores.diff() <= 0).all()


@pytest.mark.parametrize(
    ('names', 'options', 'message'),
    [
        ('faster dino', {}, '`students` should all be .* of one kind: .*RoIs with RoIs'),
        ('detr dino', {}, 'The networks should have both sigmoid or both softmax'),
        ('faster crowd', {}, '`students.n1` should lead to .*MultiInstanceBBoxHead'),
        ('panoptic panoptic', {}, '`students.n0` should predict boxes: .*PanopticFPN'),
        ('grid faster', dict(box=dict(distance='iou')), '`box` needs networks whose heads all'),
    ],
)
def test_what_cannot_be_joined(names, options, message):
    with pytest.raises(ValueError, match=message):
        distiller(names, **options)


@pytest.mark.parametrize('names', ['faster faster', 'dino dino'])
def test_networks_of_other_classes(names):
    students = {f'n{i}': tiny_zoo.config(name) for i, name in enumerate(names.split())}
    tiny_zoo._shrink(students['n1'], dict(num_classes=4))
    students = {name: {'_scope_': 'mmdet', **cfg} for name, cfg in students.items()}
    with pytest.raises(ValueError, match='same `num_classes`.*Found 3 in .*, 4 in '):
        CollaborativeDistiller(students, MIN_LOSS)
