"""Masks of detectors that predict one for each of their locations, without RoIs."""
