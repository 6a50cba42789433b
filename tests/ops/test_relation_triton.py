"""The Triton kernels of relation without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

VARIANTS = ("crd", "crd, no teacher", "pkt")


def build(variant: str, target: str) -> Build:
    from kdfast.ops.relation import triton_kernels

    name = variant.split(",")[0]
    floats = ["student_ptr", "teacher_ptr", "student_factor_ptr", "teacher_factor_ptr", "loss_ptr"]
    numbers = ["inverse_temperature", "weight", "scale"]
    if name == "pkt":
        floats += ["student_inverse_sum_ptr", "teacher_inverse_sum_ptr", "row_sums_ptr", "column_sums_ptr"]
        numbers = ["eps", "scale"]
    signature = {argument: "*fp32" for argument in floats} | {number: "fp32" for number in numbers}
    signature |= {size: "i32" for size in triton_kernels.SIZES}
    signature |= {"labels_ptr": "*i64"} if name == "crd" else {}
    constants = {"ROWS": triton_kernels.ROWS, "COLUMNS": triton_kernels.COLUMNS}
    constants |= {"teacher_ptr": None} if "no teacher" in variant else {}
    return Build(
        f"{target} {variant}", "kdfast.ops.relation.triton_kernels", f"_{name}_kernel", signature, constants,
        triton_kernels.OPTIONS, target, aligned=("student_ptr", "teacher_ptr"),
    )  # fmt: skip


def default_builds() -> list[Build]:
    """All there are: one tile, and what a number of rows would change is left open."""
    return [build(variant, target) for target in TARGETS for variant in VARIANTS]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_relation.py")


@pytest.mark.parametrize("variant", VARIANTS)
def test_panels_move_16_bytes_at_a_time(compiled, variant):
    """Whatever the batch, whose size the compiler knows nothing of: 8 elements a thread of each panel."""
    accesses = re.findall(r"(?:ld|st)\.global\S*v4\.b32", compiled[f"sm_90 {variant}"].text["ptx"])
    loads = 2 if "no teacher" in variant else 4
    assert [access[:2] for access in accesses].count("st") >= 2
    assert [access[:2] for access in accesses].count("ld") >= loads, accesses


def test_panels_are_addressed_in_64_bits(compiled):
    for name, resources in compiled.items():
        text = resources.text["ttir"]
        offsets = re.findall(r"tt\.addptr .*, tensor<(\d+x\d+)x(i32|i64)>", text)
        assert offsets and all(bits == "i64" for _, bits in offsets), (name, offsets)


def test_nothing_is_added_atomically(compiled):
    """Sums have one order, so the same input gives the same bits."""
    assert all("atomic" not in resources.text["ttir"] for resources in compiled.values())
