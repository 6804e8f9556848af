"""One stock config of mmdet for every kind of detector, shrunk until a step takes a second."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import EmbeddingRPNHead
from mmdet.registry import MODELS as MMDET
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmdistill_ext.distillers.build import build_model, resolve_model_cfg

SIZE = 128
C4, FPN, DARK = (1024,), (256, 512, 1024, 2048), (256, 512, 1024)
SIZES = dict(
    num_classes=3,
    num_things_classes=3,
    num_stuff_classes=2,
    num_queries=20,
    num_proposals=20,
    num=64,
    nms_pre=100,
    max_per_img=50,
    num_points=128,
    fc_out_channels=64,
    stacked_convs=1,
    num_shared_convs=1,
    num_dn_queries=8,
    dropout=0.0,
    ffn_drop=0.0,
)
"""Sizes that no other size depends on."""


@MMDET.register_module()
class StockBackbone(BaseModule):
    """Maps at the strides and with the channels of a stock backbone, from one layer each.

    Args:
        channels: Channels of each map.
        strides: Stride of each map.
        repeat: Every image comes so many times, as from TridentNet's branches.
        image: The first map is the image, as DetectoRS wants it.
    """

    def __init__(self, channels, strides, repeat=1, image=False):
        super().__init__()
        self.strides, self.repeat, self.image = strides, repeat, image
        self.num_branch, self.test_branch_idx = repeat, 1  # as TridentNet's
        self.layers = nn.ModuleList(nn.Conv2d(3, width, 3, padding=1) for width in channels)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps ``(B, C, ceil(H / stride), ceil(W / stride))``."""
        maps = [images] if self.image else []
        for layer, stride in zip(self.layers, self.strides, strict=True):
            small = F.avg_pool2d(images, stride, ceil_mode=True)
            level = layer(small).relu()
            branches = self.repeat if self.training else 1
            maps.append(torch.cat([level] * branches))
        return tuple(maps)


class Stock(NamedTuple):
    """A stock config, and what its backbone gives."""

    config: str
    channels: tuple[int, ...] = FPN
    strides: tuple[int, ...] | None = None
    changes: dict | None = None  # dotted key -> value
    size: int = SIZE
    priors: bool = False  # its classes need the bias that `init_weights` gives

    @property
    def name(self) -> str:
        """Short name, for the ids of tests."""
        return self.config.split('/')[-1].removesuffix('.py')


HOURGLASS = dict(channels=(256, 256), strides=(4, 4), size=64)  # corner pooling is slow
SSD = dict(channels=(512, 1024), strides=(8, 16), size=300)
SEMANTIC = {'roi_head.semantic_head.num_classes': 5}
RELAY = {'roi_head.feat_relay_head.in_channels': 64}
POSITIVE = {'train_cfg.rcnn.sampler.add_gt_as_proposals': True}
PLAIN_ROI = {'roi_head.bbox_roi_extractor.roi_layer.use_torchvision': False}
MASKS = (
    'mask',
    'ms-rcnn',
    'ins',
    'panoptic',
    'htc',
    'scnet',
    'solo',
    'yolact',
    'point-rend',
    'grid',
)
"""Parts of the names of configs that load masks."""
STOCK = (
    # single-stage: anchors and points
    Stock('retinanet/retinanet_r50_fpn_1x_coco.py'),
    Stock('ghm/retinanet_r50_fpn_ghm-1x_coco.py'),
    Stock('efficientnet/retinanet_effb3_fpn_8xb4-crop896-1x_coco.py', (48, 136, 384)),
    Stock('free_anchor/freeanchor_r50_fpn_1x_coco.py'),
    Stock('guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py', priors=True),
    Stock('pisa/retinanet-r50_fpn_pisa_1x_coco.py'),
    Stock('sabl/sabl-retinanet_r50_fpn_1x_coco.py'),
    Stock('fsaf/fsaf_r50_fpn_1x_coco.py'),
    Stock('atss/atss_r50_fpn_1x_coco.py'),
    Stock('dyhead/atss_r50_fpn_dyhead_1x_coco.py'),
    Stock('paa/paa_r50_fpn_1x_coco.py'),
    Stock('gfl/gfl_r50_fpn_1x_coco.py'),
    Stock('tood/tood_r50_fpn_1x_coco.py'),
    Stock('vfnet/vfnet_r50_fpn_1x_coco.py'),
    Stock('ddod/ddod_r50_fpn_1x_coco.py', size=384),
    Stock('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
    Stock('nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py'),
    Stock('nas_fcos/nas-fcos_r50-caffe_fpn_fcoshead-gn-head_4xb4-1x_coco.py'),
    Stock('foveabox/fovea_r50_fpn_4xb4-1x_coco.py'),
    Stock('autoassign/autoassign_r50-caffe_fpn_1x_coco.py'),
    Stock('reppoints/reppoints-moment_r50_fpn_1x_coco.py'),
    Stock('centernet/centernet-update_r50_fpn_8xb8-amp-lsj-200e_coco.py'),
    Stock('yolof/yolof_r50-c5_8xb8-1x_coco.py', (2048,)),
    Stock('yolo/yolov3_d53_8xb8-320-273e_coco.py', DARK),
    Stock('yolox/yolox_s_8xb8-300e_coco.py', (128, 256, 512), priors=True),
    Stock('rtmdet/rtmdet_s_8xb32-300e_coco.py', (128, 256, 512)),
    Stock('ssd/ssd300_coco.py', **SSD),
    Stock('pisa/ssd300_pisa_coco.py', **SSD),
    Stock('centernet/centernet_r18-dcnv2_8xb16-crop512-140e_coco.py', (512,)),
    Stock('cornernet/cornernet_hourglass104_10xb5-crop511-210e-mstest_coco.py', **HOURGLASS),
    Stock(
        'centripetalnet/centripetalnet_hourglass104_16xb6-crop511-210e-mstest_coco.py', **HOURGLASS
    ),
    # single-stage with masks
    Stock('rtmdet/rtmdet-ins_s_8xb32-300e_coco.py', (128, 256, 512)),
    Stock('condinst/condinst_r50_fpn_ms-poly-90k_coco_instance.py'),
    Stock('boxinst/boxinst_r50_fpn_ms-90k_coco.py'),
    Stock('yolact/yolact_r50_1xb8-55e_coco.py'),
    Stock('solo/solo_r50_fpn_1x_coco.py'),
    Stock('solo/decoupled-solo_r50_fpn_1x_coco.py'),
    Stock('solo/decoupled-solo-light_r50_fpn_3x_coco.py'),
    Stock('solov2/solov2_r50_fpn_1x_coco.py'),
    # two-stage
    Stock('faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'),
    Stock('faster_rcnn/faster-rcnn_r50-caffe-c4_ms-1x_coco.py', C4),
    Stock('faster_rcnn/faster-rcnn_r50_fpn_fcos-rpn_1x_coco.py'),
    Stock('libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py'),
    Stock('gn/mask-rcnn_r50_fpn_gn-all_2x_coco.py'),
    Stock('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py'),
    Stock('dynamic_rcnn/dynamic-rcnn_r50_fpn_1x_coco.py'),
    Stock('guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco.py'),
    Stock('cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'),
    Stock('pisa/faster-rcnn_r50_fpn_pisa_1x_coco.py'),
    Stock('sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py'),
    Stock('sabl/sabl-cascade-rcnn_r50_fpn_1x_coco.py'),
    Stock('grid_rcnn/grid-rcnn_r50_fpn_gn-head_2x_coco.py'),
    Stock('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'),
    Stock('cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py'),
    Stock('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'),
    Stock('mask_rcnn/mask-rcnn_r50-caffe-c4_1x_coco.py', C4),
    Stock('pisa/mask-rcnn_r50_fpn_pisa_1x_coco.py'),
    Stock('seesaw_loss/mask-rcnn_r50_fpn_seesaw-loss_random-ms-2x_lvis-v1.py'),
    Stock('ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py'),
    Stock('point_rend/point-rend_r50-caffe_fpn_ms-1x_coco.py'),
    Stock('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'),
    Stock('htc/htc_r50_fpn_1x_coco.py', changes=SEMANTIC),
    Stock('htc/htc-without-semantic_r50_fpn_1x_coco.py'),
    Stock('scnet/scnet_r50_fpn_1x_coco.py', changes={**SEMANTIC, **RELAY}),
    Stock('tridentnet/tridentnet_r50-caffe_1x_coco.py', C4, changes=POSITIVE),
    Stock('crowddet/crowddet-rcnn_r50_fpn_8xb2-30e_crowdhuman.py', changes=PLAIN_ROI),
    # queries
    Stock('sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py'),
    Stock('queryinst/queryinst_r50_fpn_1x_coco.py'),
    Stock('detr/detr_r50_8xb2-150e_coco.py', (2048,)),
    Stock('conditional_detr/conditional-detr_r50_8xb2-50e_coco.py', (2048,)),
    Stock('dab_detr/dab-detr_r50_8xb2-50e_coco.py', (2048,)),
    Stock('deformable_detr/deformable-detr_r50_16xb2-50e_coco.py', (512, 1024, 2048)),
    Stock('dino/dino-4scale_r50_8xb2-12e_coco.py', (512, 1024, 2048)),
    Stock('ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py', (512, 1024, 2048)),
    Stock('maskformer/maskformer_r50_ms-16xb1-75e_coco.py'),
    Stock('mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'),
    Stock('mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py'),
)


def strides_of(stock: Stock) -> tuple[int, ...]:
    """Strides of the backbone's maps: as in a ResNet where none are said."""
    if stock.strides:
        return stock.strides
    if stock.channels == C4:
        return (16,)
    return tuple(32 // 2**i for i in reversed(range(len(stock.channels))))


def config(stock: Stock, width: int = 1) -> ConfigDict:
    """The shrunk config.

    Args:
        stock: One of :data:`STOCK`.
        width: Factor of the channels between the backbone and what follows it.
    """
    cfg = resolve_model_cfg(f'mmdet::{stock.config}')
    if stock.channels == C4:  # no neck takes another width
        width = 1
    backbone = cfg.backbone
    cfg.backbone = dict(
        type='StockBackbone',
        channels=[width * c for c in stock.channels],
        strides=strides_of(stock),
        repeat=backbone.get('num_branch', 1),
        image=backbone.get('output_img', False),
    )
    cfg.data_preprocessor.pop('batch_augments', None)
    _shrink(cfg, SIZES)
    _widen(cfg, stock.channels, width)
    _drop_pretrained(cfg)
    for part in ('encoder', 'decoder'):
        if 'num_layers' in cfg.get(part, {}):
            cfg[part].num_layers = 2
    if 'panoptic_head' in cfg:
        head = cfg.panoptic_head
        classes = head.num_things_classes + head.num_stuff_classes
        head.loss_cls.class_weight = [1.0] * classes + [0.1]
    for key, value in (stock.changes or {}).items():
        _put(cfg, key, value)
    return cfg


def _put(cfg: ConfigDict, key: str, value: object) -> None:
    *path, last = key.split('.')
    for name in path:
        cfg = cfg[int(name)] if name.isdigit() else cfg[name]
    cfg[last] = value


def _shrink(cfg: object, sizes: dict) -> None:
    for part in cfg if isinstance(cfg, list | tuple) else ():
        _shrink(part, sizes)
    for key, value in cfg.items() if isinstance(cfg, dict) else ():
        if key in sizes and isinstance(value, int | float) and not isinstance(value, bool):
            cfg[key] = min(value, sizes[key])
        _shrink(value, sizes)


def _widen(cfg: object, channels: tuple[int, ...], width: int) -> None:
    """Multiply the ``in_channels`` of what takes the backbone's maps."""
    for part in cfg if isinstance(cfg, list | tuple) else ():
        _widen(part, channels, width)
    for key, value in cfg.items() if isinstance(cfg, dict) else ():
        if key in ('in_channels', 'out_channels') and isinstance(value, list | tuple):
            if tuple(value[: len(channels)]) in (channels, channels[::-1]):
                wide = [width * c for c in value[: len(channels)]]
                cfg[key] = type(value)((*wide, *value[len(channels) :]))
        else:
            _widen(value, channels, width)
    if not isinstance(cfg, dict) or 'backbone' not in cfg:
        return
    after = cfg.get('neck') or cfg.get('bbox_head')  # what takes the backbone's last map
    if isinstance(after, dict) and after.get('in_channels') == channels[-1]:
        after['in_channels'] = width * channels[-1]


def _drop_pretrained(cfg: object) -> None:
    for part in cfg if isinstance(cfg, list | tuple) else ():
        _drop_pretrained(part)
    if isinstance(cfg, dict):
        if isinstance(cfg.get('init_cfg'), dict) and cfg['init_cfg'].get('type') == 'Pretrained':
            cfg['init_cfg'] = None
        for value in cfg.values():
            _drop_pretrained(value)


def batch(stock: Stock) -> dict:
    """Two images of two objects each, with all that a detector may learn from."""
    generator = torch.Generator().manual_seed(0)
    size, images, samples = stock.size, [], []
    step = size // 16
    truth = (([[1, 2, 8, 9], [6, 4, 15, 14]], [0, 2]), ([[3, 3, 12, 13], [1, 9, 6, 15]], [1, 1]))
    for boxes, labels in truth:
        images.append(torch.randint(0, 256, (3, size, size), generator=generator).byte())
        samples.append(_sample(torch.tensor(boxes).float() * step, labels, size))
    masks = any(part in stock.config for part in MASKS)
    if not masks:
        for sample in samples:
            del sample.gt_instances.masks, sample.ignored_instances.masks
    return dict(inputs=images, data_samples=samples)


def _sample(boxes: Tensor, labels: list[int], size: int) -> DetDataSample:
    masks = np.zeros((len(boxes), size, size), np.uint8)
    segments = torch.full((1, size, size), 3)
    for mask, label, (left, top, right, bottom) in zip(masks, labels, boxes.int(), strict=True):
        mask[top + 1 : bottom - 1, left + 1 : right - 1] = 1
        segments[0, top:bottom, left:right] = label
    shape = (size, size)
    meta = dict(img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
    sample = DetDataSample(
        metainfo={**meta, 'batch_input_shape': shape, 'img_id': 0, 'flip': False}
    )
    sample.gt_instances = InstanceData(
        bboxes=boxes, labels=torch.tensor(labels), masks=BitmapMasks(masks, size, size)
    )
    sample.ignored_instances = InstanceData(
        bboxes=boxes[:0],
        labels=torch.zeros(0, dtype=torch.long),
        masks=BitmapMasks(masks[:0], size, size),
    )
    sample.gt_sem_seg = PixelData(sem_seg=segments)
    return sample


def build(stock: Stock, width: int = 1, seed: int = 0) -> nn.Module:
    """The shrunk model, with the weights that PyTorch gives it."""
    torch.manual_seed(seed)
    model = build_model(config(stock, width))
    set_what_is_left(model, stock)
    return model


def set_what_is_left(model: nn.Module, stock: Stock) -> None:
    """Draw what models leave as memory happened to be, until `init_weights`, which takes long."""
    if stock.priors:
        model.init_weights()
    for name, parameter in model.named_parameters():
        if name.endswith('level_embed') or not parameter.isfinite().all():
            nn.init.normal_(parameter, std=0.1)
    for part in model.modules():
        if isinstance(part, EmbeddingRPNHead):  # whose boxes would have no area
            part.init_weights()


def teacher(stock: Stock) -> dict:
    """What goes to ``teacher``: the model with twice the channels after its backbone."""
    return dict(model=dict(type=trained, place=STOCK.index(stock)), pretrained=True)


def trained(place: int) -> nn.Module:
    """Stands for a model that comes with its weights."""
    return build(STOCK[place], width=2, seed=1)


def losses_of(model: nn.Module, stock: Stock) -> dict[str, Tensor]:
    """The losses of one training step, by name."""
    model.train()
    hub = MessageHub.get_current_instance()
    for name in ('iter', 'epoch'):  # as the runner says it
        hub.update_info(name, 0)
    return model(**model.data_preprocessor(batch(stock), True), mode='loss')
