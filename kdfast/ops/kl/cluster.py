"""Launcher of ``torch.ops.kdfast.kl_cluster``: forward and reverse KL of long rows, each by a cluster of thread blocks.

Runs what it was measured to be faster at than Triton (``is_faster``), and all it can where
``kdfast.backends.use('cuda')`` asks for it; what it cannot run is an error then, not another kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.kl.function import KINDS

BYTES = 16  # copied at once, so rows begin at multiples of it
# Itemsize -> classes from which it was faster on an H100, at 32000 and 128256 of bfloat16 and at 128256 of float32, and
# the bytes of a row that still fit in the shared memory of eight blocks beside the other side's.
LONG, LONGEST = {2: 32000, 4: 65537}, 800 * 2**10


def kl(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    kind: int,
    scale: float,
    alpha: float,
    beta: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.kl``: the loss, and its gradient for grad_output 1, empty unless ``needs_grad``."""
    refuse(student, labels, kind, ce_weight)
    grad = torch.empty(student.shape if needs_grad else (0,), dtype=student.dtype, device=student.device)
    out = grad.view(-1, student.shape[-1]) if needs_grad else None
    return launch(rows_of(student), teacher, out, mask, row_weight, temperature, kind, scale, reduction, student), grad


def kl_(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    kind: int,
    scale: float,
    alpha: float,
    beta: float,
    ce_weight: float,
    label_smoothing: float,
    ignore_index: int,
    reduction: int,
) -> Tensor:
    """``torch.ops.kdfast.kl_``: the gradient overwrites the student."""
    refuse(student, labels, kind, ce_weight)
    if not student.is_contiguous() or student.data_ptr() % BYTES != 0:
        cannot_run("in place it takes contiguous logits that begin at a multiple of 16 bytes")
    rows = student.view(-1, student.shape[-1])
    return launch(rows, teacher, rows, mask, row_weight, temperature, kind, scale, reduction, student)


def is_faster(student: Tensor, teacher: Tensor, labels: Tensor | None, kind: int, ce_weight: float) -> bool:
    """Whether it was measured to make a gradient of such rows faster than Triton."""
    return (
        student.shape[-1] >= LONG.get(student.element_size(), 2**63)
        and student.shape[-1] * student.element_size() <= LONGEST
        and unfit(student, labels, kind, ce_weight) is None
        and in_place(student) is not None
        and in_place(teacher) is not None
    )


def unfit(student: Tensor, labels: Tensor | None, kind: int, ce_weight: float) -> str | None:
    """Why it cannot run on these arguments, on any device."""
    if kind not in (KINDS["forward"], KINDS["reverse"]) or ce_weight != 0 or labels is not None:
        return "it computes forward and reverse KL, without labels"
    if student.shape[-1] * student.element_size() % BYTES != 0:
        return f"rows must be multiples of 16 bytes, these have {student.shape[-1]} classes of {student.dtype}"
    return None


def refuse(student: Tensor, labels: Tensor | None, kind: int, ce_weight: float) -> None:
    reason = unfit(student, labels, kind, ce_weight)
    if reason is not None:
        cannot_run(reason)
    if torch.cuda.get_device_capability(student.device)[0] < 9:
        cannot_run("thread-block clusters need compute capability 9.0")


def cannot_run(reason: str) -> None:
    raise RuntimeError(f"backend 'cuda' was asked for but cannot run: {reason}")


def in_place(x: Tensor) -> Tensor | None:
    """``x`` as (rows, classes) if its rows are adjacent elements beginning at multiples of 16 bytes, else None."""
    if x.dim() != 2 and not x.is_contiguous():
        return None
    rows = x.view(-1, x.shape[-1])
    step = rows.stride(0) * x.element_size()
    fits = (x.shape[-1] == 1 or rows.stride(-1) == 1) and step % BYTES == 0 and rows.data_ptr() % BYTES == 0
    return rows if fits else None


def rows_of(x: Tensor) -> Tensor:
    """``x`` as (rows, classes), in place where it can be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows.clone(memory_format=torch.contiguous_format) if in_place(rows) is None else rows


def launch(
    rows: Tensor,
    teacher: Tensor,
    grad: Tensor | None,
    mask: Tensor | None,
    row_weight: Tensor | None,
    temperature: float,
    kind: int,
    scale: float,
    reduction: int,
    student: Tensor,
) -> Tensor:
    from kdfast.ops.kl.triton_kernels import average

    count, classes = rows.shape
    losses = torch.empty(student.shape[:-1], dtype=torch.float32, device=student.device)
    if count > 0:
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        row_weight = None if row_weight is None else row_weight.double().contiguous()
        with torch.cuda.device_of(student):
            weight, count_factor = average(reduction, count, classes, None, mask, 0, student.device)
        torch.ops.kdfast.kl_cluster(
            rows, rows_of(teacher), grad, losses, mask, row_weight, count_factor, temperature,
            kind == KINDS["reverse"], scale, weight,
        )  # fmt: skip
    return losses if reduction == REDUCTIONS["none"] else losses.sum()
