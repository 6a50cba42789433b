"""Losses on features and maps, forward + backward: kdfast, eager PyTorch, torch.compile, torchdistill.

``python benchmarks/features.py`` measures everything (CPU: about five minutes on two cores) and saves it in
``benchmarks/results``; ``--device cuda`` does the same on a GPU, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from harness import Case, Loss, Options, fresh, main, step

try:
    from torchdistill.losses.mid_level import ATLoss
except ImportError:
    ATLoss = None

# (N, C, H, W): maps of a ResNet's stages for images of 32 and 224 pixels.
SHAPES = [(64, 64, 32, 32), (32, 256, 56, 56), (32, 512, 28, 28), (64, 2048, 7, 7)]
BUDGET = 2.0  # seconds for each case
QUICK_SHAPES = [(8, 16, 14, 14)]

# Column of the table -> what runs there: the fastest of several ways to write it counts.
BASELINES = {
    "eager": ("eager reference", "eager, popular form"),
    "torch.compile": ("compiled reference", "compiled, popular form"),
    "torchdistill": ("torchdistill",),
}

# Name in the table -> function, options, height and width of the teacher's maps over the student's, kept rows.
LOSSES: dict[str, tuple[str, dict[str, Any], int]] = {
    "attention transfer": ("attention_transfer_loss", {}, 1),
    "attention transfer, p=1": ("attention_transfer_loss", {"p": 1}, 1),
    "attention transfer, p=3": ("attention_transfer_loss", {"p": 3}, 1),
    "attention transfer, pooled teacher": ("attention_transfer_loss", {}, 2),
    "feature mse": ("feature_mse_loss", {}, 1),
    "feature mse, masked rows": ("feature_mse_loss", {"mask": None}, 1),
}
EVERYWHERE = ("attention transfer", "feature mse")  # the others are measured at one shape


def popular_mse(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(student.float(), teacher.float())


def popular_attention(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    """The authors' code, and torchdistill's ATLoss(mode='code')."""
    a_student, a_teacher = (F.normalize(x.float().pow(2).mean(1).flatten(1)) for x in (student_maps, teacher_maps))
    return (a_student - a_teacher).pow(2).mean()


def torchdistill_attention(student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
    return ATLoss({}, mode="code").compute_at_loss(student_maps.float(), teacher_maps.float())


def case(name: str, function: str, arguments: dict[str, Any], ratio: int, shape: Any, options: Options) -> Case:
    generator = torch.Generator(options.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=options.device)
    n, c, h, w = shape
    suffix = "_maps" if function == "attention_transfer_loss" else ""
    inputs = {
        f"student{suffix}": draw(n, c, h, w).to(options.dtype).requires_grad_(),
        f"teacher{suffix}": draw(n, c, ratio * h, ratio * w).to(options.dtype),
    }
    if "mask" in arguments:
        inputs["mask"] = torch.rand(n, generator=generator, device=options.device) < 0.5
        arguments = {}
    reference: Loss = partial(getattr(kdfast.reference, function), **arguments)
    losses = {"reference": reference}
    if not arguments and ratio == 1 and "mask" not in inputs:
        losses["popular form"] = popular_attention if suffix else popular_mse
    candidates = {"kdfast": step(partial(getattr(kdfast, function), **arguments), inputs)}
    for form, loss in losses.items():
        separator = " " if form == "reference" else ", "
        candidates[f"eager{separator}{form}"] = step(loss, inputs)
        compiled = torch.compile(loss, fullgraph=True, dynamic=False)
        candidates[f"compiled{separator}{form}"] = step(compiled, inputs)
    if losses.get("popular form") is popular_attention and ATLoss is not None:
        candidates["torchdistill"] = step(torchdistill_attention, inputs)
    student, teacher = list(fresh(inputs).values())[:2]
    kept = inputs["mask"].float().mean().item() if "mask" in inputs else 1.0
    return Case(
        name=name,
        shape=shape,
        inputs=inputs,
        reference=reference,
        candidates=candidates,
        baselines=BASELINES,
        floors=floors(student.detach(), teacher, inputs.get("mask")),
        floor_bytes=int(kept * (student.nbytes + teacher.nbytes)) + student.nbytes,
        peers=frozenset({"torchdistill"}),
    )


def floors(student: Tensor, teacher: Tensor, mask: Tensor | None) -> dict[str, Callable[[], object]]:
    """Student and teacher read, gradient written: copies of as many bytes, two moved for each byte copied."""
    warm = torch.zeros_like(student)
    if mask is not None:
        rows = max(int(mask.sum()), 1)
        kept = student[:rows], teacher[:rows], warm[:rows]
        return {"memory floor": lambda: (torch.add(kept[0], kept[1], out=kept[2]), warm[rows:].zero_())}
    if student.shape == teacher.shape:
        return {"memory floor": lambda: torch.add(student, teacher, out=warm)}
    return {"memory floor": lambda: (torch.amax(teacher), torch.mul(student, 2, out=warm))}


def cases(options: Options) -> list[Callable[[], Case]]:
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    chosen = [(name, shape) for shape in shapes for name in EVERYWHERE]
    chosen += [(name, shapes[min(2, len(shapes) - 1)]) for name in LOSSES if name not in EVERYWHERE]
    return [partial(case, name, *LOSSES[name], shape, options) for name, shape in chosen]


if __name__ == "__main__":
    main(__file__, cases, BUDGET)
