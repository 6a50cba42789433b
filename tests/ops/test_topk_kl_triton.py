"""The Triton kernel of topk_kl without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, loops, needs_triton, run_in_interpreter

pytestmark = needs_triton

# id -> tail, whether values are log-probabilities
VARIANTS: dict[str, tuple[int, bool]] = {
    "drop, logits": (0, False),
    "drop, logprobs": (0, True),
    "bucket": (1, True),
    "renormalize": (2, True),
}
CLASSES = (1000, 128256)
# The other lines of the tables in triton_kernels.py.
MORE_CLASSES = (8192, 32000)
K = 64
DTYPES = {"bf16": 2, "fp32": 4}


def build(variant: str, classes: int, dtype: str, target: str, *, needs_grad: bool = True) -> Build:
    from kdfast.ops.topk_kl import triton_kernels

    tail, logprobs = VARIANTS[variant]
    tile = triton_kernels.tiling(classes, K, DTYPES[dtype])
    constants, options = triton_kernels.options_of(tail, logprobs, tile, nvidia=TARGETS[target][0] == "cuda")
    constants |= {"student_split": 1}  # what a launch on contiguous tensors specializes on: one stride reaches all rows
    constants |= {} if needs_grad else {"grad_ptr": None}
    constants |= {} if variant == "bucket" else {"holes_ptr": None}
    signature = {"student_ptr": f"*{dtype}", "student_outer": "i32", "student_inner": "i32", "grad_ptr": f"*{dtype}"}
    signature |= {"values_ptr": "*fp32", "indices_ptr": "*i32", "loss_ptr": "*fp32", "mask_ptr": "*u8"}
    signature |= {"weight_ptr": "*fp64", "count_factor_ptr": "*fp32", "holes_ptr": "*i32"}
    signature |= {name: "i32" for name in ("classes", "k", "words")}
    signature |= {name: "fp32" for name in ("factor", "scale", "slope", "weight", "rounding")}
    name = f"{target} {dtype} V={classes} {variant}" + ("" if needs_grad else ", no gradient")
    aligned = ("student_ptr", "student_outer", "grad_ptr", "holes_ptr", *(["classes"] if classes % 16 == 0 else []))
    module = "kdfast.ops.topk_kl.triton_kernels"
    return Build(name, module, "_topk_kl_kernel", signature, constants, options, target, aligned=aligned)


def default_builds() -> list[Build]:
    """Everything for one target; for the others every variant and tiling."""
    builds = [
        build(variant, classes, dtype, target)
        for target in TARGETS
        for variant in VARIANTS
        for classes in CLASSES
        for dtype in DTYPES
        if target == "sm_90" or (dtype == "bf16") == (classes == CLASSES[-1])
    ]
    return [*builds, *(build(variant, CLASSES[-1], "bf16", "sm_90", needs_grad=False) for variant in VARIANTS)]


def every_build() -> list[Build]:
    """Every line of the tables."""
    builds = [
        build(variant, classes, dtype, target)
        for target in TARGETS
        for variant in VARIANTS
        for classes in (*CLASSES, *MORE_CLASSES)
        for dtype in DTYPES
    ]
    names = {made.name for made in builds}
    return [*builds, *(made for made in default_builds() if made.name not in names)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_topk_kl.py")


def test_tables_cover_every_number_of_classes():
    from kdfast.ops.topk_kl import triton_kernels

    tested = {triton_kernels.tiling(classes, K, 2) for classes in (*CLASSES, *MORE_CLASSES)}
    for classes in [*range(1, 9000, 7), 32000, 65536, 65537, 151936, 201088, 262144, 2**31 - 1]:
        assert triton_kernels.tiling(classes, K, 2) in tested, classes


def test_rows_are_addressed_in_64_bits(compiled):
    """The program's index, 32 bits, is widened before anything is multiplied with it."""
    for made in default_builds():
        text = compiled[made.name].text["ttir"]
        ((index,),) = [re.findall(r"(%\w+) = tt\.get_program_id x : i32", text)]
        uses = [line for line in text.splitlines() if re.search(rf"{re.escape(index)}\b(?! = )", line)]
        assert uses and all("arith.extsi" in line and "i32 to i64" in line for line in uses), (made.name, uses)
        # What is added to a pointer in 32 bits lies within a row: a tile's columns, entries, words of holes.
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<(\w+)x)?(i32|i64)>?(?: loc|$)", text, re.MULTILINE)
        assert len(offsets) >= 6, made.name
        A, B, entries = (made.constants[name] for name in ("A", "B", "K"))
        within = {f"{A}x{B}", f"{A}x1", f"{A}", f"{entries}"}
        assert {shape for shape, bits in offsets if bits == "i32"} <= within, (made.name, offsets)


def loops_over_the_row(resources: Resources) -> list[str]:
    """Those that read or write 16 bytes at a time: what is listed is gathered."""
    return [body for body in loops(resources.text["ptx"]) if re.search(r"(?:ld|st)\.global\S*v4", body)]


def long_row(variant: str, dtype: str, suffix: str = "") -> str:
    return f"sm_90 {dtype} V={CLASSES[-1]} {variant}{suffix}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_exchange_nothing_within_a_long_row(compiled, variant, dtype):
    bodies = loops_over_the_row(compiled[long_row(variant, dtype)])
    reads = [body for body in bodies if "ld.global" in body]
    # Two reads beside what gives a row that does not count its zeros; 'renormalize' writes zeros and reads nothing.
    assert (len(reads), len(bodies)) == ((0, 2) if variant == "renormalize" else (2, 3))
    for body in bodies:
        assert "shfl" not in body and "bar.sync" not in body and ".shared" not in body


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_move_16_bytes_at_a_time(compiled, variant, dtype):
    for body in loops_over_the_row(compiled[long_row(variant, dtype)]):
        accesses = re.findall(r"(?:ld|st)\.global\S*", body)
        narrow = [access for access in accesses if "v4.b32" not in access]
        # Beside them a word of holes for each lane of 16 bytes, in the read that makes the sums.
        holes = 4 if variant == "bucket" and "shr" in body and "st.global" not in body else 0
        assert len(accesses) - len(narrow) in (4, 8)
        assert narrow == ["ld.global.b32"] * holes, accesses


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if variant != "renormalize"])
def test_special_functions_an_element(compiled, variant):
    elements, lanes = 32, 4  # a thread's share of a tile; a lane is brought to its new maximum
    for suffix, expected in (("", 2), (", no gradient", 1)):
        bodies = loops_over_the_row(compiled[long_row(variant, "bf16", suffix)])
        count = sum(len(re.findall(r"\b(?:ex2|lg2|rcp|rsqrt|sqrt|div)\.", body)) for body in bodies)
        assert count == expected * elements + lanes


def test_writes_by_other_threads_are_waited_for(compiled):
    """Words of holes: between clearing, marking and reading. The gradient: before listed classes are written over."""
    for made in default_builds():
        barriers = len(re.findall(r"\b(?:gpu|ttg)\.barrier\b", compiled[made.name].text["ttir"]))
        assert barriers == (2 if "bucket" in made.name else 0) + ("no gradient" not in made.name), made.name


def test_a_shift_is_the_same_number_wherever_it_stands(compiled):
    """No product is contracted into a sum but by tl.fma, which the kernel's accuracy at low temperatures rests on."""
    for made in default_builds():
        assert made.options["enable_fp_fusion"] is False
        text = compiled[made.name].text.get("ptx", "fma.rn")
        assert "fma.rn" in text
        assert not re.search(r"\b(?:mul|add|sub)\.f32", text), made.name  # without .rn ptxas may fuse them
