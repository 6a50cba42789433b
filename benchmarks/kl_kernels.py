"""The kernels of KL alone on a GPU, without autograd: every tiling of Triton's, and its default beside the cluster's.

``python benchmarks/kl_kernels.py`` writes ``benchmarks/results/<gpu>-kl-kernels.json``, from which the tables in
kdfast/ops/kl/triton_kernels.py and kdfast/ops/kl/cluster.py are chosen. Times are those of loss and gradient in one
launch, beside a device copy of as many bytes: two reads and one write.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

import harness
from harness import milliseconds
from kdfast import backends
from kdfast.ops.kl.function import KINDS, Options
from kdfast.ops.sizes import next_power_of_2

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LONG = [(8192, 32000, "bfloat16"), (4096, 128256, "bfloat16"), (4096, 32000, "float32"), (2048, 128256, "float32")]
SHORT_CLASSES = (16, 32, 64, 100, 256, 500, 1000, 2000, 4000, 8000)
SHORT_ELEMENTS = 2**26  # of each, at most 2^19 rows
LOSSES = ("forward", "reverse", "js", "dkd", "standardized", "forward + cross-entropy")


class Job(NamedTuple):
    """One loss at one shape, with one tiling: (one tile, lanes or rows, elements, warps)."""

    loss: str
    rows: int
    classes: int
    dtype: str
    tile: tuple[bool, int, int, int]


def jobs() -> list[Job]:
    shapes = [(loss, *shape) for loss, shape in product(LOSSES, LONG)]
    for classes, dtype in product(SHORT_CLASSES, DTYPES):
        shapes.append(("forward", min(2**19, SHORT_ELEMENTS // classes), classes, dtype))
    return [Job(*shape, tile) for shape in shapes for tile in tiles(shape[2], DTYPES[shape[3]].itemsize)]


def tiles(classes: int, itemsize: int) -> list[tuple[bool, int, int, int]]:
    """4 to 32 elements a thread of a row in one tile; one to four loads of 16 bytes of a longer one."""
    if classes <= 8192:
        width = next_power_of_2(classes)
        sizes = product((1, 2, 4, 8, 16), (1, 2, 4, 8, 16))
        return [(True, rows, width, warps) for rows, warps in sizes if 4 <= rows * width / (32 * warps) <= 32]
    return [(False, loads * 32 * warps, 16 // itemsize, warps) for warps in (8, 16, 32) for loads in (1, 2, 4)]


def inputs(rows: int, classes: int, dtype: str) -> list[Tensor]:
    draw = partial(torch.randn, rows, classes, device="cuda")
    return [*(draw().mul_(3).to(DTYPES[dtype]) for _ in range(2)), torch.randint(classes, (rows,), device="cuda")]


def launch(loss: str, student: Tensor, teacher: Tensor, labels: Tensor, needs_grad: bool = True) -> None:
    hard = loss == "forward + cross-entropy"
    options = Options(4.0, KINDS["forward" if hard else loss], 16.0, ce_weight=0.5 if hard else 0.0)
    torch.ops.kdfast.kl(student, teacher, labels if hard or loss == "dkd" else None, None, None, *options, needs_grad)


def with_tile(job: Job, *tensors: Tensor) -> None:
    from kdfast.ops.kl import triton_kernels

    triton_kernels.tiling = lambda *arguments: triton_kernels.Tiling(*job.tile)
    with backends.use(backends.TRITON):
        launch(job.loss, *tensors)


def compiled(job: Job) -> tuple[int, int] | str:
    """Registers a thread and spills, or why there is no kernel; Triton's cache then has it for the other processes."""
    from kdfast.ops.kl import triton_kernels

    try:
        with_tile(job, *inputs(8, job.classes, job.dtype))
        torch.cuda.synchronize()
    except Exception as error:  # a tile that is too large
        return f"{type(error).__name__}: {error}"[:200]
    kernels = next(iter(triton_kernels._kl_kernel.device_caches.values()))[0]
    newest = list(kernels.values())[-1]
    return newest.n_regs, newest.n_spills


def copy_of(rows: int, classes: int, dtype: str) -> Callable[[], object]:
    source, target = torch.zeros(2, 3 * rows * classes // 2, dtype=DTYPES[dtype], device="cuda")
    return partial(target.copy_, source)


def tiled(all_jobs: list[Job]) -> list[dict[str, Any]]:
    """One record for each tiling, the fastest of its shape first."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        needs = dict(zip(all_jobs, pool.map(compiled, all_jobs), strict=True))
    records = []
    for shape in dict.fromkeys(job[:4] for job in all_jobs):
        loss, *size = shape
        tensors, copy = inputs(*size), milliseconds(copy_of(*size))
        for job in (job for job in all_jobs if job[:4] == shape):
            record = {"loss": loss, "shape": size[:2], "dtype": size[2], "tile": job.tile, "copy_ms": copy}
            if isinstance(needs[job], str):
                records.append({**record, "failed": needs[job]})
                continue
            registers, spills = needs[job]
            ms = milliseconds(partial(with_tile, job, *tensors))
            records.append({**record, "ms": ms, "registers": registers, "spills": spills})
        del tensors
    return sorted(records, key=lambda record: (str(record["shape"]), record["loss"], record.get("ms", float("inf"))))


def by_backend() -> list[dict[str, Any]]:
    """Triton with its default tiling and the cluster kernel, with and without a gradient."""
    records = []
    for loss, size, needs_grad in product(LOSSES[:2], LONG, (True, False)):
        tensors = inputs(*size)
        record: dict[str, Any] = {"loss": loss, "shape": size[:2], "dtype": size[2], "gradient": needs_grad}
        record["copy_ms"] = milliseconds(copy_of(*size))
        for backend in (backends.TRITON, backends.CUDA):
            if backends.can_run(backend, "kl", "cuda")[0]:
                with backends.use(backend):
                    record[f"{backend}_ms"] = milliseconds(partial(launch, loss, *tensors, needs_grad))
        records.append(record)
        del tensors
    return records


if __name__ == "__main__":
    harness.main_of_kernels(__file__, __doc__, lambda: iter([{"backends": by_backend(), "tiles": tiled(jobs())}]))
