"""Module twins of the losses on relations."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.functional import relations as F
from kdfast.losses.module import LossModule
from kdfast.reference.crd import CRDLoss
from kdfast.reference.relations import SimilarityGraph

__all__ = [
    "CRDLoss",
    "GraphDistillationLoss",
    "HardestNegatives",
    "InBatchCRDLoss",
    "RKDAngleLoss",
    "RKDDistanceLoss",
    "RKDLoss",
    "RKDSequenceAngleLoss",
    "SimilarityPreservingLoss",
    "TopKSimilarityGraph",
]


class SimilarityPreservingLoss(LossModule):
    """Squared difference of row-normalised Gram matrices of rows (N, …) (Tung & Mori 2019,
    https://arxiv.org/abs/1907.09682).

    Module form of :func:`kdfast.similarity_preserving_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.similarity_preserving_loss(student, teacher)


class RKDDistanceLoss(LossModule):
    """Huber loss of the relative distances between rows (N, …) (Park et al. 2019, https://arxiv.org/abs/1904.05068).

    Module form of :func:`kdfast.rkd_distance_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)

    def forward(
        self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None, row_weight: Tensor | None = None
    ) -> Tensor:
        return F.rkd_distance_loss(student, teacher, mask=mask, row_weight=row_weight, **self.options())


class RKDAngleLoss(LossModule):
    """Huber loss of the cosines in all triplets of rows (N, …) (Park et al. 2019, https://arxiv.org/abs/1904.05068).

    Module form of :func:`kdfast.rkd_angle_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, triplets: str | int = "all", reduction: str = "mean") -> None:
        super().__init__(triplets=triplets, reduction=reduction)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return F.rkd_angle_loss(
            student, teacher, generator=generator, mask=mask, row_weight=row_weight, **self.options()
        )


class RKDLoss(LossModule):
    """Weighted sum of the distance and the angle loss of rows (N, …) (Park et al. 2019,
    https://arxiv.org/abs/1904.05068).

    Module form of :func:`kdfast.rkd_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(
        self,
        *,
        distance_weight: float = 25.0,
        angle_weight: float = 50.0,
        triplets: str | int = "all",
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            distance_weight=distance_weight, angle_weight=angle_weight, triplets=triplets, reduction=reduction
        )

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        generator: torch.Generator | None = None,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return F.rkd_loss(student, teacher, generator=generator, mask=mask, row_weight=row_weight, **self.options())


class RKDSequenceAngleLoss(LossModule):
    """Mean squared difference of the angles along sequences (N, L, D) (after Park et al. 2019,
    https://arxiv.org/abs/1904.05068).

    Module form of :func:`kdfast.rkd_sequence_angle_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return F.rkd_sequence_angle_loss(student, teacher, mask=mask)


class InBatchCRDLoss(LossModule):
    """Contrast of the pairs of rows (N, …) by label, plus alignment of similarities (after Tian et al. 2020,
    https://arxiv.org/abs/1910.10699). :class:`CRDLoss` is the paper's loss, with a memory bank.

    Module form of :func:`kdfast.crd_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, temperature: float = 0.1, alignment_weight: float = 1.0, normalize: bool = False) -> None:
        super().__init__(temperature=temperature, alignment_weight=alignment_weight, normalize=normalize)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return F.crd_loss(student, teacher, labels, **self.options())


class TopKSimilarityGraph(LossModule):
    """The k nearest neighbours of rows (N, …), best first (Lassance et al. 2020, https://arxiv.org/abs/1911.03080).

    Module form of :func:`kdfast.similarity_graph`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(
        self, k: int = 20, *, metric: str = "cosine", include_self: bool = False, precision: str = "ieee"
    ) -> None:
        super().__init__(k=k, metric=metric, include_self=include_self, precision=precision)

    def forward(self, features: Tensor, *, keys: Tensor | None = None) -> SimilarityGraph:
        return F.similarity_graph(features, keys=keys, **self.options())


class GraphDistillationLoss(LossModule):
    """KL between the weights of the teacher's k nearest neighbours of rows (N, …) (after Koohpayegani et al. 2020,
    https://arxiv.org/abs/2010.14713).

    Module form of :func:`kdfast.graph_distillation_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, k: int = 20, metric: str = "cosine", temperature: float = 0.5) -> None:
        super().__init__(k=k, metric=metric, temperature=temperature)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.graph_distillation_loss(student, teacher, **self.options())


class HardestNegatives(LossModule):
    """The k most similar rows (N, …) of another label (Schroff et al. 2015, https://arxiv.org/abs/1503.03832).

    Module form of :func:`kdfast.hardest_negatives`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, k: int, *, metric: str = "cosine") -> None:
        super().__init__(k=k, metric=metric)

    def forward(self, features: Tensor, labels: Tensor) -> SimilarityGraph:
        return F.hardest_negatives(features, labels, **self.options())
