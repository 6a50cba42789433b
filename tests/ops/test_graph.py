"""What is particular to the graph kernels: exact neighbours and ties, instruction sets, threads, crowds, keys.

What is promised of indices: those of the values, in order, ties to the smaller index, where values that differ by less
than rounding may change places. So inputs whose similarities are exact in the dtype have exactly the reference's
indices, and equal rows, whose similarities are equal bit for bit, are always in the order of their indices.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peak_memory import peak_memory
from torch import Tensor

import kdfast
from kdfast import backends, reference
from kdfast.ops.graph import MAX_K
from support import DTYPES, LAYOUTS, assert_parity

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

METRICS = ("cosine", "dot", "euclidean")
# A panel is 48, 24 or 12 rows of float, half of that of double: below, at and just above, and several blocks.
ROWS = (2, 3, 11, 12, 13, 24, 47, 48, 49, 97, 129)
# A vector is up to 16 lanes, four of them a slice, and the depth of a tile is cut at 128.
WIDTHS = (1, 3, 16, 17, 64, 70, 128, 129, 300)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(*shape: int, seed: int = 0, largest: int = 3) -> Tensor:
    """Products, squared distances and their sums are exact in every dtype, and there are ties everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).double()


def assert_best(graph: kdfast.SimilarityGraph, features: Tensor, metric: str, keys: Tensor | None = None) -> None:
    """The graph has the values of the float64 reference, rank by rank, and each belongs to its index."""
    x, y = features.double(), (features if keys is None else keys).double()
    values, indices = graph
    k = values.shape[1]
    truth = reference.similarity_graph(x, k, metric=metric, keys=None if keys is None else y).values
    matrix = reference.relations.similarity_matrix(x, y, metric)
    own = matrix.gather(1, indices)
    own = -own if metric == "euclidean" else own
    size = 1.0 if metric == "cosine" else float(matrix.abs().max())
    eps = torch.finfo(values.dtype).eps
    # Any way to sum D rounded products errs by about sqrt(D) eps of their size; half types are widened exactly.
    tolerance = 8 * math.sqrt(max(x[0].numel(), 1)) * eps * size
    torch.testing.assert_close(values.double(), truth, rtol=0, atol=tolerance)
    torch.testing.assert_close(values.double(), own, rtol=0, atol=tolerance)
    assert all(len(set(row)) == k for row in indices.tolist())
    ordered = -values if metric == "euclidean" else values
    tied = ordered[:, 1:] == ordered[:, :-1]
    assert (ordered[:, 1:] <= ordered[:, :-1]).all()
    assert (indices[:, 1:] > indices[:, :-1])[tied].all(), "equal values are not in the order of their indices"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_every_instruction_set_finds_the_neighbours(level, metric, dtype):
    with backends.use_cpu_level(level):
        for seed, n in enumerate(ROWS):
            x = normal(n, WIDTHS[seed % len(WIDTHS)], seed=seed).to(dtype)
            k = (1, n - 1, min(20, n - 1))[seed % 3]
            assert_best(kdfast.similarity_graph(x, k, metric=metric), x, metric)
            keys = normal(n + 5, x.shape[1], seed=seed + 100).to(dtype)
            assert_best(kdfast.similarity_graph(x, k, metric=metric, keys=keys), x, metric, keys)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_indices_are_exactly_the_reference_s_where_similarities_are_exact(level, metric, dtype):
    with backends.use_cpu_level(level):
        for n in (13, 97, 128):
            for k in (1, 7, n - 1, n):
                x, labels = integers(n, 6, seed=k).to(dtype), torch.arange(n) % 3
                calls = {"keys": {"k": k, "keys": x.clone()}, "include_self": {"k": k, "include_self": True}}
                calls |= {"rows": {"k": k}} if k < n else {}
                for options in calls.values():
                    fast = kdfast.similarity_graph(x, metric=metric, **options)
                    expected = reference.similarity_graph(x, metric=metric, **options)
                    assert torch.equal(fast.indices, expected.indices)
                    torch.testing.assert_close(fast.values, expected.values)
                fast = kdfast.hardest_negatives(x, labels, k, metric=metric)
                expected = reference.hardest_negatives(x, labels, k, metric=metric)
                assert torch.equal(fast.indices, expected.indices)
                torch.testing.assert_close(fast.values, expected.values)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [60, 500])
def test_equal_rows_have_equal_bits_and_come_in_the_order_of_their_indices(metric, n):
    distinct = normal(7, 40).float()
    which = torch.randint(7, (n,), generator=torch.Generator().manual_seed(1))
    values, indices = kdfast.similarity_graph(distinct[which], min(n - 1, MAX_K), metric=metric)
    for row, (columns, order) in enumerate(zip(values, indices, strict=True)):
        for group in range(7):
            of_group = which[order] == group
            assert columns[of_group].unique().numel() <= 1
            assert (order[of_group].diff() > 0).all()
        assert row not in order.tolist()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("keys", [False, True])
def test_the_number_of_threads_changes_no_bit(metric, keys):
    x, y = normal(700, 70).float(), normal(500, 70, seed=1).float()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = x.clone().requires_grad_()
            values, indices = kdfast.similarity_graph(leaf, 9, metric=metric, keys=y if keys else None)
            (grad,) = torch.autograd.grad(values, leaf, torch.ones_like(values))
            results.append((values.detach(), indices, grad))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@given(
    n=st.sampled_from(ROWS),
    width=st.sampled_from(WIDTHS),
    k=st.integers(1, MAX_K),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(sorted(LAYOUTS)),
    scale=st.sampled_from((1.0, 1e-3, 30.0)),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_shape_layout_and_scale(n, width, k, metric, dtype, layout, scale, seed):
    x = LAYOUTS[layout]((normal(n, width, seed=seed) * scale).to(dtype))
    assert_best(kdfast.similarity_graph(x, min(k, n - 1), metric=metric), x, metric)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_gradients_keep_the_rule_at_every_instruction_set(level, metric, dtype):
    with backends.use_cpu_level(level):
        for seed, width in enumerate(WIDTHS):
            if width < 3:
                continue  # neighbours at width 1 are ties or nearly, and the dtypes choose different ones
            inputs = {"features": normal(30, width, seed=seed)}
            # All of them: which ones, rounding cannot change.
            assert_parity("similarity_graph", inputs, {"k": 29, "metric": metric}, torch.float64, seed=seed)
            pair = {"student": inputs["features"], "teacher": normal(30, 9, seed=seed + 50)}
            options = {"k": 29, "metric": metric, "temperature": 0.7}
            assert_parity("graph_distillation_loss", pair, options, dtype, seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("metric", METRICS)
def test_gradients_of_features_and_keys_are_the_reference_s_at_the_same_edges(metric, dtype):
    x, y = normal(40, 33).to(dtype), normal(70, 33, seed=1).to(dtype)
    grad_output = normal(40, 6, seed=2)
    results = []
    for function, kind in ((kdfast.similarity_graph, dtype), (reference.similarity_graph, torch.float64)):
        leaves = [t.to(kind).requires_grad_() for t in (x, y)]
        graph = function(leaves[0], 6, metric=metric, keys=leaves[1])
        results.append([graph.indices, *torch.autograd.grad(graph.values, leaves, grad_output.to(graph.values.dtype))])
    fast, truth = results
    assert torch.equal(fast[0], truth[0])
    for grad, expected in zip(fast[1:], truth[1:], strict=True):
        torch.testing.assert_close(grad, expected.to(dtype))


def test_gradients_flow_to_the_side_that_asks():
    x, y = normal(5, 3), normal(8, 3, seed=1)
    for x_needs, y_needs in ((True, False), (False, True), (True, True)):
        leaves = (x.clone().requires_grad_(x_needs), y.clone().requires_grad_(y_needs))
        kdfast.similarity_graph(leaves[0], 2, keys=leaves[1]).values.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [x_needs, y_needs]
    leaves = tuple(t.clone().requires_grad_() for t in (x, y))
    for metric in METRICS:
        assert torch.autograd.gradcheck(
            lambda a, b, metric=metric: kdfast.similarity_graph(a, 3, metric=metric, keys=b).values, leaves
        )


def test_a_row_that_is_everybody_s_neighbour_sums_all_its_edges():
    x = normal(300, 8)
    x[17] *= 100  # the largest or the smallest inner product of every row
    assert_parity("similarity_graph", {"features": x}, {"k": MAX_K, "metric": "dot"}, torch.float64)
    assert_parity("graph_distillation_loss", {"student": x, "teacher": x.flip(1)}, {"metric": "dot"}, torch.float64)


def clusters(count: int, size: int, spread: float) -> Tensor:
    """Crowds far from each other: exact in float32, but not their squared norms."""
    centres = integers(count, 5, largest=1000)
    return (centres.unsqueeze(1) + spread * integers(count, size, 5, seed=1, largest=30)).flatten(0, 1)


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("spread", [2.0**-6, 2.0**-2])
def test_distances_within_a_crowd_are_exact_although_the_squares_cancel(spread, keys):
    """More rows in a crowd than are kept as candidates, and differences below the rounding of the squares."""
    x = clusters(4, 120, spread).float()
    others = x.flip(0).contiguous() if keys else None
    fast = kdfast.similarity_graph(x, 20, metric="euclidean", keys=others)
    expected = reference.similarity_graph(x, 20, metric="euclidean", keys=others)
    assert torch.equal(fast.indices, expected.indices)
    torch.testing.assert_close(fast.values, expected.values)
    labels = torch.arange(len(x)) % 2
    fast, expected = (module.hardest_negatives(x, labels, 20, metric="euclidean") for module in (kdfast, reference))
    assert torch.equal(fast.indices, expected.indices)


def test_an_offset_common_to_all_rows_leaves_distances_exact():
    x = (integers(200, 8, largest=20) / 16 + 4000).float()
    fast = kdfast.similarity_graph(x, 20, metric="euclidean")
    assert torch.equal(fast.indices, reference.similarity_graph(x, 20, metric="euclidean").indices)


@pytest.mark.parametrize("metric", METRICS)
def test_a_row_of_nan_is_nobody_s_neighbour_and_changes_no_other(metric):
    x = normal(120, 20).float()
    clean = kdfast.similarity_graph(x[torch.arange(120) != 50], 9, metric=metric)
    x[50, 3] = math.nan
    values, indices = kdfast.similarity_graph(x, 9, metric=metric)
    others = torch.arange(120) != 50
    assert torch.equal(values[others], clean.values)
    assert torch.equal(indices[others], clean.indices + (clean.indices >= 50))
    assert values[50].isnan().all()
    assert indices[50].tolist() == list(range(9))
    last = kdfast.similarity_graph(x, 119, metric=metric)
    assert (last.indices[others][:, -1] == 50).all()
    assert last.values[others][:, -1].isnan().all()


@pytest.mark.parametrize("metric", METRICS)
def test_infinite_rows_are_ordered_as_the_reference_orders_them(metric):
    x = normal(30, 4)
    x[3, 1], x[9, 2], x[20, 1] = math.inf, -math.inf, -math.inf
    fast, expected = (m.similarity_graph(x, 29, metric=metric) for m in (kdfast, reference))
    assert torch.equal(fast.indices, expected.indices)
    torch.testing.assert_close(fast.values, expected.values, equal_nan=True)


def test_zero_rows_have_cosine_0_and_gradient_0():
    x = normal(40, 6).float()
    x[[4, 30]] = 0
    leaf = x.requires_grad_()
    values, indices = kdfast.similarity_graph(leaf, 39)
    values.sum().backward()
    assert (values[[4, 30]] == 0).all()
    assert indices[4].tolist() == [i for i in range(40) if i != 4]
    assert (leaf.grad[[4, 30]] == 0).all()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_one_number_tie(dtype):
    """Their cosines are exactly 1 or -1 whatever the numbers are."""
    rows = normal(200, 1).to(dtype)
    found = kdfast.similarity_graph(rows, 100)
    expected = kdfast.reference.similarity_graph(rows, 100)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.values, expected.values)


@pytest.mark.parametrize("metric", METRICS)
def test_no_rows_no_width_and_all_rows_equal(metric):
    keys = normal(5, 3).float()
    for nothing in (torch.zeros(0, 3), torch.zeros(0, 6)[:, ::2], torch.zeros(3, 0).T):
        empty = kdfast.similarity_graph(nothing, 2, metric=metric, keys=keys)
        assert empty.values.shape == empty.indices.shape == (0, 2)
    flat = kdfast.similarity_graph(torch.zeros(100, 0), 3, metric=metric)
    assert (flat.values == 0).all()
    assert flat.indices[50].tolist() == [0, 1, 2]
    same = kdfast.similarity_graph(torch.full((300, 9), 0.3), 128, metric=metric)
    assert same.indices[0].tolist() == list(range(1, 129))
    assert same.indices[299].tolist() == list(range(128))


@pytest.mark.parametrize("metric", METRICS)
def test_missing_negatives_are_padded_and_pass_no_gradient(metric):
    x = normal(60, 5).float().requires_grad_()
    labels = torch.zeros(60, dtype=torch.int64)
    labels[[7, 8]] = -3
    values, indices = kdfast.hardest_negatives(x, labels, 4, metric=metric)
    missing = torch.tensor([r not in (7, 8) for r in range(60)]).unsqueeze(1) & (torch.arange(4) > 1)
    assert (indices[missing] == -1).all()
    assert (values[missing] == (math.inf if metric == "euclidean" else -math.inf)).all()
    assert values[~missing].isfinite().all()
    (grad,) = torch.autograd.grad(values[~missing].sum(), x)
    assert grad.isfinite().all()


def test_more_neighbours_than_the_kernels_keep_run_the_reference_and_say_so_once():
    x = normal(MAX_K + 10, 4).float()
    backends._warned.clear()
    with pytest.warns(RuntimeWarning, match=f"keep up to {MAX_K} neighbours a row, k is {MAX_K + 1}") as record:
        for _ in range(2):
            fast = kdfast.similarity_graph(x, MAX_K + 1)
    assert len(record) == 1
    assert torch.equal(fast.indices, reference.similarity_graph(x, MAX_K + 1).indices)
    with backends.use("cpu"), pytest.raises(RuntimeError, match=r"cannot run: .* k is 129"):
        kdfast.similarity_graph(x, MAX_K + 1)
    assert_best(kdfast.similarity_graph(x, MAX_K), x, "cosine")


def test_a_second_derivative_is_refused():
    x = normal(6, 3).requires_grad_()
    (grad,) = torch.autograd.grad(kdfast.similarity_graph(x, 2).values.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_large_upstream_gradient_meets_small_ones_before_they_are_rounded(dtype):
    pair = {"student": normal(500, 6), "teacher": normal(500, 6, seed=1)}
    leaves = [pair["student"].to(kind).requires_grad_() for kind in (dtype, torch.float64)]
    for leaf in leaves:
        teacher = pair["teacher"].to(dtype).to(leaf.dtype)
        (kdfast.graph_distillation_loss(leaf, teacher, temperature=5.0) * 1024).backward()
    half = dtype == torch.float16
    torch.testing.assert_close(leaves[0].grad.double(), leaves[1].grad, rtol=2e-2 if half else 1e-4, atol=1e-4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is counted on Linux")
def test_no_matrix_of_all_pairs_is_stored():
    n = 6000
    assert peak_memory("graph_distillation_loss", n, 8) < 4 * n * n / 10
