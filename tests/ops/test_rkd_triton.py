"""The Triton kernels of rkd without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, loops, needs_triton, run_in_interpreter

pytestmark = needs_triton

MODULE = "kdfast.ops.rkd.triton_kernels"
TYPES = {
    **dict.fromkeys(("grad_ptr", "from_apex_ptr", "loss_ptr", "slope_ptr", "inverse_ptr", "out_ptr", "x_ptr"), "*fp32"),
    **dict.fromkeys(("sum_s_ptr", "sum_t_ptr", "weight_ptr", "angle_ptr", "distance_ptr"), "*fp32"),
    **dict.fromkeys(("high_ptr", "low_ptr", "r_ptr"), "*i64"),  # two floats
    **dict.fromkeys(("x_s_ptr", "x_t_ptr"), "*fp64"),
    **dict.fromkeys(("angle_weight", "distance_weight"), "fp32"),
    **dict.fromkeys(("n", "pitch", "apexes", "programs", "d", "d_s", "d_t"), "i32"),
    "wide_ptr": "*i32",
    **dict.fromkeys(("apexes_ptr", "kept_ptr", "kept_apexes_ptr"), "*i64"),
    "keep_ptr": "*u8",
}
WRITTEN = dict.fromkeys(("high_ptr", "low_ptr", "r_ptr"), "*fp32")  # float by float
PLAIN = dict.fromkeys(("weight_ptr", "keep_ptr", "apexes_ptr", "kept_ptr", "kept_apexes_ptr"))
BOTH = {"ANGLE": True, "DISTANCE": True, "MEAN": True}
NO_DISTANCE = {"DISTANCE": False, "inverse_ptr": None, "slope_ptr": None}
NO_GRADIENT = {**NO_DISTANCE, "grad_ptr": None, "from_apex_ptr": None}
# kernel -> variants: compile-time arguments that differ from the default launch
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "_distances_kernel": {"": PLAIN, "masked": {}},
    "_rows_kernel": {"": {}},
    "_distance_loss_kernel": {"": PLAIN, "weighted": {}},
    "_apex_kernel": {"": {**PLAIN, "MEAN": True}, "weighted, chosen, sum": {"MEAN": False}},
    "_pair_kernel": {
        "": {**PLAIN, **BOTH},
        "weighted, chosen, sum": {**BOTH, "MEAN": False},
        "angle": {**PLAIN, **BOTH, **NO_DISTANCE},
        "angle, sum": {**PLAIN, **BOTH, **NO_DISTANCE, "MEAN": False},
        "distance": {**PLAIN, **BOTH, "ANGLE": False, "loss_ptr": None, "from_apex_ptr": None},
        "distance, sum": {
            **PLAIN, **BOTH, "ANGLE": False, "loss_ptr": None, "from_apex_ptr": None, "MEAN": False,
        },
        "no gradient": {**PLAIN, **BOTH, **NO_GRADIENT},
    },
    "_loss_kernel": {"": {**PLAIN, "MEAN": True}, "sum": {"MEAN": False}},
    "_pull_kernel": {"": PLAIN, "masked": {}},
}  # fmt: skip


def build(kernel: str, variant: str, target: str) -> Build:
    from kdfast.ops.rkd import triton_kernels as module

    sums = {"BLOCK": module.ROW_BLOCK}
    lanes = {"LANES": module.LANES}
    tiles = {
        "_distances_kernel": {"BLOCK": module.BLOCK, "FEATURES": module.FEATURES, **lanes},
        "_rows_kernel": {**sums, **lanes},
        "_distance_loss_kernel": {**sums, **lanes},
        "_apex_kernel": {**module.APEX_TILE, **lanes},
        "_pair_kernel": {**module.PAIR_TILE, "SUM": module.ROW_BLOCK, **lanes},
        "_loss_kernel": sums,
        "_pull_kernel": module.PULL_TILE,
    }
    names = getattr(module, kernel).arg_names
    constants = {**tiles[kernel], **{k: v for k, v in VARIANTS[kernel][variant].items() if k in names}}
    types = {**TYPES, **(WRITTEN if kernel == "_distances_kernel" else {})}
    signature = {name: types[name] for name in names if name not in constants}
    aligned = tuple(name for name in names if name.endswith("_ptr"))
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
            # Blocks of features lie within a row; the diagonal is found among tiles; losses are as many as programs.
            allowed = 1 if re.search("pull_kernel|pair_kernel", name) else 0
            assert len(products) <= allowed, (name, products)


def test_threads_exchange_nothing_within_a_loop(compiled):
    """Layouts of what is loaded and of what is computed agree; else each step stores, waits for all warps and reads."""
    for name, resources in compiled.items():
        if "ptx" in resources.text:
            bodies = loops(resources.text["ptx"])
            assert bodies or "distance" not in name
            for body in bodies:
                assert not re.search(r"bar\.sync|\.shared|shfl", body), name


def test_what_is_read_again_and_again_is_not_converted_each_time(compiled):
    (body,) = loops(compiled["sm_90 distances_kernel"].text["ptx"])
    assert "fma.rn.f64" in body and "cvt" not in body


def test_the_slope_of_a_nan_is_one(compiled):
    """The interpreter's clamp never drops NaN; a GPU's does where it is not asked to keep it."""
    for name, resources in compiled.items():
        clamps = re.findall(r"tt\.clampf .*", resources.text["ttir"])
        assert all("propagateNan = all" in clamp for clamp in clamps), name
        assert clamps or not re.search("apex_kernel|pair_kernel|distance_loss_kernel", name)


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
