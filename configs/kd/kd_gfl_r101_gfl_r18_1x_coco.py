# Plain distillation on COCO, GFL R101 -> R18.
_base_ = '../selective/sel_gfl_r101_gfl_r18_1x_coco.py'
model = dict(
    losses=dict(
        _delete_=True,
        kd=dict(type='KDLoss', average='positive', box=dict(distance='distribution'), weight=1.0),
    )
)
