"""The Triton kernels of the graph ops without a GPU: interpreted, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from typing import Any

import pytest
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, report, run_in_interpreter

pytestmark = needs_triton

MODULE = "kdfast.ops.graph.triton_kernels"
DTYPES = ("bf16", "fp32")
METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}
TENSORS = {"labels_ptr": "*i64", "counts_ptr": "*i32", "keys_ptr": "*i64", "indices_ptr": "*i64", "order_ptr": "*i64"}
TENSORS |= {"begin_ptr": "*i64", "weight_ptr": "*fp64"}
NUMBERS = {"inverse_temperature": "fp32", "factor": "fp32", "error": "fp32"}


def build(kernel: str, target: str, dtype: str, constants: dict[str, Any], options: dict[str, Any], name: str) -> Build:
    import importlib

    names = getattr(importlib.import_module(MODULE), kernel).arg_names
    features = {"x_ptr", "y_ptr", "grad_ptr"}
    signature = {}
    for argument in names:
        if argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}" if argument in features else TENSORS.get(argument, "*fp32")
        elif argument.islower():
            signature[argument] = NUMBERS.get(argument, "i32")
    signature = {argument: kind for argument, kind in signature.items() if argument not in constants}
    aligned = [argument for argument in names if argument.endswith("_ptr") or argument == "width"]
    return Build(f"{target} {dtype} {kernel}{name}", MODULE, kernel, signature, constants, options, target, aligned)


def builds_of(target: str, dtype: str, metric: str, k: int, ieee: bool = True) -> list[Build]:
    """Every kernel as the launchers start it."""
    import torch

    from kdfast.ops.graph import triton_kernels as graph

    tile = graph.tiling(torch.float32 if dtype == "fp32" else torch.bfloat16, ieee)
    capacity = next(capacity for largest, _, capacity in graph.SELECTIONS if k <= largest)
    common = {"METRIC": METRICS[metric]}
    product = {**common, "PRECISION": "ieee" if ieee else "tf32", "SELF": False, "labels_ptr": None}
    product |= {"BM": tile.bm, "BN": tile.bn, "BD": tile.bd}
    tiles = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    row = {"num_warps": graph.ROW_WARPS}
    K, BD = max(2, 1 << (k - 1).bit_length()), graph.ROW_BLOCK
    name = f" {metric} k={k}" + ("" if ieee else " tf32")
    select = {**common, "SELF": False, "labels_ptr": None, "CAPACITY": capacity, "BD": graph.SELECT_BLOCK}
    kernels = {
        "_coefficients_kernel": ({**common, "BD": 256}, {}),
        "_bounds_kernel": (product, tiles),
        "_limits_kernel": ({**common, "BINS": graph.BINS_SPLITS * tile.bn}, row),
        "_hits_kernel": ({**product, "CAPACITY": capacity}, tiles),
        "_select_kernel": (select, {"num_warps": graph.select_warps(capacity)}),
        "_edges_kernel": ({**common, "NEEDS_GRAD": True, "K": K, "BD": BD, "weight_ptr": None}, row),
        "_gradient_kernel": ({**common, "OUTGOING": True, "K": K, "BD": BD}, row),
    }
    return [build(kernel, target, dtype, constants, options, name) for kernel, (constants, options) in kernels.items()]


def default_builds() -> list[Build]:
    builds = []
    for target in TARGETS:
        builds += builds_of(target, "bf16", "cosine", 20)
        builds += builds_of(target, "fp32", "euclidean", 128)
    builds += builds_of("sm_90", "fp32", "dot", 20, ieee=False)
    return builds


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_graph.py")


def test_no_default_configuration_spills(compiled):
    print(f"\n{report(compiled)}")
    assert {name for name, resources in compiled.items() if resources.spills} == set()


def test_products_of_half_types_and_tf32_run_on_tensor_cores(compiled):
    for name, resources in compiled.items():
        if "sm_" not in name or not re.search("_bounds|_hits", name):
            continue
        on_tensor_cores = re.search(r"\b(?:mma|wgmma|tcgen05)\b", resources.text["ptx"]) is not None
        assert on_tensor_cores == ("bf16" in name or "tf32" in name), name


def test_nothing_is_added_up_by_atomics_but_integer_counts(compiled):
    for name, resources in compiled.items():
        operations = re.findall(r"\btt\.atomic_rmw (\w+)", resources.text["ttir"])
        assert operations == (["add"] if "_hits" in name else []), name


@pytest.mark.parametrize("k", [1, 32, 33, 64, 65, 128])
def test_every_k_has_a_line_and_its_buffer_holds_what_is_expected(k):
    from kdfast.ops.graph import MAX_K
    from kdfast.ops.graph import triton_kernels as graph

    assert graph.SELECTIONS[-1][0] == MAX_K
    stride, capacity = next((stride, capacity) for largest, stride, capacity in graph.SELECTIONS if k <= largest)
    assert capacity >= 1.5 * stride * k
    assert graph.BINS_SPLITS * min(tile.bn for tile in graph.TILINGS.values()) >= 2 * k
