# Channel-wise distillation on Cityscapes, PSPNet R101 -> R18: logits and last stage.
_base_ = [
    'mmseg::pspnet/pspnet_r18-d8_4xb2-80k_cityscapes-512x1024.py',
    '../_base_/feature_runtime.py',
]
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmseg::pspnet/pspnet_r101-d8_4xb2-80k_cityscapes-512x1024.py',
        checkpoint='https://mmassets.onedl.ai/mmsegmentation/v0.5/pspnet/'
        'pspnet_r101-d8_512x1024_80k_cityscapes/'
        'pspnet_r101-d8_512x1024_80k_cityscapes_20200606_112211-e1e1100f.pth',
    ),
    losses=dict(
        logits=dict(type='CWDLoss', tap='decode_head', weight=3.0),
        stage=dict(type='CWDLoss', tap='backbone.3', connector=dict(type='Conv1x1'), weight=0.2),
    ),
)
