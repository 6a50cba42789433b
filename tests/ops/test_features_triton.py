"""The Triton kernels of features without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, report, run_in_interpreter

pytestmark = needs_triton

MODULE = "kdfast.ops.features.triton_kernels"
DTYPES = ("bf16", "fp32")


def builds(target: str, dtype: str) -> list[Build]:
    from kdfast.ops.features import triton_kernels

    options = {"num_warps": triton_kernels.WARPS}
    found = []

    def add(label: str, kernel: str, signature: dict[str, str], aligned: tuple[str, ...] = (), **constants) -> None:
        name = f"{target} {dtype} {label}"
        aligned = tuple(argument for argument in aligned if argument in signature)
        found.append(Build(name, MODULE, kernel, signature, constants, options, target, aligned=aligned))

    sizes = {"channels": "i32", "pixels": "i32", "p": "fp32"}
    for pixels in (49, 3136):
        bc, bp = triton_kernels.tile(pixels)
        for power in (1, 2, 0):
            shape = {"POWER": power, "BC": bc, "BP": bp}
            aligned = ("map_ptr", "grad_ptr", "pixels") if pixels % 16 == 0 else ("map_ptr", "grad_ptr")
            label = f"pixels={pixels} power={power}"
            add(
                f"power {label}", "_power_kernel", {"map_ptr": f"*{dtype}", "a_ptr": "*fp32", **sizes}, aligned, **shape
            )
            pointers = {"map_ptr": f"*{dtype}", "k_ptr": "*fp32", "grad_ptr": f"*{dtype}"}
            add(f"power_grad {label}", "_power_grad_kernel", pointers | sizes, aligned, **shape)
    numbers = {name: "fp32" for name in ("student_share", "teacher_share", "scale", "p")}
    pointers = {name: "*fp32" for name in ("student_ptr", "teacher_ptr", "loss_ptr")}
    for block in (64, 1024):
        add(f"compare {block}", "_compare_kernel", pointers | numbers | {"pixels": "i32"}, NORMALIZE=True, BLOCK=block)
    grid = {name: "i32" for name in ("H", "W", "h", "w")}
    pool = {"map_ptr": f"*{dtype}", "pooled_ptr": "*fp32", **grid, "ROWS": "i32", "COLUMNS": "i32"}
    add("pool", "_pool_kernel", pool, BLOCK=256)
    add("pool_grad", "_pool_grad_kernel", {"pooled_ptr": "*fp32", "grad_ptr": f"*{dtype}", **grid}, BLOCK=256)
    mse = {f"{side}_ptr": f"*{dtype}" for side in ("student", "teacher", "grad")}
    mse |= {"mask_ptr": "*u8", "count_ptr": "*fp32", "loss_ptr": "*fp32"}
    mse |= {"size": "i64", "width": "i32", "slope": "fp32"}
    aligned = ("student_ptr", "teacher_ptr", "grad_ptr", "size")
    none = {"mask_ptr": None, "count_ptr": None}
    tile = {"BLOCK": triton_kernels.TILE}
    add("mse", "_mse_kernel", mse, aligned, BY_ROW=False, **none, **tile)
    add("mse, mask of rows", "_mse_kernel", mse, aligned, BY_ROW=True, **tile)
    add("mse, mask of elements", "_mse_kernel", mse, aligned, BY_ROW=False, **tile)
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(build for target in TARGETS for dtype in DTYPES for build in builds(target, dtype))


def test_in_the_interpreter():
    run_in_interpreter("interpreter_features.py")


def test_no_configuration_spills(compiled):
    print(f"\n{report(compiled)}")
    assert {name for name, resources in compiled.items() if resources.spills} == set()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", ["power pixels=3136 power=2", "power_grad pixels=3136 power=2", "mse"])
def test_maps_move_16_bytes_at_a_time(compiled, kernel, dtype):
    text = compiled[f"sm_90 {dtype} {kernel}"].text["ptx"]
    wide = re.findall(r"(?:ld|st)\.global\S*v4\.b32", text)
    assert wide, re.findall(r"(?:ld|st)\.global\S*", text)


def test_nothing_is_added_atomically(compiled):
    """Sums have one order, so the same input gives the same bits."""
    assert all("atomic" not in resources.text["ttir"] for resources in compiled.values())
