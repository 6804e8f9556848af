# The same at a quarter of the width: 0.8 M parameters.
_base_ = './fpn_r18.py'
model = dict(
    backbone=dict(stem_channels=16, base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    decode_head=dict(in_channels=[32, 32, 32, 32], channels=32),
)
