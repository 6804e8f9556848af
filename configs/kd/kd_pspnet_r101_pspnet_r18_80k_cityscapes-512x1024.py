# Plain distillation on Cityscapes, PSPNet R101 -> R18.
_base_ = '../selective/sel_pspnet_r101_pspnet_r18_80k_cityscapes-512x1024.py'
model = dict(losses=dict(_delete_=True, kd=dict(type='KDLoss', temperature=2.0, weight=1.0)))
