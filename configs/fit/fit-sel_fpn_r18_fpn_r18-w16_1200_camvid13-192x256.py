# FIT with the selective teacher on thirteen images.
_base_ = './fit-kd_fpn_r18_fpn_r18-w16_1200_camvid13-192x256.py'
model = dict(
    losses=dict(_delete_=True, sel=dict(type='SelectiveLoss', temperature=2.0, weight=1.0))
)
