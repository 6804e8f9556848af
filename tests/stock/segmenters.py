"""One stock config of mmseg for each folder of its configs, shrunk until a step takes a moment."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from unittest import mock

import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg
from mmdistill_ext.distillers.collaborative import CollaborativeDistiller
from mmdistill_ext.distillers.teacher_student import build_teacher_student
from mmdistill_ext.units.features import probe
from mmdistill_ext.units.pairing import pair_heads

# Every number of channels is divided by the same factor, so that those which belong together stay
# together: by the first for the student, by the second for its teacher.
CONFIGS = {
    'ann/ann_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'apcnet/apcnet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'beit/beit-base_upernet_8xb2-160k_ade20k-640x640': (32, 16),
    'bisenetv1/bisenetv1_r18-d32_4xb4-160k_cityscapes-1024x1024': (8, 4),
    'bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024': (4, 2),
    'ccnet/ccnet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'cgnet/cgnet_fcn_4xb8-60k_cityscapes-512x1024': (2, 1),
    'danet/danet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024': (8, 4),
    'deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'dmnet/dmnet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'dnlnet/dnl_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512': (32, 16),
    'emanet/emanet_r50-d8_4xb2-80k_cityscapes-512x1024': (32, 16),
    'encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'erfnet/erfnet_fcn_4xb4-160k_cityscapes-512x1024': (2, 1),
    'fastfcn/fastfcn_r50-d32_jpu_psp_4xb2-80k_cityscapes-512x1024': (32, 16),
    'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024': (4, 2),
    'fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'gcnet/gcnet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'hrnet/fcn_hr18_4xb2-40k_cityscapes-512x1024': (6, 3),
    'icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832': (8, 4),
    'isanet/isanet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'knet/knet-s3_r50-d8_fcn_8xb2-adamw-80k_ade20k-512x512': (16, 8),
    'mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512': (32, 16),
    'mask2former/mask2former_r50_8xb2-160k_ade20k-512x512': (16, 8),
    'maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512': (16, 8),
    'mobilenet_v2/mobilenet-v2-d8_fcn_4xb2-80k_cityscapes-512x1024': (1, 1),
    'mobilenet_v3/mobilenet-v3-d8-s_lraspp_4xb4-320k_cityscapes-512x1024': (1, 1),
    'nonlocal_net/nonlocal_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'ocrnet/ocrnet_hr18_4xb2-40k_cityscapes-512x1024': (6, 3),
    'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes': (8, 4),
    'point_rend/pointrend_r50_4xb2-80k_cityscapes-512x1024': (32, 16),
    'psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024': (32, 16),
    'resnest/resnest_s101-d8_fcn_4xb2-80k_cityscapes-512x1024': (16, 8),
    'san/san-vit-b16_coco-stuff164k-640x640': (8, 4),
    'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024': (4, 2),
    'segmenter/segmenter_vit-s_mask_8xb1-160k_ade20k-512x512': (16, 8),
    'segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512': (4, 2),
    'sem_fpn/fpn_r50_4xb2-80k_cityscapes-512x1024': (32, 16),
    'setr/setr_vit-l_mla_8xb1-80k_cityscapes-768x768': (32, 16),
    'stdc/stdc1_4xb12-80k_cityscapes-512x1024': (8, 4),
    'swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512': (8, 4),
    'twins/twins_pcpvt-s_fpn_fpnhead_8xb4-80k_ade20k-512x512': (8, 4),
    'unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024': (8, 4),
    'unet/unet-s5-d16_fcn_4xb4-ce-1.0-dice-3.0-40k_drive-64x64': (8, 4),
    'upernet/upernet_r50_4xb2-40k_cityscapes-512x1024': (32, 16),
    'vit/vit_deit-s16-ln_mln_upernet_8xb2-160k_ade20k-512x512': (16, 8),
}

CLASSES = 4
SIZE = (64, 64)
SIZES = dict(mobilenet_v3=(392, 392))  # its pooling has a window of 49 pixels at stride 8
TAPS = dict(
    dpt='backbone.0.0',  # of each level the map and the class token
    san='image_encoder.0.0',
    ddrnet='backbone.1',  # these two backbones give maps for auxiliary losses in training
    pidnet='backbone.1',
)
NOTES = dict(
    ddrnet="features: `tap='backbone.1'`, `teacher_tap='backbone'`",
    pidnet="features: `tap='backbone.1'`, `teacher_tap='backbone'`",
    dpt="features: `tap='backbone.0.0'`, the map of the first level",
    point_rend='student: the points of its own loss; COL: the stage before',
    mask2former='scores of classes per pixel, from all queries',
    maskformer='scores of classes per pixel, from all queries',
    san="scores of classes per pixel, from all queries; features: `tap='image_encoder.0.0'`",
    fastscnn='sigmoids; learns from softmax teachers too, but does not teach softmax students',
)
REFUSED = ('`fit`', '`students', '`losses', '`kd`')  # the key that a message begins with
KD, SEL = dict(type='KDLoss'), dict(type='SelectiveLoss')
DIVIDED = ('embed_dims', 'embed_dim', 'num_feats', 'output_dims', 'out_dims', 'base_channels')
RESNETS = ('ResNet', 'ResNetV1c')
VALUES = dict(
    num_classes=CLASSES,
    img_size=SIZE,
    mask_size=(8, 8),
    num_queries=8,
    sos_token_num=8,
    num_points=32,
    num_modules=1,
    eval_steps=6,  # of SegNeXt's head, as many as in training
    drop_path_rate=0.0,
    pretrained=None,
    init_cfg=None,
)


def size_of(name: str) -> tuple[int, int]:
    """Height and width of its images."""
    return SIZES.get(name.split('/')[0], SIZE)


def config(name: str, wide: bool = False) -> dict:
    """Return a stock config's model, shrunk; ``wide`` for the teacher's."""
    cfg = copy.deepcopy(_stock(name))
    _shrink(cfg, CONFIGS[name][wide])
    cfg.data_preprocessor.size = size_of(name)
    cfg.test_cfg.update(mode='whole')
    return cfg


def build(name: str, wide: bool = False) -> nn.Module:
    """Build it."""
    torch.manual_seed(int(wide))
    return _ready(build_model(config(name, wide)))


def batch(name: str) -> tuple[Tensor, list[SegDataSample]]:
    """Return two images, with labels and, for PIDNet, edges of them."""
    size = size_of(name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *size, generator=generator)
    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, padding_size=[0, 0, 0, 0])
    samples = []
    for _ in images:
        coarse = torch.randint(CLASSES, (1, 1, 4, 4), generator=generator).float()
        labels = nn.functional.interpolate(coarse, size)[0].long()
        labels[:, :5] = 255
        edges = (labels != labels.roll(1, 2)).long()
        data = dict(gt_sem_seg=PixelData(data=labels), gt_edge_map=PixelData(data=edges))
        samples.append(SegDataSample(metainfo=dict(meta), **data))
    return images, samples


def distilled(
    name: str, teacher: str | None = None, fit: bool = False, **losses: dict
) -> nn.Module:
    """Return the student of a config with such losses; by default the teacher is a wider one."""
    torch.manual_seed(0)
    model = dict(type=trained, name=teacher or name)
    rule = dict(function=dict(type='ConstantFit', c=0.5), split='unit') if fit else None
    with mock.patch.object(probe, 'SIZE', size_of(name)):
        return _ready(
            build_teacher_student(
                config(name), dict(model=model, pretrained=True), losses, fit=rule
            )
        )


def together(name: str) -> nn.Module:
    """Return the student of a config and a wider one, to be trained together."""
    torch.manual_seed(0)
    students = dict(a=config(name), b=config(name, wide=True))
    return _ready(CollaborativeDistiller(students, dict(type='Linear')))


def rows() -> list[dict[str, str]]:
    """What works with each config, by doing it: a row of the table of coverage each."""
    built = {name: build(name, wide=True) for name in CONFIGS}
    return [row(name) | {'learns from': pairs_with(name, built)} for name in CONFIGS]


def row(name: str) -> dict[str, str]:
    """What works with a config, by doing it; why not, where the package refuses it."""
    model = distilled(name, kd=KD, sel=SEL)
    return dict(
        config=name,
        head=type(model.distillation.head_terms[0].pair.head).__name__,
        units=units_of(model, name),
        fit=_try(lambda: train(distilled(name, fit=True, kd=KD), name)),
        features=_try(lambda: train(distilled(name, feature=feature(name)), name)),
        together=_try(lambda: train(together(name), name)),
        note=NOTES.get(name.split('/')[0], ''),
    )


def feature(name: str) -> dict:
    """A loss of features of the backbone."""
    tap = TAPS.get(name.split('/')[0], 'backbone')
    teacher_tap = 'backbone' if tap == 'backbone.1' else tap
    connector = dict(type='Conv1x1')
    return dict(type='FeatureLoss', tap=tap, teacher_tap=teacher_tap, connector=connector)


def units_of(model: nn.Module, name: str) -> str:
    """What the units of the first loss are, from a step with contrast masks."""
    term = model.distillation.head_terms[0]
    term.loss.records.keep_contrast = True
    step(model, name)
    contrast = term.loss.records.pop_contrast()
    return 'pixels' if contrast.valid.shape[1:] == size_of(name) else 'points'


def step(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Losses of a step; of networks together the batch is every network's."""
    inputs, samples = batch(name)
    if isinstance(model, CollaborativeDistiller):
        inputs, samples = (dict.fromkeys(model.names, x) for x in (inputs, samples))
    return model(inputs, samples, mode='loss')


def train(model: nn.Module, name: str) -> None:
    """Train for a step.

    Raises:
        AssertionError: The loss is not finite.
    """
    loss, _ = model.parse_losses(step(model, name))
    assert loss.isfinite(), loss
    loss.backward()


def _try(run: Callable[[], None]) -> str:
    try:
        run()
    except ValueError as error:
        if not str(error).startswith(REFUSED):
            raise
        return f'refused: {error}'
    return 'yes'


def pairs_with(name: str, built: dict[str, nn.Module]) -> str:
    """Which of the models a student of this config can learn from."""
    refused = [
        teacher.split('/')[0]
        for teacher, model in built.items()
        if _try(lambda model=model: pair_heads(built[name], model, None, None, 'kd')) != 'yes'
    ]
    return 'all but ' + ', '.join(refused) if refused else 'all'


def _ready(model: nn.Module) -> nn.Module:
    """In training mode, with values for what mmseg leaves to a checkpoint."""
    for path, parameter in model.named_parameters():
        if path.endswith(('text_encoder.positional_embedding', 'text_projection')):
            nn.init.normal_(parameter, std=0.1)
    return model.train()


def trained(name: str) -> nn.Module:
    """Stands for a model that comes with its weights, a wider one."""
    return build(name, wide=True)


@cache
def _stock(name: str) -> dict:
    return resolve_model_cfg(f'mmseg::{name}.py')


def _shrink(node: object, factor: int) -> None:
    """Divide all numbers of channels, and replace what is large or comes from the network."""
    if isinstance(node, list | tuple):
        for item in node:
            _shrink(item, factor)
    if not isinstance(node, dict):
        return
    if node.get('type') in RESNETS:  # blocks of two convolutions with as many channels out
        node.update(stem_channels=64, base_channels=64 if node['depth'] < 50 else 256)
        node.update(depth=18)
    if node.get('type') == 'ResNeSt':
        node.update(stem_channels=64, base_channels=64)
    if node.get('type') == 'CLIPTextEncoder':
        node.update(dataset_name=None, vocabulary=list('abcd'), num_layers=1, cache_feature=False)
    if isinstance(node.get('num_layers'), int):
        kept = node.get('out_indices')
        if isinstance(kept, list | tuple):
            node.update(num_layers=len(kept), out_indices=tuple(range(len(kept))))
        else:
            node['num_layers'] = min(2, node['num_layers'])
    for key, value in node.items():
        if key in VALUES:
            node[key] = VALUES[key]
        elif key == 'class_weight' and value:
            node[key] = None if value[-1] != 0.1 else [1.0] * CLASSES + [0.1]
        elif key == 'type' and value == 'SyncBN':
            node[key] = 'BN'
        elif key == 'num_blocks':
            node[key] = (1,) * len(value)
        elif key == 'num_groups' and value == 32:
            node[key] = 4
        elif key.endswith('channels') or key in DIVIDED:
            node[key] = _divided(value, factor)
        else:
            _shrink(value, factor)


def _divided(value: object, factor: int) -> object:
    if isinstance(value, list | tuple):
        return type(value)(_divided(item, factor) for item in value)
    return value if value is None or value == 3 else value // factor
