"""Losses on features (N, …) and feature maps (N, C, H, W), in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from kdfast.reference.geometry import flatten_rows, gram, unit_rows


def feature_mse_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """``mean (s - t)^2`` over what ``mask``, of the features' shape or (N,), keeps; nothing kept gives 0."""
    student, teacher = flatten_rows(student), flatten_rows(teacher.detach())
    count: int | Tensor = max(student.numel(), 1)
    if mask is not None:
        keep = mask.unsqueeze(1).flatten(start_dim=1).expand_as(student)
        student, teacher = student.masked_fill(~keep, 0.0), teacher.masked_fill(~keep, 0.0)
        count = keep.sum().clamp(min=1)
    return (student - teacher).square().sum() / count


def attention_transfer_loss(
    student_maps: Tensor, teacher_maps: Tensor, p: float = 2, *, normalize: bool = True
) -> Tensor:
    """``mean (a_s - a_t)^2`` over (N, HW), ``a`` the channel mean of ``|f|^p``, over its L2 norm."""
    height = min(student_maps.shape[2], teacher_maps.shape[2])
    width = min(student_maps.shape[3], teacher_maps.shape[3])
    student = attention(student_maps, (height, width), p, normalize)
    teacher = attention(teacher_maps.detach(), (height, width), p, normalize)
    return (student - teacher).square().sum() / max(student.numel(), 1)


def attention(maps: Tensor, size: tuple[int, int], p: float, normalize: bool) -> Tensor:
    """Channel mean of ``|f|^p`` of the maps pooled to ``size``: (N, C, H, W) to (N, HW). An f of 0 has gradient 0."""
    maps = flatten_rows(maps).view(maps.shape)
    if maps.shape[2:] != size:
        maps = adaptive_avg_pool2d(maps, size)
    # For p < 1 the slope of |f|^p at 0 is infinite, and would meet the 0 of sign(f) as NaN.
    zero = maps == 0
    powers = torch.where(zero, 0.0, torch.where(zero, 1.0, maps).abs().pow(p))
    a = powers.mean(dim=1).flatten(start_dim=1)
    return unit_rows(a, eps=1e-12) if normalize else a


def pkt_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-7) -> Tensor:
    """``mean over N^2 of c_t log((c_t + eps) / (c_s + eps))``, ``c`` the row probabilities of :func:`neighbours`."""
    c_student, c_teacher = neighbours(student, eps), neighbours(teacher.detach(), eps)
    terms = c_teacher * ((c_teacher + eps).log() - (c_student + eps).log())
    return terms.sum() / max(terms.numel(), 1)


def neighbours(x: Tensor, eps: float) -> Tensor:
    """``(cos(x_i, x_j) + 1) / 2``, rows divided by their sum: the probability that row i picks j as its neighbour."""
    cosines = gram(unit_rows(flatten_rows(x), eps, add_eps=True))
    c = ((cosines + 1) / 2).clamp(min=0)  # rounding can leave opposite rows just below -1
    return c / c.sum(dim=1, keepdim=True)


def kernel_alignment_loss(student: Tensor, teacher: Tensor, *, centered: bool = False) -> Tensor:
    """``1 - <K_s, K_t> / (|K_s| |K_t|)``, ``K = X X^T``, centred both ways if ``centered``; a zero side gives 1."""
    K_student = gram(kernel_features(student, centered))
    K_teacher = gram(kernel_features(teacher.detach(), centered))
    return 1 - safe_ratio((K_student * K_teacher).sum(), torch.linalg.norm(K_student) * torch.linalg.norm(K_teacher))


def kernel_features(x: Tensor, centered: bool) -> Tensor:
    """Rows whose Gram matrix is ``K`` up to a factor: largest magnitude 1, so that no product over- or underflows.

    The factors are constants to autograd. That is exact for results that no factor changes, and only for those.
    """
    x = to_unit_magnitude(flatten_rows(x))
    if not centered:
        return x
    # Centring X by columns centres K both ways. Taking the first row off before the mean changes nothing but rounding:
    # equal rows become exactly 0, where rounding would leave noise and the next line would blow it up.
    x = x - x[:1].detach()
    return to_unit_magnitude(x - x.mean(dim=0))


def to_unit_magnitude(x: Tensor) -> Tensor:
    """``x / max |x|``; a tensor of zeros, or an empty one, stays as it is."""
    if x.numel() == 0:
        return x
    largest = x.detach().abs().amax()
    return x / torch.where(largest == 0, 1.0, largest)


def safe_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, and 0 with gradient 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))
