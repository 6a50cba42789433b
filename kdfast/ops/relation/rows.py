"""Rows as the drivers take them: flat, never a half type, with what makes unit vectors of them beside them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

from kdfast.ops.autograd import scalar_loss_like
from kdfast.reference.geometry import flatten_rows

EPS = 1e-12  # of similarity_preserving's norms
# Rows of a panel in float64: twice as many are a fifteenth faster, and similarity_preserving can then take more than
# 5 % of an 8192 x 8192 matrix.
PANEL_ROWS = 128
# A GPU takes as many more as this holds, mostly all there are: its time is launches.
FLOAT64_BYTES = {"cpu": 0, "cuda": 64 * 2**20}


class Rows(NamedTuple):
    """``x * factor``, (N, D) and (N), are the rows that are compared."""

    x: Tensor
    factor: Tensor | None  # None: 1
    divisor: Tensor | None  # x is the given rows over this; None: it is they
    radial: Tensor | None  # see into_raw_gradient of either device; None: no norms, or no gradient is asked for


class Float64:
    """Compared rows in float64, a panel at a time in the memory of the last; a panel of all of them is made once."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.memory = rows.x.new_empty(0, dtype=torch.float64)
        self.held: tuple[int, int] | None = None

    def __call__(self, first: int, last: int) -> Tensor:
        x, factor = self.rows.x[first:last], self.rows.factor
        if len(self.memory) < len(x):
            self.memory = torch.empty_like(x, dtype=torch.float64)
        panel = self.memory[: len(x)]
        if self.held != (first, last):
            panel.copy_(x)
            if factor is not None:
                panel *= factor[first:last, None]
            self.held = first, last
        return panel


def float64_panels(*sides: Rows) -> Iterator[tuple[int, int]]:
    """Panels of rows that are made in float64, of each of ``sides`` one."""
    x = sides[0].x
    width = max(rows.x.shape[1] for rows in sides)
    return panels(x.shape[0], max(FLOAT64_BYTES[x.device.type] // max(8 * width, 1), PANEL_ROWS))


class RowSums(NamedTuple):
    """What pkt makes of the sums over j of k_ij = (1 + <u_i, u_j>) / 2."""

    summed: Tensor  # (D) float64: sum_j u_j of the student
    inverse: Tensor  # (N) float64: 1 / sum_j k_ij of the student
    rounded: Tensor  # (2, N): the same of student and teacher, as the panels take it
    excess: Tensor  # (N) float64: what the rounding adds to the sum over j of student's less teacher's probabilities
    along: Tensor  # (N) float64: where panels add up w_ij c_ij


def raw_rows(x: Tensor) -> Rows:
    """Rows that are compared as they are."""
    return Rows(given(x), None, None, None)


def given(x: Tensor) -> Tensor:
    """(N, …) as the drivers take it."""
    return flatten_rows(x.detach()).contiguous()


def inverse_norms(norms: Tensor) -> Tensor:
    """``1 / max(norm, EPS)``, 0 for a norm of 0."""
    return threshold(norms, 0, math.inf).clamp_(min=EPS).reciprocal_()


def panels(n: int, rows: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each panel of ``rows`` rows, the last one shorter."""
    for first in range(0, n, rows):
        yield first, min(first + rows, n)


def empty_gradient(student: Tensor, x: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """(N, D) like ``x`` to be written, and what the op returns: the same in the student's shape, or nothing."""
    grad = x.new_empty(x.shape if needs_grad else 0)
    return grad, grad.view(student.shape) if needs_grad else grad


def constant(value: float, student: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
    """What an op returns that has nothing to compare: a loss of ``value`` and a gradient of 0."""
    loss = scalar_loss_like(student).fill_(value)
    return loss, loss.new_zeros(student.shape if needs_grad else 0)


def total(shares: list[Tensor]) -> Tensor:
    """The sum of all elements of one or more tensors, in float64."""
    flat = [share.reshape(-1) for share in shares]
    return (flat[0] if len(flat) == 1 else torch.cat(flat)).sum(dtype=torch.float64)


def mean_of_pairs(summed: Tensor, x: Tensor) -> Tensor:
    """``summed`` over N^2, a scalar in the dtype of ``x`` (N, D)."""
    return torch.div(summed, max(x.shape[0] ** 2, 1), out=x.new_empty(()))
