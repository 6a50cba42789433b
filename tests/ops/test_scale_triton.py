"""The Triton kernel of scale without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
from triton_support import TARGETS, Build, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

DTYPES = ("bf16", "fp32")


def build(dtype: str, target: str) -> Build:
    from kdfast.ops.scale import triton_kernels

    signature = {"grad_ptr": f"*{dtype}", "grad_outer": "i32", "grad_inner": "i32", "factor_ptr": "*fp32"}
    signature |= {"rows": "i32", "width": "i32"}
    constants = {"BLOCK": triton_kernels.BLOCK, "grad_split": 1, "grad_inner": 0}  # a contiguous gradient
    options = {"num_warps": triton_kernels.NUM_WARPS}
    module, aligned = triton_kernels.__name__, ("grad_ptr", "grad_outer", "factor_ptr")
    return Build(
        f"{target} {dtype} gradient", module, "_scale_kernel", signature, constants, options, target, aligned=aligned
    )


def default_builds() -> list[Build]:
    return [build(dtype, target) for target in TARGETS for dtype in DTYPES]


def test_in_the_interpreter():
    run_in_interpreter("interpreter_scale.py")


@pytest.mark.parametrize("dtype", DTYPES)
def test_16_bytes_at_a_time_and_nothing_but_the_factor_before_it_is_known(dtype):
    text = compile_all(default_builds())[f"sm_90 {dtype} gradient"].text["ptx"]
    loads = re.findall(r"ld\.global\S*", text)
    assert "v4" not in loads[0] and sum("v4" in load for load in loads) >= 2, loads
    assert text.index("setp.") > text.index("ld.global")


def test_elements_are_addressed_in_64_bits():
    """There may be more than 2^31 of them."""
    for name, resources in compile_all(default_builds()).items():
        wide = re.findall(r"arith\.muli .* : i32", resources.text["ttir"])
        assert not wide, f"{name}: {wide}"
