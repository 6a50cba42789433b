"""The Triton kernels of rkd without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

MODULE = "kdfast.ops.rkd.triton_kernels"
MATRICES = ("high_s_ptr", "low_s_ptr", "r_s_ptr", "high_t_ptr", "low_t_ptr", "r_t_ptr")
TYPES = {
    **dict.fromkeys((*MATRICES, "high_ptr", "low_ptr", "r_ptr", "x_ptr", "out_ptr", "grad_ptr", "loss_ptr"), "*fp32"),
    **dict.fromkeys(("from_apex_ptr", "weight_ptr", "factor_ptr", "angle_ptr", "distance_ptr"), "*fp32"),
    **dict.fromkeys(("sum_s_ptr", "sum_t_ptr"), "*fp32"),
    **dict.fromkeys(("total_s_ptr", "total_t_ptr", "kept_ptr"), "*fp64"),
    **{
        "wide_ptr": "*i32",
        "apexes_ptr": "*i64",
        "keep_ptr": "*u8",
        "n": "i32",
        "d": "i32",
        "apexes": "i32",
    },
}
PLAIN = {"weight_ptr": None, "keep_ptr": None, "apexes_ptr": None}
# kernel -> variants: compile-time arguments that differ from the default launch
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "_distances_kernel": {"": {}},
    "_rows_kernel": {"": PLAIN, "masked": {}},
    "_distance_loss_kernel": {"": PLAIN, "weighted": {}},
    "_apex_kernel": {"": PLAIN, "weighted, chosen": {}, "no gradient": {**PLAIN, "grad_ptr": None}},
    "_pair_kernel": {
        "": {**PLAIN, "ANGLE": True, "DISTANCE": True},
        "weighted, chosen": {"ANGLE": True, "DISTANCE": True},
        "angle": {**PLAIN, "ANGLE": True, "DISTANCE": False},
        "distance": {**PLAIN, "ANGLE": False, "DISTANCE": True, "from_apex_ptr": None},
    },
    "_pull_kernel": {"": {}},
}


def build(kernel: str, variant: str, target: str) -> Build:
    from kdfast.ops.rkd import triton_kernels as module

    tiles = {
        "_distances_kernel": {"BLOCK": module.DISTANCE_BLOCK},
        "_rows_kernel": {"BLOCK": module.ROW_BLOCK},
        "_distance_loss_kernel": {"BLOCK": module.ROW_BLOCK},
        "_apex_kernel": {"ROWS": module.APEX_ROWS, "COLUMNS": module.APEX_COLUMNS},
        "_pair_kernel": {"BLOCK": module.PAIR_BLOCK},
        "_pull_kernel": {"ROWS": module.PULL_ROWS, "WIDTH": module.PULL_WIDTH},
    }
    names = getattr(module, kernel).arg_names
    constants = {**tiles[kernel], **{k: v for k, v in VARIANTS[kernel][variant].items() if k in names}}
    signature = {name: TYPES[name] for name in names if name not in constants and name != "slope_ptr"}
    if "slope_ptr" in names:
        signature["slope_ptr"] = "*fp32" if kernel == "_distance_loss_kernel" else "*fp64"
    aligned = tuple(name for name in names if name.endswith("_ptr") or name == "d")
    name = f"{target} {kernel.strip('_')}" + (f", {variant}" if variant else "")
    return Build(name, MODULE, kernel, signature, constants, module.OPTIONS[kernel], target, aligned=aligned)


def builds(everything: bool) -> list[Build]:
    return [
        build(kernel, variant, target)
        for target in TARGETS
        for kernel, variants in VARIANTS.items()
        for variant in variants
        if everything or target == "sm_90" or variant == ""
    ]


def default_builds() -> list[Build]:
    """Every variant for sm_90, the default launch of every kernel for the others."""
    return builds(everything=False)


def every_build() -> list[Build]:
    return builds(everything=True)


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_rkd.py")


def test_rows_are_addressed_in_64_bits(compiled):
    """Indices of programs, 32 bits, are widened before they are multiplied with the length of a row."""
    for name, resources in compiled.items():
        text = resources.text["ttir"]
        for index in re.findall(r"(%\w+) = tt\.get_program_id [xy] : i32", text):
            products = re.findall(rf"arith\.muli {re.escape(index)}, .* : i32", text)
            # Blocks of features lie within a row; blocks of losses are as many as programs.
            assert len(products) <= (1 if re.search("pull_kernel|apex_kernel", name) else 0), (
                name,
                products,
            )


def test_no_float_is_added_atomically(compiled):
    for name, resources in compiled.items():
        assert "atomic" not in resources.text["ttir"], name


def test_no_product_of_matrices_is_rounded_to_tf32(compiled):
    for name, resources in compiled.items():
        assert "tt.dot" not in resources.text["ttir"], name


def test_sums_of_two_parts_are_not_contracted(compiled):
    """The wide cosines recover what a rounding lost, which a fused multiply-add would hide."""
    for made in default_builds():
        assert made.options["enable_fp_fusion"] is False
        text = compiled[made.name].text.get("ptx", "")
        assert not re.search(r"\b(?:mul|add|sub)\.f32", text), made.name  # without .rn ptxas may fuse them
