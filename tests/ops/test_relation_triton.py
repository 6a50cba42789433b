"""The Triton kernels of relation without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

PANELS = ("crd", "crd, no teacher", "pkt")
ROW_VALUES = ["inverse_ptr", "excess_ptr", "along_ptr", "summed_ptr", "weighted_ptr", "divisor_ptr", "radial_ptr"]
DOUBLES = {*ROW_VALUES, "loss_ptr", "sums_ptr", "terms_ptr", "slopes_ptr"}
NONE_OF_PKT = dict.fromkeys(("along_ptr", "inverse_ptr", "summed_ptr", "weighted_ptr"))
# Name of a build -> kernel, compile-time arguments beside sizes, and types that are not what the names say.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, str]]] = {
    "crd": ("crd", {}, {}),
    "crd, no teacher": ("crd", {"teacher_ptr": None}, {}),
    "pkt": ("pkt", {}, {}),
    "along": ("along", {}, {}),
    **{
        f"unit rows{', pkt' if add_eps else ''}, {dtype}": (
            "unit_rows",
            {"ADD_EPS": add_eps} | ({} if add_eps else {"sums_ptr": None}),
            {"student_ptr": f"*{dtype}", "teacher_ptr": f"*{dtype}"},
        )
        for add_eps in (False, True)
        for dtype in ("bf16", "fp16", "fp32")
    },
    "pkt sums": ("pkt_sums", {}, {}),
    "weighted rows": ("weighted_rows", {}, {}),
    "raw gradient": ("raw_gradient", NONE_OF_PKT, {}),
    "raw gradient, pkt": ("raw_gradient", {}, {}),
    "similarity rows": ("similarity_rows", {}, {}),
    "alignment terms": ("alignment_terms", {}, {}),
    "alignment slopes": ("alignment_slopes", {}, {"loss_ptr": "*fp32"}),
}


def build(variant: str, target: str) -> Build:
    from kdfast.ops.relation import triton_kernels

    name, chosen, types = VARIANTS[variant]
    kernel = getattr(triton_kernels, f"_{name}_kernel")
    sizes = {*triton_kernels.SIZES, *triton_kernels.ROW_SIZES, "count", "gradient"}
    signature = {"labels_ptr": "*i64"} if "labels_ptr" in kernel.arg_names else {}
    for argument in kernel.arg_names:
        if argument.endswith("_ptr"):
            signature.setdefault(argument, "*fp64" if argument in DOUBLES else "*fp32")
        elif argument in sizes:
            signature[argument] = "i32"
        elif argument.islower():
            signature[argument] = "fp32"
    constants = {size: getattr(triton_kernels, size) for size in ("ROWS", "COLUMNS", "BLOCK", "TURNS")}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names} | chosen
    signature = {key: value for key, value in (signature | types).items() if key not in constants}
    return Build(
        f"{target} {variant}", "kdfast.ops.relation.triton_kernels", f"_{name}_kernel", signature, constants,
        triton_kernels.OPTIONS, target, aligned=[side for side in ("student_ptr", "teacher_ptr") if side in signature],
    )  # fmt: skip


def default_builds() -> list[Build]:
    """All there are: one tile, and what a number of rows or their width would change is left open."""
    return [build(variant, target) for target in TARGETS for variant in VARIANTS]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_relation.py")


@pytest.mark.parametrize("variant", PANELS)
def test_panels_move_16_bytes_at_a_time(compiled, variant):
    """Whatever the batch, whose size the compiler knows nothing of: 8 elements a thread of each panel."""
    accesses = re.findall(r"(?:ld|st)\.global\S*v4\.b32", compiled[f"sm_90 {variant}"].text["ptx"])
    loads = 2 if "no teacher" in variant else 4
    assert [access[:2] for access in accesses].count("st") >= 2
    assert [access[:2] for access in accesses].count("ld") >= loads, accesses


def test_tiles_are_addressed_in_64_bits(compiled):
    """And vectors by a pointer to their row."""
    for name, resources in compiled.items():
        text = resources.text["ttir"]
        offsets = re.findall(r"tt\.addptr .*, tensor<(\d+x\d+)x(i32|i64)>", text)
        assert all(bits == "i64" for _, bits in offsets), (name, offsets)
        assert offsets or "similarity rows" in name or "alignment" in name, name


def test_nothing_is_added_atomically(compiled):
    """Sums have one order, so the same input gives the same bits."""
    assert all("atomic" not in resources.text["ttir"] for resources in compiled.values())
