# Decoupled distillation (DKD) on every labelled pixel. Set model.teacher.checkpoint, and load_from
# for a warm start.
_base_ = './kd_fpn_r18_fpn_r18-w16_600_camvid-192x256.py'
model = dict(
    losses=dict(
        _delete_=True,
        dkd=dict(type='DKDLoss', alpha=1.0, beta=0.5, temperature=2.0, weight=1.0),
    )
)
