"""Rows as the drivers take them: flat, never a half type, with what makes unit vectors of them beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from kdfast.reference.geometry import flatten_rows

# Unit rows of up to this size are stored. Larger ones are not: the kernels scale products of the given rows instead,
STORED_BYTES = 2**20
# provided that all norms are within these: products of two are then normal float32 numbers, with as much room again for
# the elements of a row.
MODERATE = (1e-12, 1e12)
# Rows of a panel in float64: twice as many are a fifth faster, and take 7 % of an 8192 x 8192 matrix in place of 4 %.
PANEL_ROWS = 256
# A GPU takes as many more as this holds, mostly all there are: its time is launches.
FLOAT64_BYTES = {"cpu": 0, "cuda": 64 * 2**20}


class Rows(NamedTuple):
    """``x * factor``, (N, D) and (N), are the rows that are compared."""

    x: Tensor
    factor: Tensor | None  # None: 1
    divisor: Tensor | None  # x is the given rows over this; None: it is they
    radial: Tensor | None  # see into_raw_gradient; None: no norms

    def unit(self, first: int, last: int) -> Tensor:
        """Compared rows [first, last), in float64."""
        x = self.x[first:last].double()
        return x if self.factor is None else x * self.factor[first:last, None].double()


class Float64:
    """Compared rows in float64, a panel at a time; a panel of all of them is made once."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.all: Tensor | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        if last - first < self.rows.x.shape[0]:
            return self.rows.unit(first, last)
        if self.all is None:
            self.all = self.rows.unit(first, last)
        return self.all


def float64_panels(*sides: Rows) -> Iterator[tuple[int, int]]:
    """Panels of rows that are made in float64, of each of ``sides`` one."""
    x = sides[0].x
    width = max(rows.x.shape[1] for rows in sides)
    return panels(x.shape[0], max(FLOAT64_BYTES[x.device.type] // max(8 * width, 1), PANEL_ROWS))


def raw_rows(x: Tensor) -> Rows:
    """Rows that are compared as they are."""
    return Rows(_given(x), None, None, None)


def unit_rows(student: Tensor, teacher: Tensor, eps: float, *, add_eps: bool = False) -> tuple[Rows, Rows]:
    """Rows over their norm, as :func:`kdfast.reference.geometry.unit_rows` defines it: zero rows stay 0.

    What is 0 there is divided by infinity here, and both sides' norms are one tensor: a launch a step on a GPU.
    """
    s, t = _given(student), _given(teacher)
    norms = s.new_empty(2, s.shape[0])
    for x, out in zip((s, t), norms, strict=True):
        torch.linalg.vector_norm(x, dim=1, out=out)
    later = [_scaled_later(x, norm) for x, norm in zip((s, t), norms, strict=True)]
    divisors = threshold(norms, 0, math.inf)
    if add_eps:
        radial = divisors
        divisors = divisors + eps
    else:
        divisors.clamp_(min=eps)
        radial = norms.masked_fill_(norms < eps, math.inf)  # a clamped norm is a constant
    first, second = map(_over_norms, (s, t), divisors, radial, later)
    return first, second


def _given(x: Tensor) -> Tensor:
    return flatten_rows(x.detach()).contiguous()


def _scaled_later(x: Tensor, norms: Tensor) -> bool:
    """Whether unit rows are not stored. Only the CPU can look at norms without waiting for the device."""
    if norms.device.type != "cpu" or x.numel() * x.element_size() <= STORED_BYTES:
        return False
    smallest, largest = torch.where(norms == 0, 1.0, norms).aminmax()
    return MODERATE[0] < float(smallest) and float(largest) < MODERATE[1]


def _over_norms(x: Tensor, divisor: Tensor, radial: Tensor, later: bool) -> Rows:
    if later:
        return Rows(x, 1 / divisor, None, divisor * radial)
    return Rows(x / divisor[:, None], None, divisor, radial)


def into_raw_gradient(grad: Tensor, rows: Rows, panel: tuple[int, int]) -> None:
    """Turns ``factor_i dL/du_i`` of a panel's rows, u = x * factor, into the gradient of the given rows, in place."""
    if rows.radial is None:
        return
    first, last = panel
    g, x = grad[first:last], rows.x[first:last]
    along = (g * x).sum(dim=1).div_(rows.radial[first:last])
    if rows.divisor is not None:
        g.div_(rows.divisor[first:last, None])
    g.addcmul_(x, along[:, None], value=-1)


def panels(n: int, rows: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each panel of ``rows`` rows, the last one shorter."""
    for first in range(0, n, rows):
        yield first, min(first + rows, n)


def empty_gradient(student: Tensor, x: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """(N, D) like ``x`` to be written, and what the op returns: the same in the student's shape, or nothing."""
    grad = x.new_empty(x.shape if needs_grad else 0)
    return grad, grad.view(student.shape) if needs_grad else grad


def total(shares: list[Tensor]) -> Tensor:
    """The sum of all elements of one or more tensors, in float64."""
    flat = [share.reshape(-1) for share in shares]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).sum(dtype=torch.float64)


def mean_of_pairs(summed: Tensor, x: Tensor) -> Tensor:
    """``summed`` over N^2, a scalar in the dtype of ``x`` (N, D)."""
    return torch.div(summed, max(x.shape[0] ** 2, 1), out=x.new_empty(()))
