# The student alone: semantic FPN on a thin ResNet-18, 160 fully labelled scenes.
_base_ = './base.py'

norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[63.75, 63.75, 63.75],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(96, 96),
    ),
    backbone=dict(
        type='ResNetV1c',
        depth=18,
        stem_channels=16,
        base_channels=8,
        num_stages=3,
        strides=(1, 1, 2),
        dilations=(1, 1, 1),
        out_indices=(0, 1, 2),
        zero_init_residual=False,
        norm_cfg=norm_cfg,
    ),
    neck=dict(type='FPN', in_channels=[8, 16, 32], out_channels=16, num_outs=3, norm_cfg=norm_cfg),
    decode_head=dict(
        type='FPNHead',
        in_channels=[16, 16, 16],
        in_index=[0, 1, 2],
        feature_strides=[4, 4, 8],
        channels=16,
        dropout_ratio=0.0,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        init_cfg=dict(type='Normal', std=0.1, override=dict(name='conv_seg')),
        loss_decode=dict(type='CrossEntropyLoss', loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
train_dataloader = dict(dataset=dict(indices=160))
