"""Losses on logits (..., V), in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor

from kdfast.reference.geometry import unit_rows

PADDING_INDEX = -100


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    direction: str = "forward",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_by_temperature: bool = True,
    inplace_backward: bool = False,
) -> Tensor:
    """``T^2 * sum_v p (log p - log q)``: forward has p = teacher, q = student; reverse has them exchanged.

    ``inplace_backward`` saves memory in the kernels and does nothing here.
    """
    student, teacher = widen(student_logits, mask), widen(teacher_logits.detach(), mask)
    log_p_student = torch.log_softmax(student / temperature, dim=-1)
    log_p_teacher = torch.log_softmax(teacher / temperature, dim=-1)
    if direction == "forward":
        rows = divergence(log_p_teacher, log_p_student)
    else:
        rows = divergence(log_p_student, log_p_teacher)
    if scale_by_temperature:
        rows = rows * temperature**2
    return reduce_rows(rows, reduction, mask, row_weight, num_classes=student_logits.shape[-1])


def js_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    """``beta KL(t || m) + (1 - beta) KL(s || m)``, ``m = beta t + (1 - beta) s``; no ``T^2``.

    beta 0 is KL(t || s) and beta 1 is KL(s || t). The mixture is formed in log space.
    ``inplace_backward`` saves memory in the kernels and does nothing here.
    """
    student, teacher = widen(student_logits, mask), widen(teacher_logits.detach(), mask)
    log_s = torch.log_softmax(student / temperature, dim=-1)
    log_t = torch.log_softmax(teacher / temperature, dim=-1)
    if beta == 0:
        rows = divergence(log_t, log_s)
    elif beta == 1:
        rows = divergence(log_s, log_t)
    else:
        # logaddexp(-inf, -inf) has a NaN gradient: a class that neither side has is taken out before and adds 0 after.
        absent = (log_s == -torch.inf) & (log_t == -torch.inf)
        log_m = torch.logaddexp(
            log_t.masked_fill(absent, 0.0) + math.log(beta), log_s.masked_fill(absent, 0.0) + math.log1p(-beta)
        )
        rows = beta * divergence(log_t, log_m) + (1 - beta) * divergence(log_s, log_m)
    return reduce_rows(rows, reduction, mask, row_weight, num_classes=student_logits.shape[-1])


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    inplace_backward: bool = False,
) -> Tensor:
    """``alpha T^2 KL(t || s) + (1 - alpha) CE(s, labels)``: alpha weighs the KL; CE is at T = 1.

    ``labels=None`` takes the teacher's argmax. ``inplace_backward`` saves memory in the kernels and does nothing here.
    """
    mask = None if labels is None else labels != ignore_index
    if labels is None:
        labels = teacher_logits.argmax(dim=-1)
    rows = kl_divergence(student_logits, teacher_logits, temperature, reduction="none", mask=mask)
    rows = mix_cross_entropy(rows, student_logits, labels, alpha, label_smoothing, mask)
    return reduce_rows(rows, reduction, mask)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """``T^2 (alpha TCKD + beta NCKD)``, mean over rows: KL of (target, rest), and KL among the classes of the rest."""
    student, teacher = widen(student_logits) / temperature, widen(teacher_logits.detach()) / temperature
    others = torch.arange(student.shape[-1], device=student.device) != labels.unsqueeze(-1)
    target_kl = divergence(log_target_and_rest(teacher, labels, others), log_target_and_rest(student, labels, others))
    other_kl = divergence(log_softmax_where(teacher, others), log_softmax_where(student, others))
    return reduce_rows((alpha * target_kl + beta * other_kl) * temperature**2, "batchmean")


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """``T^2 (beta (1 - mean_rows r) + gamma (1 - mean_columns r))``, r the Pearson correlation of the softmaxes."""
    num_classes = student_logits.shape[-1]
    student, teacher = widen(student_logits).reshape(-1, num_classes), widen(teacher_logits.detach())
    if student.shape[0] == 0:
        return student.sum()
    p_student = torch.softmax(student / temperature, dim=-1)
    p_teacher = torch.softmax(teacher.reshape(-1, num_classes) / temperature, dim=-1)
    between_classes = 1 - correlation(p_student, p_teacher).mean()
    within_class = 1 - correlation(p_student.T, p_teacher.T).mean()
    return temperature**2 * (beta * between_classes + gamma * within_class)


def standardized_kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    *,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """``kl_divergence`` of ``z = (x - mean) / (1e-7 + std)``, unbiased std over the classes; a constant row: 0."""
    student, teacher = standardize(widen(student_logits, mask)), standardize(widen(teacher_logits.detach(), mask))
    return kl_divergence(student, teacher, temperature, reduction=reduction, mask=mask, row_weight=row_weight)


def topk_kl_divergence(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    *,
    values: str = "logits",
    temperature: float = 1.0,
    tail: str = "drop",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
) -> Tensor:
    """``T^2 sum_k p_t (log p_t - log p_s)`` over the k classes a row lists; ``tail`` says what the others become."""
    student = widen(student_logits, mask) / temperature
    stored = teacher_values.detach().to(student.dtype)
    listed = (teacher_indices != PADDING_INDEX) & (stored != -torch.inf)
    if mask is not None:
        listed = listed & mask.unsqueeze(-1)
    refuse_duplicates(teacher_indices, listed)
    indices = teacher_indices.long().masked_fill(~listed, 0)

    if values == "logits" or tail == "renormalize":
        log_p_teacher = log_softmax_where(stored / temperature, listed)
    else:
        log_p_teacher = stored.masked_fill(~listed, -torch.inf)
    if tail == "renormalize":
        log_p_student = log_softmax_where(student.gather(-1, indices), listed)
    else:
        log_p_student = torch.log_softmax(student, dim=-1).gather(-1, indices)
    if tail == "bucket":
        rounding = stored.shape[-1] * torch.finfo(teacher_values.dtype).eps
        log_rest_teacher, log_rest_student = log_rests(log_p_teacher, student, indices, listed, rounding)
        log_p_teacher = torch.cat([log_p_teacher, log_rest_teacher.unsqueeze(-1)], dim=-1)
        log_p_student = torch.cat([log_p_student, log_rest_student.unsqueeze(-1)], dim=-1)
    rows = divergence(log_p_teacher, log_p_student) * temperature**2
    return reduce_rows(rows, reduction, mask, num_classes=student_logits.shape[-1])


def linear_kl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """KL or JS of ``hidden @ weight.T + bias``; with labels, ``alpha`` times that plus ``(1 - alpha)`` times CE.

    The logits are formed in the dtype of the input, then widened.
    """
    if labels is not None:
        mask = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    student_logits = last_layer(student_hidden, student_weight, student_bias, mask)
    with torch.no_grad():
        teacher_logits = last_layer(teacher_hidden, teacher_weight, teacher_bias)
    if divergence == "js":
        rows = js_divergence(student_logits, teacher_logits, beta, temperature, reduction="none", mask=mask)
    else:
        rows = kl_divergence(
            student_logits, teacher_logits, temperature, direction=divergence, reduction="none", mask=mask
        )
    if labels is not None:
        rows = mix_cross_entropy(rows, student_logits, labels, alpha, label_smoothing, mask)
    return reduce_rows(rows, reduction, mask, row_weight)


def last_layer(hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None = None) -> Tensor:
    """Logits of hidden states; what a row holds that ``mask`` drops (NaN, inf) reaches neither weight nor bias."""
    if mask is not None:
        # Here and not only in the logits: the backward product would carry 0 * NaN into the weight's gradient.
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), 0.0)
    return F.linear(hidden, weight, bias)


def widen(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Half types to float32, before any arithmetic; masked rows to 0: what they hold (NaN, inf) reaches nothing."""
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return logits if mask is None else logits.masked_fill(~mask.unsqueeze(-1), 0.0)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``sum_v p (log p - log q)`` over the last dimension; a class with p = 0 adds 0, whatever q is."""
    p = log_p.exp()
    return (p * torch.where(p > 0, log_p - log_q, 0.0)).sum(dim=-1)


def reduce_rows(
    rows: Tensor, reduction: str, mask: Tensor | None = None, row_weight: Tensor | None = None, *, num_classes: int = 1
) -> Tensor:
    """One value a row to what ``reduction`` asks for; rows that ``mask`` drops are 0 and do not count.

    'batchmean' divides by the number of rows that count, 'mean' by that times ``num_classes``; no row left gives 0.
    """
    if row_weight is not None:
        rows = rows * row_weight.detach().to(rows.dtype)
    if mask is not None:
        rows = rows.masked_fill(~mask, 0.0)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    per_row = total / (max(rows.numel(), 1) if mask is None else mask.sum().clamp(min=1))
    return per_row / num_classes if reduction == "mean" else per_row


def mix_cross_entropy(
    rows: Tensor, student_logits: Tensor, labels: Tensor, alpha: float, label_smoothing: float, mask: Tensor | None
) -> Tensor:
    """``alpha rows + (1 - alpha) CE`` of each row; a term of weight 0 is left out, also where it is infinite."""
    if alpha == 1:
        return rows
    student = widen(student_logits, mask)
    labels = labels if mask is None else labels.masked_fill(~mask, 0)
    cross_entropy = F.cross_entropy(
        student.reshape(-1, student.shape[-1]), labels.reshape(-1), reduction="none", label_smoothing=label_smoothing
    ).reshape(labels.shape)
    return cross_entropy if alpha == 0 else alpha * rows + (1 - alpha) * cross_entropy


def log_softmax_where(logits: Tensor, keep: Tensor) -> Tensor:
    """log-softmax among the classes that ``keep`` marks, -inf for the others; all of them at -inf: gradient 0."""
    logits = logits.masked_fill(~keep, -torch.inf)
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    return torch.log_softmax(logits.masked_fill(empty, 0.0), dim=-1).masked_fill(~keep | empty, -torch.inf)


def logsumexp_where(logits: Tensor, keep: Tensor) -> Tensor:
    """logsumexp of what ``keep`` marks; nothing there: -inf and gradient 0, where torch's gradient is NaN."""
    logits = logits.masked_fill(~keep, -torch.inf)
    empty = (logits == -torch.inf).all(dim=-1, keepdim=True)
    return logits.masked_fill(empty, 0.0).logsumexp(dim=-1).masked_fill(empty.squeeze(-1), -torch.inf)


def log_target_and_rest(logits: Tensor, labels: Tensor, others: Tensor) -> Tensor:
    """(…, 2): ``log p_y`` and ``log(1 - p_y)``, the latter a sum over the others: exact however near p_y is to 1."""
    log_p = torch.log_softmax(logits, dim=-1)
    return torch.stack([log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1), logsumexp_where(log_p, others)], dim=-1)


def log_rests(
    log_p_teacher: Tensor, student: Tensor, indices: Tensor, listed: Tensor, rounding: float
) -> tuple[Tensor, Tensor]:
    """Log probability of all classes a row does not list, for teacher and student; -inf where that is none."""
    num_classes = student.shape[-1]
    unlisted = torch.ones(*student.shape[:-1], num_classes + 1, dtype=torch.bool, device=student.device)
    # Padding marks the extra last column.
    unlisted = unlisted.scatter(-1, indices.masked_fill(~listed, num_classes), False)[..., :num_classes]
    log_rest_student = logsumexp_where(torch.log_softmax(student, dim=-1), unlisted)
    log_mass = logsumexp_where(log_p_teacher, listed).clamp(max=0.0)
    # log(1 - mass) by the formula that does not cancel on its side of log(1/2).
    log_rest = torch.where(log_mass > -math.log(2), (-log_mass.expm1()).log(), (-log_mass.exp()).log1p())
    # What rounding leaves of 1 - mass is no mass: it would be infinitely far from a student that has none.
    is_rounding = (log_rest_student == -torch.inf) & (log_mass > -rounding)
    return log_rest.masked_fill(~unlisted.any(dim=-1) | is_rounding, -torch.inf), log_rest_student


def refuse_duplicates(indices: Tensor, listed: Tensor) -> None:
    """The one check of this file: a class listed twice has no meaning. On a GPU it would wait for the device."""
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(indices, FakeTensor):
        return
    ordered = indices.masked_fill(~listed, -1).sort(dim=-1).values
    if bool(((ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)).any()):
        raise ValueError("teacher_indices must not list a class twice in a row")


def center(x: Tensor) -> Tensor:
    """Minus the mean of the last dimension; exactly 0 for a constant row, which the mean alone rounds away from."""
    x = x - x[..., :1].detach()
    return x - x.mean(dim=-1, keepdim=True)


def standardize(logits: Tensor) -> Tensor:
    """``(x - mean) / (1e-7 + std)``; a constant row gives 0 and gets gradient 0, not 1e7."""
    scale = math.sqrt(max(logits.shape[-1] - 1, 1))  # std = norm / scale
    return scale * unit_rows(center(logits), eps=1e-7 * scale, add_eps=True)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the last dimension, 1e-8 added to the product of norms; constant a: 0 with gradient 0."""
    a, b = center(a), center(b)
    a = a.masked_fill(torch.linalg.vector_norm(a.detach(), dim=-1, keepdim=True) == 0, 0.0)
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(dim=-1) / (norms + 1e-8)
