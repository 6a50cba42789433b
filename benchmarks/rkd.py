"""Relational knowledge distillation, forward + backward: kdfast, the eager reference, RepDistiller's way, torchdistill.

``python benchmarks/rkd.py`` measures everything (CPU: about ten minutes on two cores) and saves it in
``benchmarks/results``; ``--device cuda`` does the same on a GPU, in float32. ``benchmarks/rkd_plot.py`` draws the
result. Candidates that would not fit in ``MEMORY`` bytes are left out of a case.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from harness import Case, Loss, Options, Step, fresh, main, step

try:
    from torchdistill.losses.mid_level import RKDLoss as TorchdistillRKDLoss
except ImportError:
    TorchdistillRKDLoss = None

DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
SHAPES = [(64, 512), (128, 512), (256, 512), (512, 512), (1024, 512), (2048, 512)]
GPU_SHAPES = [(4096, 512)]
QUICK_SHAPES = SHAPES[:2]
SEQUENCES = (32, 256, 768)
# The formulations with all differences hold some eight tensors of N x N x D, and half as many of N x N x N. At
# 512 x 512, the first shape beyond this, that is 6 GiB, and a step takes tens of seconds on two cores.
MEMORY = 4 * 2**30

BASELINES = {
    "eager": ("eager reference", "eager RepDistiller form"),
    "torch.compile": ("compiled reference",),
    "torchdistill": ("torchdistill",),
}


def distances(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Distances by inner products, clamped, zero on the diagonal."""
    gram = x @ x.t()
    squares = gram.diag()
    d = (squares.unsqueeze(1) + squares.unsqueeze(0) - 2 * gram).clamp(min=eps).sqrt()
    return d * (1 - torch.eye(len(x), device=x.device, dtype=x.dtype))


def repdistiller_form(student: Tensor, teacher: Tensor) -> Tensor:
    """RKD as RepDistiller writes it: inner-product distances, N x N x D differences, N products of matrices."""

    def angles(x: Tensor) -> Tensor:
        directions = F.normalize(x.unsqueeze(0) - x.unsqueeze(1), p=2, dim=2)
        return torch.bmm(directions, directions.transpose(1, 2)).flatten()

    with torch.no_grad():
        teacher_distances, teacher_angles = distances(teacher), angles(teacher)
        teacher_distances = teacher_distances / teacher_distances[teacher_distances > 0].mean()
    d = distances(student)
    distance = F.smooth_l1_loss(d / d[d > 0].mean(), teacher_distances)
    return DISTANCE_WEIGHT * distance + ANGLE_WEIGHT * F.smooth_l1_loss(angles(student), teacher_angles)


def torchdistill(student: Tensor, teacher: Tensor) -> Tensor:
    loss = TorchdistillRKDLoss("", "", DISTANCE_WEIGHT, ANGLE_WEIGHT, "mean")
    distance = loss.compute_rkd_distance_loss(teacher, student)
    return DISTANCE_WEIGHT * distance + ANGLE_WEIGHT * loss.compute_rkd_angle_loss(teacher, student)


def rows(shape: tuple[int, ...], options: Options) -> dict[str, Tensor]:
    generator = torch.Generator(options.device).manual_seed(0)
    draw = partial(torch.randn, *shape, generator=generator, device=options.device)
    student, teacher = (draw().to(options.dtype) for _ in range(2))
    return {"student": student.requires_grad_(), "teacher": teacher}


def truth(student: Tensor, teacher: Tensor) -> Tensor:
    """The reference where it fits; beyond, our own kernel, which the tests hold against the reference."""
    loss = kdfast.reference.rkd_loss
    if not fits(student.shape):
        loss = kdfast.rkd_loss
        if student.dtype == torch.float64:  # only the CPU's kernel takes it
            student, teacher = student.cpu(), teacher.cpu()
    return loss(student, teacher, distance_weight=DISTANCE_WEIGHT, angle_weight=ANGLE_WEIGHT)


def fits(shape: tuple[int, ...]) -> bool:
    n, d = shape
    return 4 * (8 * n * n * d + 4 * n**3) < MEMORY


def arithmetic_floor(student: Tensor, teacher: Tensor) -> Callable[[], object]:
    """Yardstick of the N^3 stage: two products of N x N matrices, 2 N^3 FMAs, by the vendor's library.

    The N^3 stage makes N^3 / 2 evaluations of 10 FMA-class instructions each: 5 N^3, 2.5 times this.
    """
    n = len(student)
    matrix = torch.ones(n, n, device=student.device, dtype=student.dtype)
    out = torch.empty_like(matrix)

    def run() -> None:
        torch.mm(matrix, matrix, out=out)
        torch.mm(matrix, matrix, out=out)

    return run


def case(shape: tuple[int, ...], options: Options) -> Case:
    inputs = rows(shape, options)
    fast = partial(kdfast.rkd_loss, distance_weight=DISTANCE_WEIGHT, angle_weight=ANGLE_WEIGHT)
    reference = partial(kdfast.reference.rkd_loss, distance_weight=DISTANCE_WEIGHT, angle_weight=ANGLE_WEIGHT)
    candidates = {"kdfast": step(fast, inputs)}
    if fits(shape):
        candidates["eager reference"] = step(reference, inputs)
        candidates["eager RepDistiller form"] = step(repdistiller_form, inputs)
        candidates["compiled reference"] = compiled(reference, inputs)
        if TorchdistillRKDLoss is not None:
            candidates["torchdistill"] = step(torchdistill, inputs)
    n, d = shape
    return Case(
        name="RKD",
        shape=shape,
        inputs=inputs,
        reference=truth,
        candidates=candidates,
        baselines=BASELINES,
        floors={"two matrix products": arithmetic_floor(**inputs)},
        floor_bytes=3 * n * d * inputs["student"].element_size(),
        peers=frozenset({"torchdistill", "eager RepDistiller form"}),
        term_size=DISTANCE_WEIGHT + ANGLE_WEIGHT,
    )


def sequence_case(shape: tuple[int, ...], options: Options) -> Case:
    inputs = rows(shape, options)
    student, warm = inputs["student"].detach(), torch.zeros_like(inputs["teacher"])
    return Case(
        name="RKD along sequences",
        shape=shape,
        inputs=inputs,
        reference=kdfast.reference.rkd_sequence_angle_loss,
        candidates={
            "kdfast": step(kdfast.rkd_sequence_angle_loss, inputs),
            "eager reference": step(kdfast.reference.rkd_sequence_angle_loss, inputs),
            "compiled reference": compiled(kdfast.reference.rkd_sequence_angle_loss, inputs),
        },
        baselines=BASELINES,
        floors={"memory floor": partial(torch.add, student, inputs["teacher"], out=warm)},
        floor_bytes=3 * student.nbytes,
    )


def compiled(loss: Loss, inputs: dict[str, Tensor]) -> Step:
    return step(torch.compile(lambda **tensors: loss(**tensors), fullgraph=True, dynamic=False), fresh(inputs))


def cases(options: Options) -> list[Callable[[], Case]]:
    cuda = options.device.type == "cuda"
    if cuda and options.dtype == torch.bfloat16:
        options.dtype = torch.float32  # what relations are computed in
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES + (GPU_SHAPES if cuda else []))
    chosen = [partial(case, shape, options) for shape in shapes if len(shape) == 2]
    sequences = [shape for shape in options.shapes if len(shape) == 3] or ([] if options.shapes else [SEQUENCES])
    return chosen + [partial(sequence_case, shape, options) for shape in sequences]


if __name__ == "__main__":
    main(__file__, cases)
