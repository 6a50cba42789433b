"""Every loss in plain PyTorch: the definition of the result, and the documentation of the mathematics.

The functions have the signatures of their fast twins in :mod:`kdfast`. They take any leading shape and dtype, never
write their inputs, and keep gradients finite wherever a finite limit exists. They import only torch and check nothing;
``CRDLoss``, which has no faster twin, and the duplicates among ``teacher_indices`` are the exceptions.
"""

from kdfast.reference.crd import CRDLoss
from kdfast.reference.features import (
    attention_transfer_loss,
    feature_mse_loss,
    kernel_alignment_loss,
    pkt_loss,
)
from kdfast.reference.logits import (
    dist_loss,
    dkd_loss,
    js_divergence,
    kd_loss,
    kl_divergence,
    linear_kl_divergence,
    standardized_kl_divergence,
    topk_kl_divergence,
)
from kdfast.reference.relations import (
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

__all__ = [
    "CRDLoss",
    "SimilarityGraph",
    "attention_transfer_loss",
    "crd_loss",
    "dist_loss",
    "dkd_loss",
    "feature_mse_loss",
    "graph_distillation_loss",
    "hardest_negatives",
    "js_divergence",
    "kd_loss",
    "kernel_alignment_loss",
    "kl_divergence",
    "linear_kl_divergence",
    "pkt_loss",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rkd_loss",
    "rkd_sequence_angle_loss",
    "similarity_graph",
    "similarity_preserving_loss",
    "standardized_kl_divergence",
    "topk_kl_divergence",
]
