# The teacher: wider, and trained on all 480 scenes, but from an archive that mixes up 8 and 9.
_base_ = './student.py'

model = dict(
    backbone=dict(stem_channels=32, base_channels=32),
    neck=dict(in_channels=[32, 64, 128], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32], channels=32),
)
train_dataloader = dict(
    dataset=dict(indices=None, data_prefix=dict(seg_map_path='annotations/train_archive'))
)
