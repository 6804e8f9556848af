# The warm start of the runs on thirteen images: 1,200 iterations from scratch.
_base_ = './fpn_r18-w16_1200_camvid13-192x256.py'
optim_wrapper = dict(optimizer=dict(lr=2e-3))
randomness = dict(seed=0)
