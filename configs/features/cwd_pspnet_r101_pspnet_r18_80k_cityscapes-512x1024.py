# Channel-wise distillation on Cityscapes, PSPNet R101 -> R18: logits and last stage.
_base_ = '../selective/sel_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py'
model = dict(
    losses=dict(
        _delete_=True,
        logits=dict(type='CWDLoss', tap='decode_head', weight=3.0),
        stage=dict(type='CWDLoss', tap='backbone.3', connector=dict(type='Conv1x1'), weight=0.2),
    )
)
custom_hooks = [dict(type='mmdistill_ext.StartCheckHook', check_labels=500)]
