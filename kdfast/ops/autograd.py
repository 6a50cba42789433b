"""What the autograd functions of all ops share.

The gradient of a row loss with respect to the student's logits is closed form, so forward writes it at once, for
grad_output 1: student and teacher are read once and the gradient is written once. Backward multiplies by grad_output,
and has nothing to do where that is 1. Two cases run the kernel again in backward instead, with grad_output folded in:
``reduction='none'``, where a scaled copy moves as many bytes, and float16, whose range a gradient that has not yet
been multiplied by the loss scale would leave.

On CPU tensors a gradient made in forward is kept by a node in C++ where there is one: ``nodes.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from kdfast.ops import nodes
from kdfast.ops.scale import scale_

REDUCTIONS = {"none": 0, "sum": 1, "mean": 2, "batchmean": 3}

# What a function runs: an op, its options, and the tensors beside the student.
Call = tuple[Callable[..., Any], Any, tuple[Tensor | None, ...]]


def apply(
    function: type[Any],
    student: Tensor,
    op: Callable[..., Any],
    options: Any,
    *tensors: Tensor | None,
) -> Tensor:
    """``function.apply``, to which a student looks like a constant where no gradient is recorded (``torch.no_grad``).

    Inside ``apply`` nothing is ever recorded, and ``ctx.needs_input_grad`` tells what requires a gradient elsewhere.
    Nothing else gets a gradient: as one tuple it costs autograd no time, which counts on short rows. There a node in
    C++ costs less still, and the op brings it along.
    """
    recorded = torch.is_grad_enabled()
    if (
        recorded
        and student.requires_grad
        and function.keeps_gradient(student, options)
        and nodes.differentiate(student)
    ):
        return op(student, *tensors, *options, True)[0]
    if not recorded and forward_ad._current_level < 0:  # a tangent has to meet the node, which refuses it
        student = student.detach()
    call: Call = (op, options, tensors)
    loss: Tensor = function.apply(student, call)[0]
    return loss


def loss_like(student: Tensor, reduction: int) -> Tensor:
    """An empty loss: float32 for half types, one value a row for 'none'."""
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return student.new_empty(student.shape[:-1] if reduction == REDUCTIONS["none"] else (), dtype=dtype)


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """``ctx.save_for_backward`` that also takes tensors made in inference mode, as teachers are.

    Nobody counts the writes to those, which save_for_backward wants to know of.
    """
    traced = torch.compiler.is_compiling()
    ctx.inference = {i: x for i, x in enumerate(tensors) if not traced and x is not None and x.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.inference else x for i, x in enumerate(tensors)))


def saved(ctx: Any) -> list[Any]:
    """What ``save`` has saved."""
    return [ctx.inference.get(i, x) for i, x in enumerate(ctx.saved_tensors)]


class RowLoss(torch.autograd.Function):
    """``op(student, *tensors, *options, needs_grad) -> (loss, grad)``; the last of ``tensors`` is row_weight.

    The results are the loss and what ``keep`` returns.
    """

    @staticmethod
    def keeps_gradient(student: Tensor, options: Any) -> bool:
        """Whether backward needs nothing but the gradient forward has made."""
        return options.reduction != REDUCTIONS["none"] and student.dtype is not torch.float16

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        op, options, tensors = call
        needs_grad = ctx.needs_input_grad[0]
        recompute = not RowLoss.keeps_gradient(student, options)
        loss, grad = op(student, *tensors, *options, needs_grad and not recompute)
        ctx.recompute = (op, options) if recompute else None
        if needs_grad and not recompute:
            return loss, keep(ctx, grad)
        if needs_grad:
            save(ctx, student, *tensors)
        return loss, None

    @staticmethod
    def backward(ctx: Any, grad_output: Any, _: Tensor | None) -> tuple[Tensor | None, None]:
        if ctx.recompute is None:
            return kept(ctx, grad_output), None
        op, options = ctx.recompute
        student, *tensors, row_weight = saved(ctx)
        weight = grad_output.detach().double().expand(student.shape[:-1])
        weight = (weight if row_weight is None else weight * row_weight).contiguous()
        grad = op(student.detach(), *tensors, weight, *options, True)[1]
        return differentiable_once(grad, student, grad_output), None


def scalar_loss_like(student: Tensor) -> Tensor:
    """An empty scalar: float32 for half types."""
    return loss_like(student.unsqueeze(-1), REDUCTIONS["sum"])


class ScalarLoss(torch.autograd.Function):
    """``op(student, *tensors, *options, needs_grad) -> (loss, grad)`` for losses that have no rows to tell apart.

    ``grad`` may be wider than the student, so that float16 is not rounded before grad_output has scaled it. Results as
    in ``RowLoss``.
    """

    @staticmethod
    def keeps_gradient(student: Tensor, options: Any) -> bool:
        """As in ``RowLoss``: always."""
        return True

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: Call) -> tuple[Tensor, Tensor | None]:
        op, options, tensors = call
        needs_grad = ctx.needs_input_grad[0]
        loss, grad = op(student, *tensors, *options, needs_grad)
        ctx.dtype = student.dtype
        return loss, keep(ctx, grad) if needs_grad else None

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, None]:
        return kept(ctx, grad_output, ctx.dtype), None


def keep(ctx: Any, grad: Tensor) -> Tensor | None:
    """Saves ``grad``, which forward has made, for ``kept``.

    Returns what forward has to return beside the loss: empty, but behind it stands the student, which is not kept.
    """
    if torch.compiler.is_compiling():
        ctx.save_for_backward(grad)
        return None
    place = grad.new_empty(0)
    ctx.save_for_backward(grad, place)
    ctx.set_materialize_grads(False)  # zeros for ``place`` would be one more kernel
    ctx.packed = packs_what_is_saved()
    return place


def kept(ctx: Any, grad_output: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """The gradient that ``keep`` has saved, times ``grad_output``.

    It is given away where no later backward can ask for it, and then belongs to the caller, who may write it. A
    retained graph gives a copy, also for grad_output 1, and so does what a hook has packed: it unpacks what is its own.
    """
    if grad_output is None:
        return None
    grad, *place = ctx.saved_tensors
    factor = grad_output.detach() if grad_output.requires_grad else grad_output
    if torch.compiler.is_compiling():
        grad = (grad * factor).to(grad.dtype)
    else:
        if ctx.packed or torch._C._autograd._get_current_graph_task_keep_graph():
            grad = grad.clone()
        grad = scale_(grad, factor)
    return differentiable_once(grad if dtype is None else grad.to(dtype), *place, grad_output)


def packs_what_is_saved() -> bool:
    """Whether a hook (``torch.autograd.graph.saved_tensors_hooks``) gets what a node saves now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


class _RefuseSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, held: tuple[Tensor], *behind: Tensor) -> Tensor:
        return held[0]  # in a tuple it is no input, of which this would be a view that nobody can write

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise RuntimeError(
            "kdfast losses can be differentiated once: double backward needs kdfast.backends.use('reference')"
        )


def differentiable_once(grad: Tensor, *behind: Tensor) -> Tensor:
    """``grad`` as backward returns it; under ``create_graph=True`` a derivative of it raises instead of being 0.

    ``behind``: what it depends on, or something with the same place in the graph. The derivative by any of that, or by
    what is behind it, comes by the node that raises, also where PyTorch visits no more than the way to named inputs.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _RefuseSecondDerivative.apply((grad.detach(),), *behind)
    return grad
