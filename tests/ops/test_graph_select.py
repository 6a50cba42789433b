"""The selection kernel of graphs without a GPU: its own source, a fiber for each lane of a warp.

Its launcher, with Triton's last step, is the path ``select`` of interpreter_graph.py.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import select_emulation
import torch
from torch import Tensor

from kdfast import backends, reference
from kdfast.ops.graph import MAX_K, METRICS
from kdfast.ops.graph import function as graph_ops

needs_compiler = pytest.mark.skipif(select_emulation.MISSING is not None, reason=str(select_emulation.MISSING))
every_metric = pytest.mark.parametrize("metric", METRICS)
SIZES = (1, 7, 20, 32, 33, 64, 128)
CAPACITY = 256  # at least what is kept of distances
INDEX = 2**31 - 1
NOTHING = -(2**63)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def few(*shape: int, seed: int = 0) -> Tensor:
    """Numbers with many ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def coefficients(n: int, m: int, metric: str) -> tuple[Tensor, Tensor]:
    """Exact ones, so that ties stay ties."""
    a, b = few(n, seed=n), few(m, seed=m)
    return (2**a, 2**b) if metric == "cosine" else (a.square(), b.square())


def select(
    products: Tensor,
    k: int,
    metric: str,
    a: Tensor,
    b: Tensor,
    *,
    labels: Tensor | None = None,
    itself: bool = False,
    columns: int = 10**6,
    rows: int = 10**6,
    error: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """In tiles of so many rows and columns: values and indices; of distances the keys that were found, and counts."""
    n, m = products.shape
    columns = min(columns, m + -m % 16)
    values = torch.full((n, k), math.nan)
    width = CAPACITY if metric == "euclidean" else k
    keys, counts = torch.full((n, width), -5), torch.full((n,), -5, dtype=torch.int32)
    b = torch.nn.functional.pad(b, (0, columns))
    for row in range(0, n, rows):
        for column in range(0, m, columns):
            tile = products[row : row + rows, column : column + columns]
            # What is right of the matrix is better than all of it.
            tile = torch.nn.functional.pad(tile, (0, columns - tile.shape[1]), value=math.inf).contiguous()
            select_emulation.graph_select(
                tile, a, b, labels, keys, values, counts, k, METRICS[metric], row, column, m, itself, error
            )
    return values, keys, counts


def scores_of(products: Tensor, metric: str, a: Tensor, b: Tensor) -> Tensor:
    if metric == "cosine":
        return products * a[:, None] * b
    return 2 * products - (a[:, None] + b) if metric == "euclidean" else products


def best(scores: Tensor, k: int, labels: Tensor | None, itself: bool) -> tuple[Tensor, Tensor]:
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if labels is not None:
        hidden = labels[: len(scores), None] == labels
    elif not itself:
        hidden.fill_diagonal_(True)
    indices, missing = reference.relations.best(scores, k, hidden)
    return scores.gather(1, indices).masked_fill(missing, -math.inf), indices.masked_fill(missing, -1)


def decoded(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    values = torch.where(ordered < 0, ordered ^ INDEX, ordered).view(torch.float32)
    missing = keys == NOTHING
    indices = (INDEX - ((keys >> 1) & INDEX)).masked_fill(missing, -1)
    return torch.where(missing, -math.inf, torch.where((keys & 1) == 1, math.nan, values)), indices


def check(products: Tensor, k: int, metric: str, *, labels=None, itself=False, **tiles: int) -> None:
    a, b = coefficients(*products.shape, metric)
    scores = scores_of(products, metric, a, b)
    values, indices, _ = select(products, k, metric, a, b, labels=labels, itself=itself, **tiles)
    if metric == "euclidean":  # as many keys as the registers hold, of which Triton's kernel takes k
        k = max(32, 1 << (2 * k - 1).bit_length())
        assert (indices[:, k:] == -5).all()
        values, indices = decoded(indices[:, :k])
    m = products.shape[1]
    expected = best(scores, min(k, m), labels, itself)
    rest = max(k - m, 0)
    assert torch.equal(indices, torch.nn.functional.pad(expected[1], (0, rest), value=-1))
    torch.testing.assert_close(
        values, torch.nn.functional.pad(expected[0], (0, rest), value=-math.inf), rtol=0, atol=0, equal_nan=True
    )


@needs_compiler
@pytest.mark.parametrize("k", SIZES)
@every_metric
def test_the_best_of_each_row_in_their_order(metric, k):
    for products in (normal(5, 400), few(5, 400)):
        check(products, k, metric)
        check(products, k, metric, columns=144, rows=2)


@needs_compiler
@every_metric
def test_any_number_of_columns_and_as_many_neighbours(metric):
    for m in (1, 3, 31, 32, 33, 127, 128, 129, 511, 513):
        check(few(2, m), min(m, MAX_K), metric, itself=True)


@needs_compiler
@pytest.mark.parametrize("columns", [16, 48, 208])
@every_metric
def test_a_row_is_its_own_neighbour_only_where_it_may_be_and_labels_leave_out_their_own(metric, columns):
    products = few(12, 200, seed=2)
    products[torch.arange(12), torch.arange(12)] = 50  # itself the best
    for k in (1, 20, 40):
        check(products, k, metric, columns=columns, rows=5)
        check(products, k, metric, itself=True, columns=columns, rows=5)
        labels = torch.arange(200) % 3
        check(products, k, metric, labels=labels, columns=columns, rows=5)


@needs_compiler
@pytest.mark.parametrize("columns", [64, 304])
@every_metric
def test_missing_neighbours(metric, columns):
    labels = torch.zeros(300, dtype=torch.int64)
    labels[[7, 290]] = -3
    check(few(9, 300), 4, metric, labels=labels, columns=columns)
    check(few(9, 300), 4, metric, labels=labels * 0, columns=columns)


@needs_compiler
@pytest.mark.parametrize("k", [1, 20, 128])
def test_rising_falling_and_equal_rows(k):
    """All columns wait at once, none does, and none of the equal ones after the first."""
    rising = torch.arange(1000.0)
    products = torch.stack([rising, -rising, rising * 0, rising.sin()])
    for columns in (1008, 256):
        check(products, k, "dot", itself=True, columns=columns)
    two = torch.cat([torch.zeros(500), torch.ones(500)])  # many equal ones displace many equal ones
    check(torch.stack([two, two.flip(0)]), k, "dot", itself=True, columns=256)


@needs_compiler
@pytest.mark.parametrize("columns", [32, 160])
@every_metric
def test_nan_and_infinities_come_as_in_the_reference(metric, columns):
    products = normal(6, 150)
    products[0] = math.nan
    products[1, 3::2] = math.nan
    products[2, :130] = -math.inf
    products[3, :130] = math.nan
    products[3, 20:40] = -math.inf
    products[4, 7], products[4, 140] = math.inf, -math.inf
    products[5, :140] = torch.tensor([-0.0, 0.0]).repeat(70)  # one zero
    for k in (1, 20, 33, 128):
        check(products, k, metric, columns=columns)
        check(products, k, metric, labels=torch.arange(150) % 5, columns=columns)


@needs_compiler
@pytest.mark.parametrize("k", [1, 16, 17, 100])
def test_distances_that_rounding_may_have_hidden_are_counted_as_too_many(k):
    """A row that does not hold all that may be near says so; one that does says how many it holds."""
    kept = max(32, 1 << (2 * k - 1).bit_length())
    a, b = torch.ones(16), torch.ones(300)
    products = normal(16, 300)
    exact = select(products, k, "euclidean", a, b, itself=True)[2]
    assert (exact == kept).all()  # products that do not round
    for error in (1e-3, 1e-2, 0.05):
        # The k best, then what is just nearer than the limit, or just farther.
        near = 0.9 - 1e-3 * torch.arange(k + 1.0)
        reach = (2 - 2 * float(near[k - 1]) + 3 * error) / (1 - 2 * error)
        limit = -(reach * (1 + 2 * error) + 3 * error)
        rest = limit * (1 + torch.linspace(-1e-3, 1e-3, 16))
        products[:, :k], products[:, k:] = near[:k], (2 + rest[:, None]) / 2
        products[:, k] = near[k]
        counts = select(products, k, "euclidean", a, b, itself=True, error=error)[2]
        assert torch.equal(counts, torch.where(rest < limit, kept, CAPACITY + 1).int())
    few_columns = select(products[:, : kept - 2], k, "euclidean", a, b, error=0.05)[2]
    assert few_columns.tolist() == [kept - 3] * 16
    products = normal(16, 300)
    products[3], products[5] = math.nan, products[5, 0]
    counts = select(products, k, "euclidean", a, b, itself=True)[2]
    assert [row for row in range(16) if counts[row] > CAPACITY] == [3, 5]


@pytest.mark.parametrize("shape", [(1, 1), (5, 10**6), (128, 70000), (1100, 1100), (65536, 65536), (10**6, 40)])
def test_tiles_cover_the_matrix_evenly(shape):
    pytest.importorskip("triton")
    from kdfast.ops.graph import select as launcher

    n, m = shape
    rows, columns = launcher.shape_of_tiles(n, m)
    assert columns % launcher.ALIGNED == 0
    assert 0 < rows <= n and rows * columns <= launcher.TILE + rows * launcher.ALIGNED
    wide, high = -(-m // columns), -(-n // rows)
    assert wide * columns - m < wide * launcher.ALIGNED and high * rows - n < high
    assert rows >= min(n, launcher.ROWS) // 2 + 1 or rows == n == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products_are_asked_for_in_float32(dtype):
    pytest.importorskip("triton")
    from kdfast.ops.graph import select as launcher

    rows, columns = torch.empty(4, 6, dtype=dtype, device="meta"), torch.empty(8, 6, dtype=dtype, device="meta")
    launcher.product(rows, columns.T, torch.empty(4, 8, device="meta"))


def test_it_runs_where_it_is_forced_and_the_loss_on_edges_stays_triton_s(monkeypatch):
    pytest.importorskip("triton")
    from kdfast.ops.graph import select as launcher
    from kdfast.ops.graph import triton_kernels

    for name in ("graph", "graph_backward", "graph_kl"):
        monkeypatch.setattr(triton_kernels, name, lambda *arguments: "triton")
    monkeypatch.setattr(launcher, "graph", lambda *arguments: "cuda")
    arguments = torch.empty(2**14, 0, dtype=torch.bfloat16), None, None, 20, METRICS["cosine"]
    assert graph_ops._graph_cuda(*arguments) == "triton"
    monkeypatch.setattr(backends, "_missing_cuda", None)
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, is_cpu=False)
    with backends.use("cuda"):
        assert backends.has_kernel("graph", on_a_gpu)
        assert graph_ops._graph_cuda(*arguments) == "cuda"
        assert graph_ops._graph_backward_cuda() == graph_ops._graph_kl_cuda() == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert graph_ops._graph_cuda(*arguments) == "cuda"
    with backends.use("triton"):
        assert graph_ops._graph_cuda(*arguments) == "triton"


def test_it_takes_from_triton_what_it_was_measured_to_be_faster_at(monkeypatch):
    pytest.importorskip("triton")
    from kdfast.ops.graph import select as launcher

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_missing_cuda", None)

    def wins(n: int, k: int, *, m: int | None = None, dtype=torch.bfloat16, metric: str = "cosine") -> bool:
        keys = None if m is None else torch.empty(m, 0, dtype=dtype)
        features = torch.empty(n, 0, dtype=dtype)
        return backends.prefers_cuda("graph", features, launcher.is_faster(features, keys, k, METRICS[metric]))

    assert wins(2**14, 20) and wins(2**14, 64, metric="dot") and wins(2**10, 20, m=2**18)
    assert wins(2**13, 65) and wins(2**13, 128, dtype=torch.float32)
    assert not wins(2**14 - 1, 20) and not wins(2**13 - 1, 128)
    assert not wins(2**14, 20, dtype=torch.float32) and not wins(2**14, 20, metric="euclidean")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not wins(2**14, 20)  # not measured there
    monkeypatch.setattr(backends, "_missing_cuda", "not built")
    assert not wins(2**14, 20)
