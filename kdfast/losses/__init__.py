"""The nn.Module twin of every public function: options in the constructor, tensors in the call."""

from kdfast.losses.features import (
    AttentionTransferLoss,
    FeatureMSELoss,
    KernelAlignmentLoss,
    PKTLoss,
)
from kdfast.losses.logits import (
    DISTLoss,
    DKDLoss,
    JSDivergence,
    KDLoss,
    KLDivergence,
    LinearKLDivergence,
    StandardizedKLDivergence,
    TopKKLDivergence,
)
from kdfast.losses.relations import (
    CRDLoss,
    GraphDistillationLoss,
    HardestNegatives,
    InBatchCRDLoss,
    RKDAngleLoss,
    RKDDistanceLoss,
    RKDLoss,
    RKDSequenceAngleLoss,
    SimilarityPreservingLoss,
    TopKSimilarityGraph,
)

__all__ = [
    "AttentionTransferLoss",
    "CRDLoss",
    "DISTLoss",
    "DKDLoss",
    "FeatureMSELoss",
    "GraphDistillationLoss",
    "HardestNegatives",
    "InBatchCRDLoss",
    "JSDivergence",
    "KDLoss",
    "KLDivergence",
    "KernelAlignmentLoss",
    "LinearKLDivergence",
    "PKTLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "RKDSequenceAngleLoss",
    "SimilarityPreservingLoss",
    "StandardizedKLDivergence",
    "TopKKLDivergence",
    "TopKSimilarityGraph",
]
