"""Schema and fake kernel of ``torch.ops.kdfast.rkd``; how backward works: ``ScalarLoss`` in kdfast/ops/autograd.py.

The gradient is made in forward, by the sweep that makes the loss, for grad_output 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.autograd import ScalarLoss, apply, scalar_loss_like
from kdfast.ops.library import LIBRARY, define


class Options(NamedTuple):
    """The op's arguments that are not tensors."""

    distance_weight: float
    angle_weight: float
    mean: bool = True  # over pairs and triplets; else their sums


# The loss, and its gradient for grad_output 1 (empty unless needs_grad), both float32 for half types. Angles are those
# at the rows ``apexes`` alone, whose mean then stands for that of all.
define(
    "rkd(Tensor student, Tensor teacher, Tensor? mask, Tensor? row_weight, Tensor? apexes, float distance_weight, "
    "float angle_weight, bool mean, bool needs_grad) -> (Tensor, Tensor)"
)


def _rkd_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from kdfast.ops.rkd import triton_kernels  # needs triton, which a machine without a GPU may lack

    return triton_kernels.rkd(*arguments)


LIBRARY.impl("rkd", _rkd_cuda, "CUDA")


@torch.library.register_fake("kdfast::rkd", lib=LIBRARY)
def _rkd_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss = scalar_loss_like(student)
    return loss, student.new_empty(student.shape if arguments[-1] else (0,), dtype=loss.dtype)


def rkd(
    student: Tensor,
    teacher: Tensor,
    options: Options,
    *,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    apexes: Tensor | None = None,
) -> Tensor:
    """The loss ``options`` describe, of rows (N, …); arguments are already checked."""
    mask = None if mask is None else mask.contiguous()
    row_weight = None if row_weight is None else row_weight.detach().double().contiguous()
    student, teacher = student.flatten(1), teacher.detach().flatten(1)
    return apply(ScalarLoss, student, torch.ops.kdfast.rkd.default, options, teacher, mask, row_weight, apexes)
