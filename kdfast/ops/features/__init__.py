"""Losses on features and feature maps that read each side once: attention transfer and the mean squared difference."""

from kdfast.ops.features.function import attention, feature_mse

__all__ = ["attention", "feature_mse"]
