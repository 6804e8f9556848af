# An ATSS alone on BCCD: eight epochs from scratch.
_base_ = [
    '../_base_/models/atss_r18-w16.py',
    '../_base_/datasets/bccd.py',
    '../_base_/schedules/adamw_8e.py',
    '../_base_/det_runtime.py',
]
