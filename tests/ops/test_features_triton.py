"""The Triton kernels of features without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

DTYPES = ("bf16", "fp32")
POWERS = (1, 2, 0)
# Small maps and large ones, the latter moved 16 bytes at a time.
PIXELS = (49, 3136)
# The other shapes of a tile, and a large map whose rows begin anywhere.
MORE_PIXELS = (16, 25, 196)
# One for each number of pixels that attentions are compared in.
COMPARED = (49, 196, 400, 3136)


def build(label: str, kernel: str, target: str, signature: dict[str, str], *aligned: str, **constants) -> Build:
    from kdfast.ops.features import triton_kernels

    options = {"num_warps": triton_kernels.WARPS}
    name = f"{target} {label}"
    return Build(name, triton_kernels.__name__, kernel, signature, constants, options, target, aligned=aligned)


def power_builds(target: str, dtype: str, pixels: int) -> Iterator[Build]:
    from kdfast.ops.features import triton_kernels

    bc, bp = triton_kernels.tile(pixels)
    sizes = {"channels": "i32", "pixels": "i32", "p": "fp32"}
    aligned = ("map_ptr", *(["pixels"] if pixels % 16 == 0 else []))
    for power in POWERS:
        label, shape = f"{dtype} pixels={pixels} power={power}", {"POWER": power, "BC": bc, "BP": bp}
        pointers = {"map_ptr": f"*{dtype}", "a_ptr": "*fp32"}
        yield build(label, "_power_kernel", target, pointers | sizes, *aligned, **shape)
        pointers = {"map_ptr": f"*{dtype}", "k_ptr": "*fp32", "grad_ptr": f"*{dtype}"}
        yield build(f"{label} gradient", "_power_grad_kernel", target, pointers | sizes, *aligned, "grad_ptr", **shape)


def compare_builds(target: str) -> Iterator[Build]:
    from kdfast.ops.features import triton_kernels

    signature = {name: "*fp32" for name in ("student_ptr", "teacher_ptr", "loss_ptr")}
    signature |= {name: "i32" for name in ("student_parts", "teacher_parts", "pixels")}
    signature |= {name: "fp32" for name in ("student_share", "teacher_share", "scale", "p")}
    for pixels in COMPARED:
        for normalize in (True, False):
            label = f"compare pixels={pixels}" + (" normalized" if normalize else "")
            constants = {"NORMALIZE": normalize, "BLOCK": triton_kernels.block(pixels)}
            yield build(label, "_compare_kernel", target, signature, **constants)


def pool_builds(target: str, dtype: str) -> Iterator[Build]:
    grid = {name: "i32" for name in ("H", "W", "h", "w")}
    pool = {"map_ptr": f"*{dtype}", "pooled_ptr": "*fp32", **grid, "ROWS": "i32", "COLUMNS": "i32"}
    yield build(f"{dtype} pool", "_pool_kernel", target, pool, BLOCK=256)
    gradient = {"pooled_ptr": "*fp32", "grad_ptr": f"*{dtype}", **grid}
    yield build(f"{dtype} pool gradient", "_pool_grad_kernel", target, gradient, BLOCK=256)


def mse_builds(target: str, dtype: str) -> Iterator[Build]:
    from kdfast.ops.features import triton_kernels

    signature = {f"{side}_ptr": f"*{dtype}" for side in ("student", "teacher", "grad")}
    signature |= {"mask_ptr": "*u8", "count_ptr": "*i64", "loss_ptr": "*fp32"}
    signature |= {"rows": "i32", "width": "i32", "factor": "fp32"}
    aligned = ("student_ptr", "teacher_ptr", "grad_ptr", "width")
    unmasked = {"mask_ptr": None, "count_ptr": None, "BY_ROW": False}
    for label, constants in {
        "mse": unmasked,
        "mse, mask of rows": {"BY_ROW": True},
        "mse, mask of elements": {"BY_ROW": False},
        "mse, no gradient": {**unmasked, "grad_ptr": None},
    }.items():
        constants = {**constants, "BLOCK": triton_kernels.TILE}
        yield build(f"{dtype} {label}", "_mse_kernel", target, signature, *aligned, **constants)


def builds(pixels: Iterable[int], targets: dict[str, tuple[str, ...]]) -> list[Build]:
    """``targets``: which dtypes for which."""
    made: list[Build] = []
    for target, dtypes in targets.items():
        for dtype in dtypes:
            for size in pixels:
                made.extend(power_builds(target, dtype, size))
            made.extend(pool_builds(target, dtype))
            made.extend(mse_builds(target, dtype))
        made.extend(compare_builds(target))
    return made


def default_builds() -> list[Build]:
    """Everything of two sizes for one target; for the others in bfloat16 alone."""
    return builds(PIXELS, {target: DTYPES if target == "sm_90" else DTYPES[:1] for target in TARGETS})


def every_build() -> list[Build]:
    return builds((*PIXELS, *MORE_PIXELS), dict.fromkeys(TARGETS, DTYPES))


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_features.py")


def test_builds_cover_every_number_of_pixels():
    from kdfast.ops.features import triton_kernels

    tiles = {triton_kernels.tile(pixels) for pixels in (*PIXELS, *MORE_PIXELS)}
    blocks = {triton_kernels.block(pixels) for pixels in COMPARED}
    for pixels in (*range(1, 5000), 224 * 224, 2**20):
        assert triton_kernels.tile(pixels) in tiles, pixels
        assert triton_kernels.block(pixels) in blocks, pixels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["pixels=3136 power=2", "pixels=3136 power=2 gradient", "mse", "mse, no gradient"])
def test_features_move_16_bytes_at_a_time(compiled, kernel, dtype):
    """Whatever the batch: its size is not a multiple of anything that the compiler knows."""
    accesses = re.findall(r"(?:ld|st)\.global\S*", compiled[f"sm_90 {dtype} {kernel}"].text["ptx"])
    narrow = [access for access in accesses if not re.search(r"v4\.b32|v2\.b64", access)]
    wide = len(accesses) - len(narrow)
    assert wide >= (3 if kernel == "mse" else 1) and len(narrow) <= 8, accesses


def test_nothing_is_added_atomically(compiled):
    """Sums have one order, so the same input gives the same bits."""
    assert all("atomic" not in resources.text["ttir"] for resources in compiled.values())
