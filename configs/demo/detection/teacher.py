# The teacher: twice as wide, all 480 scenes, but from an archive that mixes up 8 and 9.
_base_ = './student.py'

model = dict(
    backbone=dict(stem_channels=32, base_channels=32),
    neck=dict(in_channels=[64, 128], out_channels=64),
    bbox_head=dict(in_channels=64, feat_channels=64),
)
train_dataloader = dict(
    dataset=dict(indices=None, ann_file='annotations/instances_train_archive.json')
)
