# The same with a third network, a PSPNet (stride 8).
_base_ = './col_fpn-fcn_r18-w16_1200_camvid-192x256.py'
model = dict(
    students=dict(psp='mmdistill_ext::plain/pspnet_r18-w16_1200_camvid-192x256.py'),
)
