# PSPNet and DeepLabV3+ on ResNet-18 learn Cityscapes together, each from its own view of the image.
_base_ = [
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/collaborative_runtime.py',
]
crop_size = (512, 1024)
model = dict(
    _delete_=True,
    type='mmdistill_ext.CollaborativeDistiller',
    students=dict(
        psp={{_base_.model}},
        deeplab='mmseg::deeplabv3plus/deeplabv3plus_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    ),
    second=dict(type='Linear'),
    kl=dict(weight=1.0, temperature=2.0, warmup=4000),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='mmdistill_ext.MakeViews',
        views=dict(
            deeplab=[dict(type='PhotoMetricDistortion')],
            psp=[dict(type='PhotoMetricDistortion')],
        ),
        pack=dict(type='PackSegInputs'),
    ),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_evaluator = dict(
    _delete_=True, type='mmdistill_ext.NetworksEvaluator', metrics={{_base_.val_evaluator}}
)
test_evaluator = val_evaluator
default_hooks = dict(checkpoint=dict(save_best='ensemble/mIoU'))
