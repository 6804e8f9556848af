"""What one prediction of a model is, and how heads of two models are paired."""
