"""The Triton kernels of the graph ops without a GPU: interpreted, and compiled for GPUs that are not here."""

from __future__ import annotations

import re
from importlib import import_module
from itertools import product
from typing import Any

import pytest
import torch
from triton_support import TARGETS, Build, Resources, compile_all, needs_triton, run_in_interpreter

pytestmark = needs_triton

DTYPES = ("bf16", "fp32")
MODULE = "kdfast.ops.graph.triton_kernels"
METRICS = {"cosine": 0, "dot": 1, "euclidean": 2}
# What may be a neighbour: everything, all but oneself, or all but rows of one's own label.
FILTERS: dict[str, dict[str, Any]] = {
    "all": {"SELF": True, "labels_ptr": None},
    "others": {"SELF": False, "labels_ptr": None},
    "negatives": {"SELF": False},
}
# id -> dtype, ieee
PRODUCTS = {"bf16": ("bf16", True), "fp32": ("fp32", True), "tf32": ("fp32", False)}
# The edges a row has at all: those that begin in it, those that end in it, or both.
SIDES: dict[str, dict[str, Any]] = {
    "both sides": {},
    "outgoing": {"order_ptr": None, "begin_ptr": None},
    "incoming": {"indices_ptr": None},
}
LOSSES: dict[str, dict[str, Any]] = {
    "loss": {"weight_ptr": None},
    "loss, weighted": {},
    "loss, no gradient": {"weight_ptr": None, "values_ptr": None, "slopes_ptr": None},
}
TENSORS = {"labels_ptr": "*i64", "counts_ptr": "*i32", "keys_ptr": "*i64", "indices_ptr": "*i64", "order_ptr": "*i64"}
TENSORS |= {"begin_ptr": "*i64", "weight_ptr": "*fp64"}
NUMBERS = {"inverse_temperature": "fp32", "factor": "fp32", "error": "fp32"}


def build(kernel: str, name: str, dtype: str, constants: dict[str, Any], options: dict[str, Any], target: str) -> Build:
    names = getattr(import_module(MODULE), kernel).arg_names
    features = {"x_ptr", "y_ptr", "grad_ptr"}
    signature = {}
    for argument in names:
        if argument.endswith("_ptr"):
            signature[argument] = f"*{dtype}" if argument in features else TENSORS.get(argument, "*fp32")
        elif argument.islower():
            signature[argument] = NUMBERS.get(argument, "i32")
    signature = {argument: kind for argument, kind in signature.items() if argument not in constants}
    aligned = [argument for argument in names if argument.endswith("_ptr") or argument in ("width", "capacity")]
    label = kernel.strip("_").removesuffix("_kernel")
    return Build(f"{target} {label}, {name}", MODULE, kernel, signature, constants, options, target, aligned)


def products(of: str, metric: str, filtered: str, target: str) -> list[Build]:
    """Both looks at the tiles."""
    from kdfast.ops.graph import triton_kernels as graph

    dtype, ieee = PRODUCTS[of]
    nvidia = TARGETS[target][0] == "cuda"
    tile = graph.tiling({"bf16": torch.bfloat16, "fp32": torch.float32}[dtype], ieee, nvidia)
    constants = {"METRIC": METRICS[metric], "PRECISION": tile.precision, **FILTERS[filtered]}
    constants |= {"BM": tile.bm, "BN": tile.bn, "BD": tile.bd}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    name = f"{of} {metric} {filtered}"
    return [build(kernel, name, dtype, constants, options, target) for kernel in ("_bounds_kernel", "_hits_kernel")]


def limits(metric: str, exact: bool, target: str) -> Build:
    from kdfast.ops.graph import triton_kernels as graph

    (bins,) = {graph.BINS_SPLITS * tile.bn for tile in graph.TILINGS.values()}
    constants = {"METRIC": METRICS[metric], "EXACT": exact, "BINS": bins}
    constants |= {} if exact and metric == "dot" else {"largest_ptr": None}
    name = metric + (", exact" if exact else "")
    return build("_limits_kernel", name, "fp32", constants, {"num_warps": graph.ROW_WARPS}, target)


def select(of: str, metric: str, filtered: str, capacity: int, target: str) -> Build:
    from kdfast.ops.graph import triton_kernels as graph

    dtype, _ = PRODUCTS[of]
    constants = {"METRIC": METRICS[metric], **FILTERS[filtered], "EXACT": is_exact(of, metric)}
    constants |= {"CAPACITY": capacity, "BD": graph.SELECT_BLOCK}
    options = graph.select_options(capacity, nvidia=TARGETS[target][0] == "cuda")
    return build("_select_kernel", f"{of} {metric} {filtered} of {capacity}", dtype, constants, options, target)


def is_exact(of: str, metric: str) -> bool:
    """Whether what was found is computed anew."""
    return metric == "euclidean" or of == "fp32"


def rows(dtype: str, metric: str, target: str) -> Build:
    from kdfast.ops.graph import triton_kernels as graph

    constants = {"METRIC": METRICS[metric], "BD": graph.COEFFICIENTS_BLOCK}
    options = {"num_warps": graph.ROW_WARPS}
    return build("_coefficients_kernel", f"{dtype} {metric}", dtype, constants, options, target)


def edges(dtype: str, metric: str, variant: str, k: int, target: str) -> Build:
    """The loss on the edges, or a gradient."""
    from kdfast.ops.graph import triton_kernels as graph

    kernel = "_edges_kernel" if variant in LOSSES else "_gradient_kernel"
    constants = {"METRIC": METRICS[metric], **(LOSSES | SIDES)[variant], "K": k, "BD": graph.ROW_BLOCK}
    options = {"num_warps": graph.ROW_WARPS}
    return build(kernel, f"{dtype} {metric} {variant} k<={k}", dtype, constants, options, target)


def default_builds() -> list[Build]:
    """Every metric; of the dtypes, filters and sizes some, so that each is met on each target."""
    from kdfast.ops.graph import triton_kernels as graph

    first, *_, last = graph.SELECTIONS
    builds = []
    for target in TARGETS:
        for of, metric, filtered, line in (
            ("bf16", "cosine", "others", first),
            ("tf32", "dot", "all", first),
            ("fp32", "euclidean", "negatives", last),
        ):
            dtype, _ = PRODUCTS[of]
            builds += [*products(of, metric, filtered, target), rows(dtype, metric, target)]
            builds += [
                limits(metric, is_exact(of, metric), target),
                select(of, metric, filtered, line.capacity, target),
            ]
            builds += [edges(dtype, metric, variant, line.k, target) for variant in ("loss", "both sides")]
    return builds


def every_build() -> list[Build]:
    """Every line of the tables with everything that is decided when compiled.

    What a filter or a missing pointer leaves out is small beside the rest of a kernel that takes a row: with the
    longest lists only.
    """
    from kdfast.ops.graph import MAX_K
    from kdfast.ops.graph import triton_kernels as graph

    builds = []
    for target, metric in product(TARGETS, METRICS):
        builds += [limits(metric, exact, target) for exact in {is_exact(of, metric) for of in PRODUCTS}]
        for of, filtered in product(PRODUCTS, FILTERS):
            if (of, filtered) == ("tf32", "negatives"):  # hardest_negatives has no such option
                continue
            builds += products(of, metric, filtered, target)
            for line in graph.SELECTIONS:
                if line.k == MAX_K or filtered == "others":
                    builds.append(select(of, metric, filtered, line.capacity, target))
        for dtype in DTYPES:
            builds.append(rows(dtype, metric, target))
            for line in graph.SELECTIONS:
                longest = line.k == MAX_K
                for variant in (*LOSSES, *SIDES) if longest else ("loss", "both sides"):
                    builds.append(edges(dtype, metric, variant, line.k, target))
    names = {made.name for made in builds}
    return [*builds, *(made for made in default_builds() if made.name not in names)]


@pytest.fixture(scope="module")
def compiled() -> dict[str, Resources]:
    return compile_all(default_builds())


def test_in_the_interpreter():
    run_in_interpreter("interpreter_graph.py")


def test_products_run_on_tensor_cores(compiled):
    for name, resources in compiled.items():
        if "sm_" not in name or not re.search("bounds|hits", name):
            continue
        assert re.search(r"\b(?:mma|wgmma|tcgen05)\b", resources.text["ptx"]), name


def test_nothing_is_added_up_by_atomics_but_integer_counts(compiled):
    for name, resources in compiled.items():
        operations = re.findall(r"\btt\.atomic_rmw (\w+)", resources.text["ttir"])
        assert operations == (["add"] if "hits" in name else []), name


@pytest.mark.parametrize("k", [1, 32, 33, 64, 65, 128])
def test_every_k_has_a_line_and_its_buffer_holds_what_is_expected(k):
    from kdfast.ops.graph import MAX_K
    from kdfast.ops.graph import triton_kernels as graph

    assert graph.SELECTIONS[-1].k == MAX_K
    line = graph.selection(k)
    assert line.k >= k and line.capacity >= 1.5 * line.stride * k
    assert graph.BINS_SPLITS * min(tile.bn for tile in graph.TILINGS.values()) >= 2 * k
