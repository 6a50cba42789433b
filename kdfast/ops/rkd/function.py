"""Schemas, fake kernels and autograd function of ``torch.ops.kdfast.rkd``.

The gradient is made in forward, by the sweep that makes the loss, for grad_output 1, and kept in the dtype it was
computed in: float16 is rounded to after the loss scale of grad_output has reached it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.autograd import LIBRARY, _scaled, define, differentiable_once


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


def compute_dtype(x: Tensor) -> torch.dtype:
    """What kernels compute and return: float32 for half types."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@torch.library.register_fake("kdfast::rkd", lib=LIBRARY)
def _rkd_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype, needs_grad = compute_dtype(student), arguments[-1]
    return student.new_empty((), dtype=dtype), student.new_empty(student.shape if needs_grad else (0,), dtype=dtype)


class ScalarLoss(torch.autograd.Function):
    """``op(student, *arguments, needs_grad) -> (loss, grad)`` with a loss without dimensions."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, op: Any, *arguments: Any) -> Tensor:
        needs_grad = ctx.needs_input_grad[0]
        loss, grad = op(student, *arguments, needs_grad)
        ctx.dtype, ctx.inputs = student.dtype, 2 + len(arguments)
        if needs_grad:
            ctx.save_for_backward(grad)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        grad = _scaled(ctx.saved_tensors[0], grad_output.detach()).to(ctx.dtype)
        return differentiable_once(grad), *(None,) * (ctx.inputs - 1)


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
    return ScalarLoss.apply(
        student.flatten(1),
        torch.ops.kdfast.rkd.default,
        teacher.detach().flatten(1),
        mask,
        row_weight,
        apexes,
        *options,
    )
