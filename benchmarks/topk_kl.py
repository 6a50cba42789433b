"""KL from a stored teacher of k classes a row, forward + backward: kdfast, eager PyTorch, torch.compile.

``python benchmarks/topk_kl.py`` measures everything and saves it in ``benchmarks/results``; ``--device cuda`` does the
same on a GPU, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import kdfast
from harness import Case, Options, main, step
from kl import compiled, floors, logits

K = 64
SHAPES = [(512, 32000), (256, 128256)]
QUICK_SHAPES = [(64, 1000)]

# Name in the table -> arguments. The student is normalised over all classes, with and without the teacher's rest, or
# over the k listed ones alone.
TAILS: dict[str, dict[str, Any]] = {
    "top-k, drop": {"values": "logprobs", "tail": "drop"},
    "top-k, bucket": {"values": "logprobs", "tail": "bucket"},
    "top-k, renormalize": {"values": "logprobs", "tail": "renormalize", "temperature": 2.0},
}
BASELINES = {"eager": ("eager reference",), "torch.compile": ("compiled reference",)}


def case(name: str, arguments: dict[str, Any], shape: tuple[int, int], options: Options) -> Case:
    pair = logits(shape, options)
    values, indices = pair["teacher_logits"].float().log_softmax(-1).topk(K)
    student = pair["student_logits"]
    inputs: dict[str, Tensor] = {
        "student_logits": student,
        "teacher_values": values.to(options.dtype),
        "teacher_indices": indices.int(),
    }
    fast = partial(kdfast.topk_kl_divergence, **arguments)
    reference = partial(kdfast.reference.topk_kl_divergence, **arguments)
    # The student is read and the gradient written; 'renormalize' reads k logits a row and writes mostly zeros.
    warm = torch.zeros_like(student)
    only_write = arguments["tail"] == "renormalize"
    memory = warm.zero_ if only_write else partial(torch.neg, student.detach(), out=warm)
    return Case(
        name=name,
        shape=shape,
        inputs=inputs,
        reference=reference,
        candidates={
            "kdfast": step(fast, inputs),
            "eager reference": step(reference, inputs),
            "compiled reference": compiled(reference, inputs),
        },
        baselines=BASELINES,
        floors={"memory floor": memory, "Python floor": floors(**pair)["Python floor"]},
        floor_bytes=(1 if only_write else 2) * student.nbytes,
        term_size=4.0,  # T^2 of the softened one
    )


def cases(options: Options) -> list[Callable[[], Case]]:
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    return [partial(case, name, arguments, shape, options) for shape in shapes for name, arguments in TAILS.items()]


if __name__ == "__main__":
    main(__file__, cases)
