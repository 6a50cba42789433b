"""The Triton kernels of rkd_sequence without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

DTYPES = ("bf16", "fp32")
WIDTHS = (768, 100)  # several blocks; one block, and rows that begin anywhere
MORE_WIDTHS = (64, 256)  # the other sizes of a block
NUMBERS = ("norm_u_ptr", "norm_v_ptr", "apart_ptr", "along_ptr")  # one a position


def build(kernel: str, width: int, dtype: str, target: str) -> Build:
    from kdfast.ops.rkd_sequence import triton_kernels

    signature = {name: "*fp32" for name in NUMBERS} | {"x_ptr": f"*{dtype}", "counts_ptr": "*u8", "d": "i32"}
    signature |= {"out_ptr": "*fp32", "stretch_ptr": "*fp32"} if kernel == "_turn_gradient_kernel" else {}
    aligned = [name for name in signature if name != "d" or width % 16 == 0]
    constants = {"WIDTH": triton_kernels.block(width)}
    name = f"{target} {dtype} D={width} {kernel.strip('_')}"
    module, options = triton_kernels.__name__, triton_kernels.OPTIONS
    return Build(name, module, kernel, signature, constants, options, target, aligned=aligned)


def builds(widths: tuple[int, ...], dtypes: tuple[str, ...], target: str) -> list[Build]:
    kernels = ("_turns_kernel", "_turn_gradient_kernel")
    return [build(kernel, width, dtype, target) for kernel in kernels for width in widths for dtype in dtypes]


def default_builds() -> list[Build]:
    """Everything of two widths for one target; for the others in bfloat16 alone."""
    return [made for target in TARGETS for made in builds(WIDTHS, DTYPES if target == "sm_90" else DTYPES[:1], target)]


def every_build() -> list[Build]:
    return [made for target in TARGETS for made in builds((*WIDTHS, *MORE_WIDTHS), DTYPES, target)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_rkd_sequence.py")


def test_builds_cover_every_width():
    from kdfast.ops.rkd_sequence import triton_kernels

    blocks = {triton_kernels.block(width) for width in (*WIDTHS, *MORE_WIDTHS)}
    assert all(triton_kernels.block(width) in blocks for width in range(1, 5000))


def test_rows_are_addressed_in_64_bits(compiled):
    """Indices of programs, 32 bits, are widened before they are multiplied with the length of a row."""
    for name, resources in compiled.items():
        text = resources.text["ttir"]
        (row,) = re.findall(r"(%\w+) = tt\.get_program_id x : i32", text)
        assert not re.findall(rf"arith\.muli {re.escape(row)}\b.* : i32", text), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_features_move_a_thread_s_share_at_a_time(compiled, dtype):
    """Four neighbours: 8 bytes of bfloat16, 16 of float32, each of three rows read twice."""
    text = compiled[f"sm_90 {dtype} D=768 turns_kernel"].text["ptx"]
    expected = {"bf16": r"v2\.b32|\.b64", "fp32": r"v4\.b32"}[dtype]
    accesses = [access for access in re.findall(r"ld\.global\S*", text) if re.search(expected, access)]
    assert len(accesses) >= 6, re.findall(r"ld\.global\S*", text)


def test_no_float_is_added_atomically_and_nothing_is_contracted(compiled):
    """Sums have one order; on a line the difference of equal directions is exactly 0."""
    for name, resources in compiled.items():
        assert "atomic" not in resources.text["ttir"], name
        assert not re.search(r"\b(?:mul|add|sub)\.f32", resources.text.get("ptx", "")), name  # without .rn: may fuse
