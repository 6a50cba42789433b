"""Schema, fake kernel and options of ``torch.ops.kdfast.kl``: every loss on full rows of logits.

How backward works: kdfast/ops/autograd.py; here is only its in-place form.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast import backends
from kdfast.ops.autograd import (
    REDUCTIONS,
    Call,
    RowLoss,
    apply,
    differentiable_once,
    loss_like,
    packs_what_is_saved,
)
from kdfast.ops.library import LIBRARY, define
from kdfast.ops.scale import scale_

KINDS = {"forward": 0, "reverse": 1, "js": 2, "dkd": 3, "standardized": 4}


class Options(NamedTuple):
    """The op's arguments that are not tensors."""

    temperature: float
    kind: int
    scale: float  # of the divergence
    alpha: float = 1.0  # dkd: weight of the target's share
    beta: float = 0.5  # js: the teacher's share of the mixture; dkd: weight of the other classes
    ce_weight: float = 0.0  # forward only: adds this much cross-entropy at T = 1; no labels: the teacher's argmax
    label_smoothing: float = 0.0
    ignore_index: int = -100
    reduction: int = REDUCTIONS["batchmean"]


_ARGUMENTS = (
    "Tensor teacher, Tensor? labels, Tensor? mask, Tensor? row_weight, float temperature, int kind, float scale, "
    "float alpha, float beta, float ce_weight, float label_smoothing, int ignore_index, int reduction"
)
# The loss, and its gradient for grad_output 1 (empty unless needs_grad).
define(f"kl(Tensor student, {_ARGUMENTS}, bool needs_grad) -> (Tensor, Tensor)")
# The same with the gradient written over the student.
LIBRARY.define(f"kl_(Tensor(a!) student, {_ARGUMENTS}) -> Tensor")


def _kl_cuda(student: Tensor, teacher: Tensor, labels: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _launchers(student, teacher, labels, *arguments).kl(student, teacher, labels, *arguments)


def _kl_inplace_cuda(student: Tensor, teacher: Tensor, labels: Tensor | None, *arguments: Any) -> Tensor:
    return _launchers(student, teacher, labels, *arguments, True).kl_(student, teacher, labels, *arguments)


def _launchers(student: Tensor, teacher: Tensor, labels: Tensor | None, *arguments: Any) -> Any:
    """The module whose kernels are the fastest here, or those asked for."""
    from kdfast.ops.kl import cluster, triton_kernels  # need triton, which a machine without a GPU may lack

    _, _, _, kind, _, _, _, ce_weight, *_, needs_grad = arguments
    faster = needs_grad and cluster.is_faster(student, teacher, labels, kind, ce_weight)
    return cluster if backends.prefers_cuda("kl", student, faster) else triton_kernels


LIBRARY.impl("kl", _kl_cuda, "CUDA")
LIBRARY.impl("kl_", _kl_inplace_cuda, "CUDA")


@torch.library.register_fake("kdfast::kl", lib=LIBRARY)
def _kl_fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, reduction, needs_grad = arguments
    return loss_like(student, reduction), student.new_empty(student.shape if needs_grad else (0,))


@torch.library.register_fake("kdfast::kl_", lib=LIBRARY)
def _kl_inplace_fake(student: Tensor, *arguments: Any) -> Tensor:
    return loss_like(student, arguments[-1])


def _follows_writes(tensor: Tensor) -> bool:
    """Whether autograd can record that a function with another result too has overwritten ``tensor``.

    A leaf's gradient is its own, the base of a view has other parts, what retains its gradient would get that of a
    later use, and tracers do not know ``mark_dirty``.
    """
    if torch.compiler.is_compiling():
        return False
    return not (tensor.is_leaf or tensor._is_view() or tensor.retains_grad)


class _KLInplace(torch.autograd.Function):
    """The loss and, where autograd can follow it, the student as what forward has made of it: no logits any more."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        op, options, tensors = call
        loss = op(student.detach(), *tensors, *options)
        # Whoever saved the logits before is told in backward, by their version; whoever uses them later by this node.
        followed = _follows_writes(student)
        if followed:
            ctx.mark_dirty(student)  # bumps the version, as a traced write does
        elif not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(student)
        ctx.save_for_backward(student)
        ctx.set_materialize_grads(False)
        ctx.spent = False
        ctx.packed = not torch.compiler.is_compiling() and packs_what_is_saved()
        return loss, student if followed else None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, later_use: Tensor | None) -> tuple[Tensor | None, None]:
        if later_use is not None:
            raise RuntimeError(
                "student_logits were used after inplace_backward=True had overwritten them with their gradient: "
                "compute everything else from the logits before, or set inplace_backward=False"
            )
        if grad_output is None:
            return None, None
        if ctx.spent:
            raise RuntimeError(
                "inplace_backward=True keeps one gradient, in the storage of student_logits, and it has been used: "
                "a second backward needs inplace_backward=False"
            )
        ctx.spent = True
        (student,) = ctx.saved_tensors
        grad = student.detach().clone() if ctx.packed else student.detach()  # what a hook unpacks is its own
        factor = grad_output.detach()
        grad = grad.mul_(factor.unsqueeze(-1)) if factor.dim() > 0 else scale_(grad, factor)
        return differentiable_once(grad, student, grad_output), None


def kl(
    student_logits: Tensor,
    teacher_logits: Tensor,
    options: Options,
    *,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """The loss ``options`` describe; arguments are already checked."""
    teacher_logits = teacher_logits.detach() if teacher_logits.requires_grad else teacher_logits
    labels = None if labels is None else labels.contiguous()
    mask = None if mask is None else mask.contiguous()
    row_weight = None if row_weight is None else row_weight.detach().double().contiguous()
    tensors = (teacher_logits, labels, mask, row_weight)
    if inplace_backward and torch.is_grad_enabled() and student_logits.requires_grad:
        loss: Tensor = _KLInplace.apply(student_logits, (torch.ops.kdfast.kl_.default, options, tensors))[0]
        return loss
    return apply(RowLoss, student_logits, torch.ops.kdfast.kl.default, options, *tensors)
