"""Knowledge-distillation losses for PyTorch as fused kernels, each with a plain-PyTorch reference."""

import importlib
from typing import TYPE_CHECKING

from kdfast import backends, functional, losses, metrics, reference
from kdfast.backends import empty_cache
from kdfast.functional.features import (
    attention_transfer_loss,
    feature_mse_loss,
    kernel_alignment_loss,
    pkt_loss,
)
from kdfast.functional.logits import (
    dist_loss,
    dkd_loss,
    js_divergence,
    kd_loss,
    kl_divergence,
    linear_kl_divergence,
    standardized_kl_divergence,
    topk_kl_divergence,
)
from kdfast.functional.relations import (
    CRDLoss,
    SimilarityGraph,
    crd_loss,
    graph_distillation_loss,
    hardest_negatives,
    rkd_angle_loss,
    rkd_distance_loss,
    rkd_loss,
    rkd_sequence_angle_loss,
    similarity_graph,
    similarity_preserving_loss,
)

if TYPE_CHECKING:
    from kdfast import store as store

__version__ = "0.1.0"

__all__ = [
    "CRDLoss",
    "SimilarityGraph",
    "attention_transfer_loss",
    "backends",
    "crd_loss",
    "dist_loss",
    "dkd_loss",
    "empty_cache",
    "feature_mse_loss",
    "functional",
    "graph_distillation_loss",
    "hardest_negatives",
    "js_divergence",
    "kd_loss",
    "kernel_alignment_loss",
    "kl_divergence",
    "linear_kl_divergence",
    "losses",
    "metrics",
    "pkt_loss",
    "reference",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rkd_loss",
    "rkd_sequence_angle_loss",
    "similarity_graph",
    "similarity_preserving_loss",
    "standardized_kl_divergence",
    "topk_kl_divergence",
]


def __getattr__(name: str) -> object:
    if name == "store":  # needs safetensors, so only when asked for
        return importlib.import_module("kdfast.store")
    raise AttributeError(f"module 'kdfast' has no attribute {name!r}")
