"""Losses on all pairs of rows of a batch: matrix products, and between them the steps of each device."""

from kdfast.ops.relation.alignment import kernel_cosine
from kdfast.ops.relation.function import crd, kernel_alignment, pkt, similarity_preserving

__all__ = ["crd", "kernel_alignment", "kernel_cosine", "pkt", "similarity_preserving"]
