"""Rows as the drivers take them: flat, never a half type, with what makes unit vectors of them beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.reference.geometry import flatten_rows

# Unit rows of up to this size are stored. Larger ones are not: the kernels scale products of the given rows instead,
STORED_BYTES = 2**20
# provided that all norms are within these: products of two are then normal float32 numbers, with as much room again for
# the elements of a row.
MODERATE = (1e-12, 1e12)


class Rows(NamedTuple):
    """``x * factor``, (N, D) and (N), are the rows that are compared."""

    x: Tensor
    factor: Tensor
    radial: Tensor | None  # see into_raw_gradient; None: no norms
    scale: Tensor | None  # x is the given rows times this; None: it is they

    def unit(self, first: int, last: int) -> Tensor:
        """Compared rows [first, last), in float64."""
        return self.x[first:last].double() * self.factor[first:last, None].double()


def raw_rows(x: Tensor) -> Rows:
    """Rows that are compared as they are."""
    x = flatten_rows(x.detach()).contiguous()
    return Rows(x, x.new_ones(x.shape[0]), None, None)


def unit_rows(x: Tensor, eps: float, *, add_eps: bool = False) -> Rows:
    """Rows over their norm, as :func:`kdfast.reference.geometry.unit_rows` defines it: zero rows stay 0."""
    x = flatten_rows(x.detach()).contiguous()
    norms = torch.linalg.vector_norm(x, dim=1)
    zero = norms == 0
    divisor = norms + eps if add_eps else norms.clamp(min=eps)
    inverse = torch.where(zero, 0.0, 1 / divisor)
    clamped = zero if add_eps else zero | (norms < eps)  # a clamped norm is a constant
    along = torch.where(clamped, 0.0, 1 / torch.where(clamped, 1.0, norms))
    if _scaled_later(x, norms, zero):
        return Rows(x, inverse, inverse * along, None)
    unit = torch.where(zero[:, None], 0.0, x) / divisor[:, None]
    return Rows(unit, torch.ones_like(norms), divisor * along, inverse)


def _scaled_later(x: Tensor, norms: Tensor, zero: Tensor) -> bool:
    """Whether unit rows are not stored. Only the CPU can look at norms without waiting for the device."""
    if norms.device.type != "cpu" or x.numel() * x.element_size() <= STORED_BYTES:
        return False
    smallest, largest = torch.where(zero, 1.0, norms).aminmax()
    return MODERATE[0] < float(smallest) and float(largest) < MODERATE[1]


def into_raw_gradient(grad: Tensor, rows: Rows, panel: tuple[int, int]) -> None:
    """Turns ``factor_i dL/du_i`` of a panel's rows, u = x * factor, into the gradient of the given rows, in place."""
    first, last = panel
    g, x = grad[first:last], rows.x[first:last]
    if rows.radial is not None:
        along = (g * x).sum(dim=1) * rows.radial[first:last]
        g.addcmul_(x, along[:, None], value=-1)
    if rows.scale is not None:
        g.mul_(rows.scale[first:last, None])


def panels(n: int, rows: int) -> Iterator[tuple[int, int]]:
    """[first, last) of each panel of ``rows`` rows, the last one shorter."""
    for first in range(0, n, rows):
        yield first, min(first + rows, n)
