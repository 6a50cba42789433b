"""The Triton kernels of kl without a GPU: interpreted on the CPU, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from itertools import product

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, loops, needs_triton, run_in_interpreter

pytestmark = needs_triton

# id -> kind, temperature, weight of cross-entropy, smoothing, labels given
VARIANTS: dict[str, tuple[int, float, float, float, bool]] = {
    "forward": (0, 3.0, 0.0, 0.0, False),
    "forward + ce, T=3, smoothed, argmax": (0, 3.0, 0.3, 0.1, False),  # most registers: every option of forward
    "forward + ce, T=4, labels": (0, 4.0, 0.3, 0.0, True),
    "reverse": (1, 3.0, 0.0, 0.0, False),
    "js": (2, 3.0, 0.0, 0.0, False),
    "dkd": (3, 3.0, 0.0, 0.0, True),
    "standardized": (4, 3.0, 0.0, 0.0, False),
}
# The other combinations of compile-time arguments; temperatures 1, 2 and 4 are powers, labels or not is as above.
MORE_VARIANTS: dict[str, tuple[int, float, float, float, bool]] = {
    f"forward + ce, T={temperature}{', smoothed' if smoothing else ''}": (0, temperature, 0.3, smoothing, True)
    for temperature in (1.0, 2.0, 3.0, 4.0)
    for smoothing in (0.0, 0.1)
    if (temperature, smoothing) not in {(3.0, 0.1), (4.0, 0.0)}
}
# One V for each way to lay rows on programs: several rows, one row in one tile, one row in several tiles.
CLASSES = (128, 8192, 128256)
# The other lines of the tables in triton_kernels.py: as many elements a thread, other numbers of rows and warps.
MORE_CLASSES = (16, 32, 64, 256, 512, 1024, 2048, 4096, 16000)
DTYPES = {"bf16": 2, "fp32": 4}


def build(variant: str, classes: int, dtype: str, target: str, *, needs_grad: bool = True) -> Build:
    from kdfast.ops.kl import triton_kernels

    kind, temperature, ce_weight, label_smoothing, labels = (VARIANTS | MORE_VARIANTS)[variant]
    nvidia = TARGETS[target][0] == "cuda"
    tile = triton_kernels.tiling(classes, DTYPES[dtype], triton_kernels.is_labelled(kind, ce_weight), nvidia)
    constants, options = triton_kernels.options_of(kind, temperature, ce_weight, label_smoothing, tile, nvidia)
    # What a launch on contiguous tensors specializes on: one stride reaches all rows.
    constants |= {f"{side}_split": 1 for side in ("student", "teacher", "grad")}
    constants |= {} if labels else {"labels_ptr": None}
    constants |= {} if needs_grad else {"grad_ptr": None}
    signature = {f"{side}_ptr": f"*{dtype}" for side in ("student", "teacher", "grad")}
    signature |= {f"{side}_{stride}": "i32" for side in ("student", "teacher", "grad") for stride in ("outer", "inner")}
    signature |= {"loss_ptr": "*fp32", "labels_ptr": "*i64", "mask_ptr": "*u8", "weight_ptr": "*fp64"}
    signature |= {"count_factor_ptr": "*fp32", "rows": "i32", "classes": "i32", "ignore_index": "i32"}
    numbers = ("factor", "scale", "slope", "weight", "alpha", "beta", "ce_weight", "label_smoothing")
    signature |= {name: "fp32" for name in numbers}
    name = f"{target} {dtype} V={classes} {variant}" + ("" if needs_grad else ", no gradient")
    return Build(
        name, "kdfast.ops.kl.triton_kernels", "_kl_kernel", signature, constants, options, target,
        aligned=("student_ptr", "teacher_ptr", "grad_ptr", "student_outer", "teacher_outer", "grad_outer", "classes"),
    )  # fmt: skip


def count_factor_build(target: str) -> Build:
    signature = {"out_ptr": "*fp32", "labels_ptr": "*i64", "mask_ptr": "*u8"}
    signature |= {"rows": "i32", "ignore_index": "i64", "factor": "fp32"}
    module = "kdfast.ops.kl.triton_kernels"
    return Build(
        f"{target} count", module, "_count_factor_kernel", signature, {"BLOCK": 4096}, {"num_warps": 8}, target
    )


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
    builds += [build(variant, 128256, "bf16", "sm_90", needs_grad=False) for variant in VARIANTS]
    return [*builds, *map(count_factor_build, TARGETS)]


def every_build() -> list[Build]:
    """Every line of the tables, and the rest of what cross-entropy can be compiled to where rows are longest."""
    builds = [
        build(variant, classes, dtype, target)
        for target in TARGETS
        for variant in VARIANTS
        for classes in (*CLASSES, *MORE_CLASSES)
        for dtype in DTYPES
    ]
    builds += [
        build(variant, classes, "bf16", target)
        for target in TARGETS
        for variant in MORE_VARIANTS
        for classes in (CLASSES[1], CLASSES[-1])
    ]
    names = {made.name for made in builds}
    return [*builds, *(made for made in default_builds() if made.name not in names)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_kl.py")


def test_rows_are_addressed_in_64_bits(compiled):
    """The program's index, 32 bits, is widened before anything is multiplied with it."""
    for made in default_builds():
        if made.kernel != "_kl_kernel":
            continue  # one program
        text = compiled[made.name].text["ttir"]
        ((index,),) = [re.findall(r"(%\w+) = tt\.get_program_id x : i32", text)]
        uses = [line for line in text.splitlines() if re.search(rf"{re.escape(index)}\b(?! = )", line)]
        assert uses and all("arith.extsi" in line and "i32 to i64" in line for line in uses), (made.name, uses)
        # What is added to a pointer in 32 bits is a tile's columns, within a row.
        offsets = re.findall(r"tt\.addptr .*, (?:tensor<(\w+)x)?(i32|i64)>?(?: loc|$)", text, re.MULTILINE)
        assert len(offsets) >= 6, made.name
        tile = f"{made.constants['A']}x{made.constants['B']}"
        assert {shape for shape, bits in offsets if bits == "i32"} == {tile}, (made.name, offsets)


def loops_over_logits(resources: Resources) -> list[str]:
    return [body for body in loops(resources.text["ptx"]) if "ld.global" in body]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_threads_exchange_nothing_within_a_long_row(compiled, variant, dtype):
    bodies = loops_over_logits(compiled[f"sm_90 {dtype} V=128256 {variant}"])
    assert len(bodies) == (3 if variant in ("js", "standardized") else 2)  # reads of the row
    for body in bodies:
        assert "shfl" not in body and "bar.sync" not in body and "st.shared" not in body


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_move_16_bytes_at_a_time(compiled, variant, dtype):
    bodies = loops(compiled[f"sm_90 {dtype} V=128256 {variant}"].text["ptx"])
    accesses = [a for body in bodies for a in re.findall(r"(?:ld|st)\.global\S*", body)]
    assert len(accesses) >= 2 * 4 + 2
    assert all("v4.b32" in access for access in accesses), accesses


# operations of the special-function units an element, in all reads of a long row (the kernel's first comment)
SPECIAL = {
    "forward": (4, 2),
    "forward + ce, T=3, smoothed, argmax": (6, 3),
    "forward + ce, T=4, labels": (4, 2),
    "reverse": (3, 2),
    "js": (8, 5),
    "dkd": (4, 2),
    "standardized": (4, 2),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_special_functions_an_element(compiled, variant):
    elements = 16  # a thread's share of a tile
    for suffix, expected in zip(("", ", no gradient"), SPECIAL[variant], strict=True):
        bodies = loops_over_logits(compiled[f"sm_90 bf16 V=128256 {variant}{suffix}"])
        count = sum(len(re.findall(r"\b(?:ex2|lg2|rcp|rsqrt|sqrt|div)\.", body)) for body in bodies)
        # Beside them a lane of 8 elements is brought to its new maxima, and has its mean where it is standardized.
        lanes = elements // 8
        extra = {"forward + ce, T=3, smoothed, argmax": 3, "forward + ce, T=4, labels": 3, "standardized": 5}
        assert count <= expected * elements + extra.get(variant, 2) * lanes
        assert count >= expected * elements


def test_a_shift_is_the_same_number_wherever_it_stands(compiled):
    """No product is contracted into a sum but by tl.fma, which the kernel's accuracy at low temperatures rests on."""
    from kdfast.ops.kl import triton_kernels

    for nvidia in (True, False):
        tile = triton_kernels.tiling(100, 4, False, nvidia)
        _, options = triton_kernels.options_of(0, 1.0, 0.0, 0.0, tile, nvidia)
        assert options["enable_fp_fusion"] is False
    for name, resources in compiled.items():
        if "ptx" in resources.text and "count" not in name:
            text = resources.text["ptx"]
            assert "fma.rn" in text
            assert not re.search(r"\b(?:mul|add|sub)\.f32", text), name  # without .rn ptxas may fuse them


def test_tables_cover_every_number_of_classes():
    from kdfast.ops.kl import triton_kernels

    for itemsize, labelled, nvidia in product((2, 4), (False, True), (False, True)):
        of = (itemsize, labelled, nvidia)
        tested = {triton_kernels.tiling(classes, *of) for classes in (*CLASSES, *MORE_CLASSES)}
        for classes in [*range(1, 9000, 7), 32000, 65536, 65537, 151936, 201088, 262144, 2**31 - 1]:
            tile = triton_kernels.tiling(classes, *of)
            assert tile in tested, (classes, tile)
            assert not tile.one_tile or tile.b >= classes


def test_the_gate_sees_spills():
    """The same kernel with too few registers."""
    starved = build("dkd", 128256, "fp32", "sm_90")
    starved = starved._replace(name="starved", options={**starved.options, "maxnreg": 32})
    assert compile_all([starved], workers=1)["starved"].spills > 0
