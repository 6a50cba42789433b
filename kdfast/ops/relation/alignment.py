"""Driver of kernel alignment: the cosine between Gram matrices, and its gradient.

With c the cosine between K = X X^T and L = Y Y^T the gradient of 1 - c is ``2 (c K / |K|^2 - L / (|K| |L|)) X``. The
sums and the products are made of K and L or, by products.py, of features alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import threshold

from kdfast.ops.relation import cpu_steps
from kdfast.ops.relation.products import feature_products, features_are_cheaper, gradient_by_features, inner_products
from kdfast.ops.relation.rows import Float64, Rows, constant, empty_gradient
from kdfast.ops.relation.steps import steps_for
from kdfast.reference.geometry import no_autocast


def kernel_alignment(student: Tensor, teacher: Tensor, centered: bool, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.kernel_alignment``."""
    with no_autocast(student):
        x, y = student.detach().flatten(start_dim=1), teacher.detach().flatten(start_dim=1)
        if x.numel() == 0 or y.numel() == 0:
            return constant(1, student, needs_grad)
        # As reference.features.kernel_features has it: the factors are constants, and one tensor for both sides.
        (x, y), magnitudes = _to_unit_magnitude(x, y)
        if centered:
            (x, y), centred_magnitudes = _to_unit_magnitude(*map(_centred, (x, y)))
        grad, result = empty_gradient(student, x, needs_grad)
        loss = _one_minus_cosine(steps_for(x), x, y, x.dtype, grad if needs_grad else None)
        if needs_grad:
            if centered:
                # No mean row is taken off the way back: of K and L of centred rows the gradient has none.
                grad.div_(centred_magnitudes[0])
            grad.div_(magnitudes[0])
        return loss, result


def kernel_cosine(x: Tensor, y: Tensor) -> Tensor:
    """``<K_x, K_y> / (|K_x| |K_y|)`` of (N, D) and (N, E), in PyTorch alone, whatever the device."""
    with no_autocast(x):
        return (1 - _one_minus_cosine(cpu_steps, x, y, torch.float64, None)).to(x.dtype)


def _to_unit_magnitude(x: Tensor, y: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Each over its largest magnitude, and those (2), with infinity for that of zeros."""
    magnitudes = x.new_empty(2, dtype=torch.promote_types(x.dtype, torch.float32))
    for side, out in zip((x, y), magnitudes, strict=True):
        steps_for(x).largest_magnitude(side, out)
    magnitudes = threshold(magnitudes, 0, math.inf)
    # Of one dimension, which widens a half type that a scalar would not, in the kernel that divides.
    return (x / magnitudes[:1], y / magnitudes[1:]), magnitudes


def _centred(x: Tensor) -> Tensor:
    """Less the mean row; less the first row before, which leaves of equal rows nothing but 0."""
    x = x - x[:1]
    return x.sub_(x.mean(dim=0))


def _one_minus_cosine(steps: Any, x: Tensor, y: Tensor, dtype: torch.dtype, grad: Tensor | None) -> Tensor:
    """The loss of features, in ``dtype``, from whichever form is cheaper; its gradient is written to ``grad``."""
    if features_are_cheaper(x.shape[0], x, y, products=(2, 2, 1), instead=(2, 1)):
        s, t = (Float64(Rows(side, None, None, None)) for side in (x, y))
        ss, st, tt = feature_products(s, t)
        loss, l, k = steps.alignment_slopes(torch.stack(inner_products(ss, st, tt))[None], dtype)  # noqa: E741
        if grad is not None:
            gradient_by_features(grad, s, t, ss.mul_(k), st.mul_(l))
    else:
        K, L = x @ x.mT, y @ y.mT
        loss, l, k = steps.alignment_slopes(steps.alignment_terms(K, L), dtype)  # noqa: E741
        if grad is not None:
            torch.mm(K.mul_(k).addcmul_(L, l), x, out=grad)
    return loss
