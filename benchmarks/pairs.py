"""The losses on all pairs of rows by their formulas, some rows of the N x N matrices at a time: the truth at any N.

Plain PyTorch in any dtype, forward and backward, with the losses' default options; tests/test_benchmarks.py holds it
against kdfast.reference.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kdfast.reference.geometry import flatten_rows, unit_rows

ROWS = 256  # of the matrices held at a time
TEMPERATURE, EPS = 0.1, 1e-7

Share = Callable[..., Tensor]  # student, teacher, rows, labels -> the sum over all pairs that begin in ``rows``


def crd(student: Tensor, teacher: Tensor, rows: slice, labels: Tensor) -> Tensor:
    s, t = (x[rows] @ x.mT / TEMPERATURE for x in (student, teacher))
    signed = torch.where(labels[rows, None] == labels, s, -s)
    return (s - t).square().sum() - F.logsigmoid(signed).sum()


def pkt(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
    similarities = (((1 + x[rows] @ x.mT) / 2).clamp(min=0) for x in (student, teacher))
    c_student, c_teacher = (k / k.sum(dim=1, keepdim=True) for k in similarities)
    return (c_teacher * ((c_teacher + EPS) / (c_student + EPS)).log()).sum()


def similarity_preserving(student: Tensor, teacher: Tensor, rows: slice) -> Tensor:
    g_student, g_teacher = (F.normalize(x[rows] @ x.mT, dim=1) for x in (student, teacher))
    return (g_student - g_teacher).square().sum()


def by_blocks(share: Share, student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean over all pairs. Backward makes a block's similarities again, so that none is kept."""
    student, teacher = flatten_rows(student), flatten_rows(teacher)
    if share is pkt:
        student, teacher = (unit_rows(x, EPS, add_eps=True) for x in (student, teacher))
    n, rest = len(student), () if labels is None else (labels,)
    total = student.new_zeros(())
    for first in range(0, n, ROWS):
        total = total + checkpoint(share, student, teacher, slice(first, first + ROWS), *rest, use_reentrant=False)
    return total / n**2
