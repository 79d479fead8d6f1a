"""Differentiable augmentation."""
