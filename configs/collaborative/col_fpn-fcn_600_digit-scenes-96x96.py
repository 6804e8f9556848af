# Two unlike networks without a teacher (COL): the student and an FCN without a pyramid.
_base_ = '../demo/student.py'

norm_cfg = dict(type='BN', requires_grad=True)
fcn = dict(
    type='EncoderDecoder',
    data_preprocessor={{_base_.model.data_preprocessor}},
    backbone=dict(
        type='ResNetV1c',
        depth=18,
        stem_channels=16,
        base_channels=8,
        num_stages=3,
        strides=(1, 1, 1),
        dilations=(1, 1, 2),
        out_indices=(0, 1, 2),
        zero_init_residual=False,
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='FCNHead',
        in_channels=32,
        in_index=2,
        channels=16,
        num_convs=1,
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
model = dict(
    _delete_=True,
    type='mmdistill_ext.CollaborativeDistiller',
    students=dict(fpn={{_base_.model}}, fcn=fcn),
    second=dict(type='MinLoss'),
    kl=dict(weight=1.0, temperature=2.0, warmup=200),
)
custom_imports = dict(imports=['mmdistill_ext'], allow_failed_imports=False)
custom_hooks = [dict(type='mmdistill_ext.CollaborationHook')]
val_evaluator = dict(
    _delete_=True, type='mmdistill_ext.NetworksEvaluator', metrics={{_base_.val_evaluator}}
)
test_evaluator = val_evaluator
