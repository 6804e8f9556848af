# Thirteen of CamVid's 367 training images, one in 30, with little augmentation: few enough to
# overfit. Validation is CamVid's own.
_base_ = './camvid.py'
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=(192, 256), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    dataset=dict(
        indices=[0, 30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 330, 360],
        pipeline=train_pipeline,
    )
)
