"""Losses on features and feature maps that read each side once: attention transfer and the mean squared difference."""

from kdfast.ops.features.function import MAX_PIXELS, attention, feature_mse

__all__ = ["MAX_PIXELS", "attention", "feature_mse"]
