"""What a distillation is judged by: likeness of representations, share of the accuracy gap closed, latency."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast import checks
from kdfast.ops.relation import kernel_cosine
from kdfast.reference.features import kernel_features


@torch.no_grad()
def cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Linear centred kernel alignment of two representations of the same N samples, from 0 (unrelated) to 1 (alike).

    .. math:: \frac{\|X_c^\top Y_c\|_F^2}{\|X_c^\top X_c\|_F \, \|Y_c^\top Y_c\|_F}, \qquad X_c = X - \text{mean row.}

    Rotating, scaling or shifting either side changes nothing. Features wider than N make unrelated sides look alike
    (with N = 2 all pairs give 1), so measure on many more samples than features.

    Args:
        x: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64.
        y: (N, …), same N, dtype and device; its width may differ.

    Returns:
        Scalar without gradient, float32 for half types, else the dtype of the input. 0 if all rows of a side are equal.
        :func:`kdfast.kernel_alignment_loss` with ``centered=True`` is one minus this, and trains.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: numbers of rows or devices differ, fewer than 2 dimensions.

    Source: Kornblith et al. 2019, "Similarity of Neural Network Representations Revisited",
    https://arxiv.org/abs/1905.00414.
    """
    checks.check_features(x, y, names=("x", "y"))
    x, y = kernel_features(x, centered=True), kernel_features(y, centered=True)
    # At most 1 by Cauchy-Schwarz; rounding does not know.
    return kernel_cosine(x, y).clamp(max=1)


def accuracy_transfer_ratio(student: float, baseline: float, teacher: float) -> float:
    """The share of the gap between teacher and baseline that distillation closed: ``(s - b) / (t - b)``.

    0 is no gain over the baseline, 1 is the teacher's level; values below 0 and above 1 are possible.

    Args:
        student: metric of the distilled student. Any metric will do, in one unit for all three.
        baseline: the same for that student trained without a teacher.
        teacher: the same for the teacher.

    Raises:
        TypeError: an argument is not a float.
        ValueError: an argument is not finite, or teacher and baseline are equal and there is no gap to close.
    """
    for name, value in (("student", student), ("baseline", baseline), ("teacher", teacher)):
        checks.check_number(name, value)
    if teacher == baseline:
        raise ValueError(f"teacher must differ from baseline, got {teacher} for both: there is no gap to close")
    return (student - baseline) / (teacher - baseline)


@dataclass(frozen=True)
class Latency:
    """Seconds per call: the median, and the 20th and 80th percentile for its spread."""

    p20: float
    p50: float
    p80: float


def latency(fn: Callable[[], object], *, warmup: int = 10, repeats: int = 100) -> Latency:
    """Wall-clock time of ``fn()``.

    Once CUDA is in use in the process, each call is timed until the current device has finished its work, launch
    and wait included; on another device call it within ``torch.cuda.device(...)``.

    Args:
        fn: what to time, without arguments; ``lambda: model(x)``, say.
        warmup: calls before the first timed one, >= 0: they compile, allocate and fill caches.
        repeats: timed calls, >= 1.

    Raises:
        TypeError: ``fn`` is not callable, ``warmup`` or ``repeats`` is not an int.
        ValueError: ``warmup`` or ``repeats`` is too small.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable, got {type(fn).__name__}")
    checks.check_count("warmup", warmup, 0)
    checks.check_count("repeats", repeats, 1)
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        fn()
        synchronize()
        seconds.append(time.perf_counter() - start)
    percentiles = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    p20, p50, p80 = torch.tensor(seconds, dtype=torch.float64).quantile(percentiles).tolist()
    return Latency(p20, p50, p80)


def synchronize() -> None:
    """Wait for the current CUDA device, if this process has started CUDA at all."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
