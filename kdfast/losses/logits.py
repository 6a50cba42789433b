"""Module twins of the losses on logits."""

from __future__ import annotations

from torch import Tensor

from kdfast.functional import logits as F
from kdfast.losses.module import LossModule


class KLDivergence(LossModule):
    """``T^2 * KL`` of softened logits (..., V), forward or reverse (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    Module form of :func:`kdfast.kl_divergence`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        *,
        direction: str = "forward",
        reduction: str = "batchmean",
        scale_by_temperature: bool = True,
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            direction=direction,
            reduction=reduction,
            scale_by_temperature=scale_by_temperature,
            inplace_backward=inplace_backward,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return F.kl_divergence(student_logits, teacher_logits, mask=mask, row_weight=row_weight, **self.options())


class JSDivergence(LossModule):
    """Generalised Jensen-Shannon divergence of softened logits (..., V) (GKD, https://arxiv.org/abs/2306.13649).

    Module form of :func:`kdfast.js_divergence`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(
        self,
        beta: float = 0.5,
        temperature: float = 1.0,
        *,
        reduction: str = "batchmean",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(beta=beta, temperature=temperature, reduction=reduction, inplace_backward=inplace_backward)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return F.js_divergence(student_logits, teacher_logits, mask=mask, row_weight=row_weight, **self.options())


class KDLoss(LossModule):
    """``alpha T^2 KL(teacher || student) + (1 - alpha) CE`` (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    Module form of :func:`kdfast.kd_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        alpha: float = 0.7,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "batchmean",
        inplace_backward: bool = False,
    ) -> None:
        super().__init__(
            temperature=temperature,
            alpha=alpha,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            inplace_backward=inplace_backward,
        )

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor | None = None) -> Tensor:
        return F.kd_loss(student_logits, teacher_logits, labels, **self.options())


class DKDLoss(LossModule):
    """Target and other classes weighed apart, logits (..., V) (Zhao et al. 2022, https://arxiv.org/abs/2203.08679).

    Module form of :func:`kdfast.dkd_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0) -> None:
        super().__init__(alpha=alpha, beta=beta, temperature=temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
        return F.dkd_loss(student_logits, teacher_logits, labels, **self.options())


class DISTLoss(LossModule):
    """Pearson correlation along rows and columns of the softmaxes (Huang et al. 2022, https://arxiv.org/abs/2205.10536).

    Module form of :func:`kdfast.dist_loss`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, *, beta: float = 1.0, gamma: float = 1.0, temperature: float = 1.0) -> None:
        super().__init__(beta=beta, gamma=gamma, temperature=temperature)

    def forward(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        return F.dist_loss(student_logits, teacher_logits, **self.options())


class StandardizedKLDivergence(LossModule):
    """``T^2 * KL`` of z-scored logits (..., V) (Sun et al. 2024, https://arxiv.org/abs/2403.01427).

    Module form of :func:`kdfast.standardized_kl_divergence`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(self, temperature: float = 2.0, *, reduction: str = "batchmean") -> None:
        super().__init__(temperature=temperature, reduction=reduction)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        *,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return F.standardized_kl_divergence(
            student_logits, teacher_logits, mask=mask, row_weight=row_weight, **self.options()
        )


class TopKKLDivergence(LossModule):
    """``T^2 * KL`` from a teacher stored as k classes a row (Anshumann et al. 2025, https://arxiv.org/abs/2503.16870).

    Module form of :func:`kdfast.topk_kl_divergence`, which documents formula, shapes, dtypes and errors.
    """

    def __init__(
        self,
        *,
        values: str = "logits",
        temperature: float = 1.0,
        tail: str = "drop",
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(values=values, temperature=temperature, tail=tail, reduction=reduction)

    def forward(
        self,
        student_logits: Tensor,
        teacher_values: Tensor,
        teacher_indices: Tensor,
        *,
        mask: Tensor | None = None,
    ) -> Tensor:
        return F.topk_kl_divergence(student_logits, teacher_values, teacher_indices, mask=mask, **self.options())


class LinearKLDivergence(LossModule):
    """KL or JS of ``hidden @ weight.T + bias``, plus cross-entropy (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).

    Module form of :func:`kdfast.linear_kl_divergence`, which documents formula, shapes, dtypes and errors. It owns no
    weights: they are those of the models' last layers and are passed in.
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        temperature: float = 1.0,
        divergence: str = "forward",
        beta: float = 0.5,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "batchmean",
    ) -> None:
        super().__init__(
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return F.linear_kl_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            labels=labels,
            mask=mask,
            row_weight=row_weight,
            **self.options(),
        )
