# Semantic FPN on ResNet-18, from scratch, for CamVid's 11 classes.
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[104.0, 107.0, 108.0],
        std=[75.0, 76.0, 77.0],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(240, 320),
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(type='ResNetV1c', depth=18, norm_cfg=norm_cfg),
    neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=128, num_outs=4),
    decode_head=dict(
        type='FPNHead',
        in_channels=[128, 128, 128, 128],
        in_index=[0, 1, 2, 3],
        feature_strides=[4, 8, 16, 32],
        channels=64,
        dropout_ratio=0.1,
        num_classes=11,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
