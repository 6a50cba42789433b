"""Losses on all pairs of rows, forward + backward: kdfast, eager PyTorch, torch.compile, torchdistill.

``python benchmarks/relation.py`` measures time and peak memory against N (CPU: about six minutes on two cores) and
saves them in ``benchmarks/results``; ``--device cuda`` does the same on a GPU, in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
import pairs
from harness import Case, Loss, Options, fresh, main, step

try:
    from torchdistill.losses.mid_level import PKTLoss
except ImportError:
    PKTLoss = None

SHAPES = [(256, 512), (1024, 128), (8192, 128)]
QUICK_SHAPES = [(256, 128), (1024, 128)]
VARIANTS_SHAPE = (1024, 128)  # the only one of losses with options
BLOCKED_ROWS = 4096  # from here on the truth is made in blocks of rows: its float64 matrices would take GiB
BUDGET = 1.5  # seconds for each of many cases

# Column of the table -> what runs there: the fastest of several ways to write it counts.
BASELINES = {
    "eager": ("eager reference", "eager, popular form"),
    "torch.compile": ("compiled reference", "compiled, popular form"),
    "torchdistill": ("torchdistill",),
}

# Name in the table -> function, options, and matrix products that the fastest form known takes at least. Of N x D by
# D x N: half of one for each side's symmetric similarities, one for the gradient. Of D x N by N x D, where these do
# instead: half of one for each side, one between them, one for the gradient.
LOSSES: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "crd": ("crd_loss", {}, 1.5, math.inf),
    "crd, normalized": ("crd_loss", {"normalize": True}, 1.5, math.inf),
    "pkt": ("pkt_loss", {}, 2.0, math.inf),
    "similarity preserving": ("similarity_preserving_loss", {}, 2.0, 3.0),
    "kernel alignment": ("kernel_alignment_loss", {}, 2.0, 3.0),
}


def popular_similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    """As most repositories have it."""
    student, teacher = student.float(), teacher.float()
    g_student, g_teacher = F.normalize(student @ student.mT), F.normalize(teacher @ teacher.mT)
    return (g_student - g_teacher).square().sum() / len(student) ** 2


def torchdistill_pkt(student: Tensor, teacher: Tensor) -> Tensor:
    loss = PKTLoss("s", "output", "t", "output")
    return loss.cosine_similarity_loss(student.float(), teacher.float().clone())  # it writes zeros over NaN


def features(shape: tuple[int, int], options: Options) -> dict[str, Tensor]:
    """Rows of ten classes, nearer to their own than to others; the student is an imitation in progress."""
    generator = torch.Generator(options.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=options.device)
    n, d = shape
    labels = torch.randint(10, (n,), generator=generator, device=options.device)
    teacher = (draw(n, d) + draw(10, d)[labels]) / d**0.5
    student = teacher + 0.5 * draw(n, d) / d**0.5
    return {
        "student": student.to(options.dtype).requires_grad_(),
        "teacher": teacher.to(options.dtype),
        "labels": labels,
    }


def floors(student: Tensor, teacher: Tensor, products: float, **_: Tensor) -> dict[str, Callable[[], object]]:
    """Memory: features read, gradient written. Products: as many rows of X X^T, a panel at a time."""
    x, warm = student.detach(), torch.zeros_like(student)
    n, rows = len(x), min(len(x), 256)
    panel = x.new_empty(rows, n)

    def multiply() -> None:
        for _ in range(round(products * n / rows)):
            torch.mm(x[:rows], x.mT, out=panel)

    return {"memory floor": lambda: torch.add(x, teacher, out=warm), "matrix products": multiply}


def case(
    name: str,
    function: str,
    arguments: dict[str, Any],
    of_rows: float,
    of_features: float,
    shape: tuple[int, int],
    options: Options,
) -> Case:
    inputs = features(shape, options)
    if function != "crd_loss":
        del inputs["labels"]
    reference: Loss = partial(getattr(kdfast.reference, function), **arguments)
    share = getattr(pairs, function.removesuffix("_loss"), None)
    blocked = shape[0] >= BLOCKED_ROWS and share is not None and not arguments
    candidates = {
        "kdfast": step(partial(getattr(kdfast, function), **arguments), inputs),
        "eager reference": step(reference, inputs),
        "compiled reference": step(torch.compile(reference, fullgraph=True, dynamic=False), inputs),
    }
    if function == "similarity_preserving_loss" and not blocked:
        candidates["eager, popular form"] = step(popular_similarity_preserving, inputs)
        compiled = torch.compile(popular_similarity_preserving, fullgraph=True, dynamic=False)
        candidates["compiled, popular form"] = step(compiled, inputs)
    if function == "pkt_loss" and PKTLoss is not None and not blocked:  # it takes what the eager reference takes
        candidates["torchdistill"] = step(torchdistill_pkt, inputs)
    return Case(
        name=name,
        shape=shape,
        inputs=inputs,
        reference=partial(pairs.by_blocks, share) if blocked else reference,
        candidates=candidates,
        baselines=BASELINES,
        floors=floors(**fresh(inputs), products=min(of_rows, of_features * shape[1] / shape[0])),
        floor_bytes=3 * inputs["student"].nbytes,
        peers=frozenset({"torchdistill"}),
        matrix_bytes=shape[0] ** 2 * inputs["student"].element_size(),
    )


def cases(options: Options) -> list[Callable[[], Case]]:
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    return [
        partial(case, name, *loss, shape, options)
        for shape in shapes
        for name, loss in LOSSES.items()
        if not loss[1] or shape == VARIANTS_SHAPE or shapes is not SHAPES
    ]


if __name__ == "__main__":
    main(__file__, cases, BUDGET)
