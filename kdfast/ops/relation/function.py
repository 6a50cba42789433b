"""Schemas and fake kernels of ``torch.ops.kdfast.crd``, ``pkt``, ``similarity_preserving`` and ``kernel_alignment``.

Each returns the loss and its gradient for grad_output 1: the gradient is the size of the student, and what backward
would need instead, the N x N similarities, is what no one wants to keep or compute twice. Forward and backward of the
plain formula take 8 N^2 D operations each for similarity_preserving and pkt, 4 of them for each side's share; here
it is one sweep. How backward works: ``ScalarLoss`` in kdfast/ops/autograd.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.ops.autograd import ScalarLoss, apply, scalar_loss_like
from kdfast.ops.library import LIBRARY, define
from kdfast.ops.relation import alignment, products, tiles

define(
    "crd(Tensor student, Tensor teacher, Tensor labels, float temperature, float alignment_weight, bool normalize, "
    "bool needs_grad) -> (Tensor, Tensor)"
)
define("pkt(Tensor student, Tensor teacher, float eps, bool needs_grad) -> (Tensor, Tensor)")
define("similarity_preserving(Tensor student, Tensor teacher, bool needs_grad) -> (Tensor, Tensor)")
define("kernel_alignment(Tensor student, Tensor teacher, bool centered, bool needs_grad) -> (Tensor, Tensor)")

# What turns a panel of similarities into the gradient's, and returns its share of the loss, one or more terms of a sum
# in float64. On a CPU alone: triton_kernels.py is called without an op between (steps.py).
_SIMILARITIES = "Tensor(a!) student, Tensor{} teacher, Tensor student_factor, Tensor teacher_factor"
LIBRARY.define(
    f"crd_panel({_SIMILARITIES.format('?')}, Tensor labels, int first, float temperature, float weight, float scale) "
    "-> Tensor"
)
LIBRARY.define(
    f"pkt_panel({_SIMILARITIES.format('')}, Tensor student_inverse_sum, Tensor teacher_inverse_sum, "
    "Tensor(b!) along, int first, float eps, float scale) -> Tensor"
)
# The same of whole rows, in place of the teacher's; and a matrix plus its transpose.
LIBRARY.define("similarity_rows(Tensor student, Tensor(a!) teacher, bool needs_grad) -> Tensor")
LIBRARY.define("symmetrize_(Tensor(a!) matrix) -> ()")
# Steps of rows on a CPU: csrc/cpu/relation_rows.h.
LIBRARY.define("sum_of_rows(Tensor x, Tensor weight) -> Tensor")
LIBRARY.define("products_of_rows(Tensor x, Tensor vector) -> Tensor")
LIBRARY.define(
    "back_through_norms_(Tensor(a!) grad, Tensor x, Tensor? factor, Tensor? divisor, Tensor radial, Tensor? share, "
    "Tensor? summed, Tensor? weighted, float slope) -> ()"
)


# The drivers are matrix products and what is between them on either device.
for _name, _driver in (
    ("crd", tiles.crd),
    ("pkt", tiles.pkt),
    ("similarity_preserving", products.similarity_preserving),
    ("kernel_alignment", alignment.kernel_alignment),
):
    for _key in ("CPU", "CUDA"):
        LIBRARY.impl(_name, _driver, _key)


def _fake(student: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss = scalar_loss_like(student)
    return loss, student.new_empty(student.shape if arguments[-1] else (0,), dtype=loss.dtype)


for _name in ("crd", "pkt", "similarity_preserving", "kernel_alignment"):
    torch.library.register_fake(f"kdfast::{_name}", _fake, lib=LIBRARY)


def crd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alignment_weight: float, normalize: bool
) -> Tensor:
    """The loss of :func:`kdfast.crd_loss`; arguments are already checked."""
    options = (temperature, alignment_weight, normalize)
    return apply(ScalarLoss, student, torch.ops.kdfast.crd.default, options, teacher.detach(), labels.contiguous())


def pkt(student: Tensor, teacher: Tensor, eps: float) -> Tensor:
    """The loss of :func:`kdfast.pkt_loss`; arguments are already checked."""
    return apply(ScalarLoss, student, torch.ops.kdfast.pkt.default, (eps,), teacher.detach())


def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of :func:`kdfast.similarity_preserving_loss`; arguments are already checked."""
    return apply(ScalarLoss, student, torch.ops.kdfast.similarity_preserving.default, (), teacher.detach())


def kernel_alignment(student: Tensor, teacher: Tensor, centered: bool) -> Tensor:
    """The loss of :func:`kdfast.kernel_alignment_loss`; arguments are already checked."""
    return apply(ScalarLoss, student, torch.ops.kdfast.kernel_alignment.default, (centered,), teacher.detach())
