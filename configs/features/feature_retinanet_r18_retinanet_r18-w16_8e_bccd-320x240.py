# Features of every level of the neck, inside of the labelled boxes. Set model.teacher.checkpoint.
_base_ = ['../plain/retinanet_r18-w16_8e_bccd-320x240.py', '../_base_/feature_runtime.py']
model = dict(
    _delete_=True,
    type='mmdistill_ext.TeacherStudentDistiller',
    student={{_base_.model}},
    teacher=dict(
        model='mmdistill_ext::plain/retinanet_r18_16e_bccd-320x240.py',
        checkpoint='checkpoints/bccd_retinanet-r18.pth',
    ),
    losses=dict(
        neck=dict(
            type='FeatureLoss',
            tap='neck',
            connector=dict(type='Conv1x1'),
            weight_by='labels',
            weight=1.0,
        ),
    ),
)
