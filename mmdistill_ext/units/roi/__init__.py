"""RoIs of two-stage detectors, and the pixels of their masks."""
