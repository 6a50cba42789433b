"""Module twins of the losses on features."""

from __future__ import annotations

from torch import Tensor

from kdfast.functional import features as F
from kdfast.losses.module import LossModule


class FeatureMSELoss(LossModule):
    """Mean squared difference of features (N, …) (FitNets, Romero et al. 2015, https://arxiv.org/abs/1412.6550).

    Module form of :func:`kdfast.feature_mse_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return F.feature_mse_loss(student, teacher, mask=mask)


class AttentionTransferLoss(LossModule):
    """Mean squared difference of normalised attention maps of (N, C, H, W) (Zagoruyko & Komodakis 2017,
    https://arxiv.org/abs/1612.03928).

    Module form of :func:`kdfast.attention_transfer_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, p: float = 2, *, normalize: bool = True) -> None:
        super().__init__(p=p, normalize=normalize)

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        return F.attention_transfer_loss(student_maps, teacher_maps, **self.options())


class PKTLoss(LossModule):
    """KL between the neighbour probabilities of rows (N, …) (Passalis & Tefas 2018, https://arxiv.org/abs/1803.10837).

    Module form of :func:`kdfast.pkt_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, eps: float = 1e-7) -> None:
        super().__init__(eps=eps)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.pkt_loss(student, teacher, **self.options())


class KernelAlignmentLoss(LossModule):
    """``1 - <K_s, K_t> / (|K_s| |K_t|)`` of Gram matrices of rows (N, …); centred it is 1 - CKA (Kornblith et al. 2019,
    https://arxiv.org/abs/1905.00414).

    Module form of :func:`kdfast.kernel_alignment_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, centered: bool = False) -> None:
        super().__init__(centered=centered)

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return F.kernel_alignment_loss(student, teacher, **self.options())
