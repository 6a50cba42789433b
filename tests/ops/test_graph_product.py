"""The product of graphs without a GPU: its own source, a fiber for each thread, tensor cores as PTX documents them.

Limits and the sorted result are Triton's kernels: the launcher around all of them is interpreted.
"""

from __future__ import annotations

import ctypes
import math
from itertools import product
from types import SimpleNamespace

import emulation
import product_emulation
import pytest
import torch
from torch import Tensor
from triton_support import needs_triton, run_in_interpreter

from kdfast import backends
from kdfast.ops.graph import MAX_K, METRICS
from kdfast.ops.graph import function as graph_ops

needs_compiler = pytest.mark.skipif(product_emulation.MISSING is not None, reason=str(product_emulation.MISSING))
every_metric = pytest.mark.parametrize("metric", METRICS)
HALF = (torch.float16, torch.bfloat16)
every_tile = pytest.mark.parametrize("rows", [128, 256])
every_dtype = pytest.mark.parametrize("dtype", HALF, ids=str)
TILE = 128  # columns
BINS = 16  # of a block
UNTOUCHED = -5
INDEX = 2**31 - 1
# Parts of a tile, one and several; features of a part of a stage, of one, and of more stages than there are; rows of a
# tile; type.
FLOAT16, BFLOAT16 = HALF
SIZES = [(1, 8, 128, FLOAT16), (5, 64, 256, BFLOAT16), (127, 72, 128, BFLOAT16), (128, 8, 128, FLOAT16)]
SIZES += [(129, 136, 256, FLOAT16), (300, 200, 128, FLOAT16), (300, 200, 256, BFLOAT16), (400, 16, 128, BFLOAT16)]
SIZES += [(520, 8, 256, FLOAT16)]
RECTANGLES = [(1, 300, 8, 128), (130, 129, 72, 256), (300, 7, 264, 256), (130, 400, 8, 128)]


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Their products are exact, and have many ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coefficients(x: Tensor, metric: str) -> Tensor:
    """Exact ones, so that ties stay ties, and different ones, so that it matters whose they are."""
    power = torch.arange(len(x), dtype=torch.float32) % 3
    return 2**power if metric == "cosine" else x.float().square().sum(1)


def scores_of(x: Tensor, y: Tensor, a: Tensor, b: Tensor, metric: str) -> Tensor:
    products = x.float() @ y.float().T
    if metric == "cosine":
        return products * a[:, None] * b
    return 2 * products - (a[:, None] + b) if metric == "euclidean" else products


def admitted(n: int, m: int, labels: Tensor | None, itself: bool) -> Tensor:
    if labels is not None:
        return labels[:n, None] != labels
    return torch.ones(n, m, dtype=torch.bool) if itself else ~torch.eye(n, m, dtype=torch.bool)


def keys_of(scores: Tensor) -> Tensor:
    """Of (rows, columns): those of triton_kernels.py."""
    bits = torch.where(scores.isnan(), -math.inf, scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ INDEX, bits).long()
    return ordered << 32 | INDEX - torch.arange(scores.shape[1]) << 1 | scores.isnan().long()


def values_of(keys: Tensor) -> Tensor:
    ordered = (keys >> 32).int()
    return torch.where(ordered < 0, ordered ^ INDEX, ordered).view(torch.float32)


def hits(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    limits: Tensor,
    metric: str,
    capacity: int,
    labels: Tensor | None = None,
    itself: bool = False,
    rows: int = 128,
) -> tuple[Tensor, Tensor]:
    """Counts and buffers, of which nothing was touched before."""
    counts = torch.zeros(len(x), dtype=torch.int32)
    found = torch.full((len(x), capacity), UNTOUCHED)
    product_emulation.graph_hits(x, y, a, b, labels, limits, counts, found, METRICS[metric], itself, x is y, rows)
    return counts, found


def check_hits(
    x: Tensor,
    y: Tensor,
    metric: str,
    *,
    wanted: int = 9,
    capacity: int | None = None,
    labels: Tensor | None = None,
    itself: bool = False,
    rows: int = 128,
) -> None:
    """What is not below the ``wanted``-th best of a row, of which many are equal, and nothing else, in any order."""
    n, m = len(x), len(y)
    a = coefficients(x, metric)
    b = a if x is y else coefficients(y, metric)
    scores = scores_of(x, y, a, b, metric)
    admits = admitted(n, m, labels, itself)
    ranked = scores.nan_to_num(-math.inf, math.inf, -math.inf).masked_fill(~admits, -math.inf)
    limits = ranked.sort(dim=1, descending=True).values[:, min(wanted, m) - 1].contiguous()
    hit = admits & ~(scores < limits[:, None])
    keys = keys_of(scores)
    capacity = m + 3 if capacity is None else capacity
    counts, found = hits(x, y, a, b, limits, metric, capacity, labels, itself, rows)
    assert torch.equal(counts, hit.sum(dim=1).int())
    for row in range(n):
        size, expected = min(int(counts[row]), capacity), keys[row][hit[row]].sort().values
        got = found[row, :size].sort().values
        assert (found[row, size:] == UNTOUCHED).all()
        if size == len(expected):
            assert torch.equal(got, expected), row
        else:
            assert len(got.unique()) == size and torch.isin(got, expected).all(), row


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=str)
@every_metric
def test_hits_of_one_half_of_the_matrix_are_those_of_all_of_it(metric, size):
    *shape, rows, dtype = size
    x = integers(*shape, dtype=dtype)
    check_hits(x, x, metric, rows=rows)
    check_hits(x, x, metric, itself=True, wanted=2, rows=rows)
    check_hits(x, x, metric, labels=torch.arange(len(x)) * 7 % 3, wanted=40, rows=rows)


@needs_compiler
@pytest.mark.parametrize("size", RECTANGLES, ids=str)
@every_metric
def test_hits_among_other_keys(metric, size):
    n, m, width, rows = size
    x, y = (integers(count, width, dtype=torch.bfloat16, seed=count) for count in (n, m))
    check_hits(x, y, metric, itself=True, rows=rows)


@needs_compiler
@every_tile
@pytest.mark.parametrize("symmetric", [True, False])
def test_more_hits_than_a_warp_can_list_and_than_a_row_has_room_for(symmetric, rows):
    """All pairs are hits; of equal rows, and where the buffers are full, counts go on."""
    x = integers(290, 8, dtype=torch.float16)
    y = x if symmetric else x.clone()
    check_hits(x, y, "dot", wanted=290, itself=True, rows=rows)
    check_hits(x, y, "dot", wanted=290, itself=True, capacity=33, rows=rows)
    equal = x[:1].expand(200, 8).contiguous()
    check_hits(equal, equal if symmetric else equal.clone(), "euclidean", itself=True, capacity=64, rows=rows)


@needs_compiler
@every_metric
@every_dtype
def test_a_nan_is_not_below_and_stays_in_its_rows(dtype, metric):
    x = integers(200, 24, dtype=dtype)
    x[[3, 150], [0, 23]] = math.nan
    y = x.clone()
    for other, itself, rows in ((x, False, 128), (x, False, 256), (y, True, 128)):
        a = coefficients(x, metric)
        scores = scores_of(x, other, a, a, metric)
        assert scores.isnan().sum() == 2 * 2 * 200 - 4
        limits = torch.full((200,), 8.0)
        limits[3] = -math.inf
        counts, found = hits(x, other, a, a, limits, metric, 210, itself=itself, rows=rows)
        hit = admitted(200, 200, None, itself) & ~(scores < limits[:, None])
        assert torch.equal(counts, hit.sum(dim=1).int())
        for row in range(200):
            assert torch.equal(found[row, : counts[row]].sort().values, keys_of(scores)[row][hit[row]].sort().values)


@needs_compiler
@every_metric
@every_tile
def test_equal_rows_have_equal_bits_on_either_side_of_the_diagonal(rows, metric):
    """Whether a row was a row of its tile or a column: a tie that is none would not go to the smaller index."""
    distinct, n = 37, 300
    which = torch.randint(distinct, (n,), generator=torch.Generator().manual_seed(1))
    x = normal(distinct, 72, dtype=torch.bfloat16)[which].contiguous()
    squares = x.double().square().sum(1)
    a = (squares.rsqrt() if metric == "cosine" else squares).float()
    _, found = hits(x, x, a, a, torch.full((n,), -math.inf), metric, n, itself=True, rows=rows)
    keys = found.gather(1, (INDEX - ((found >> 1) & INDEX)).argsort(dim=1))
    values = values_of(keys)
    assert torch.equal(values, values.T)
    first = torch.stack([(which == w).nonzero()[0, 0] if w in which else torch.tensor(0) for w in range(distinct)])
    assert torch.equal(values, values[first[which]][:, first[which]])
    products, a = x.double() @ x.double().T, a.double()
    exact = {"cosine": products * a[:, None] * a, "dot": products, "euclidean": 2 * products - (a[:, None] + a)}[metric]
    torch.testing.assert_close(values.double(), exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


def check_bounds(
    x: Tensor,
    y: Tensor,
    metric: str,
    *,
    stride: int = 1,
    splits: int = 1,
    labels: Tensor | None = None,
    itself: bool = False,
    rows: int = 128,
) -> None:
    n, m = len(x), len(y)
    a = coefficients(x, metric)
    b = a if x is y else coefficients(y, metric)
    bins = torch.full((n, BINS * splits), math.nan)
    product_emulation.graph_bounds(x, y, a, b, labels, bins, METRICS[metric], itself, stride, rows)
    scores = scores_of(x, y, a, b, metric)
    scores = scores.masked_fill(~admitted(n, m, labels, itself) | scores.isnan(), -math.inf)
    scores = torch.nn.functional.pad(scores, (0, -m % (TILE * stride * splits)), value=-math.inf)
    # A tile's columns: 2 warps, 8 times 4 lanes with 2 neighbours each; those of every other 8 share a bin.
    looked_at = scores.unflatten(1, (-1, splits, stride, 2, 4, 2, 4, 2))[:, :, :, 0]
    expected = looked_at.amax(dim=(1, 4, 7))  # rows, splits, warps, parity, lanes
    assert torch.equal(bins, expected.transpose(3, 4).reshape(n, -1))


@needs_compiler
@pytest.mark.parametrize("size", SIZES, ids=str)
@every_metric
def test_bins_have_the_largest_of_their_columns(metric, size):
    *shape, rows, dtype = size
    x = integers(*shape, dtype=dtype)
    check_bounds(x, x, metric, rows=rows)
    check_bounds(x, x, metric, itself=True, stride=2, rows=rows)
    check_bounds(x, x, metric, labels=torch.arange(len(x)) // 2 % 3, splits=2, rows=rows)


@needs_compiler
@pytest.mark.parametrize("stride, splits", [(1, 2), (2, 1), (2, 2), (3, 4)])
def test_every_stride_th_tile_is_looked_at(stride, splits):
    """What the limits leave out costs no neighbour, only work: so it is looked at here."""
    x, y = integers(140, 72, dtype=torch.bfloat16), integers(1300, 72, dtype=torch.bfloat16, seed=1)
    check_bounds(x, y, "cosine", stride=stride, splits=splits, itself=True)


@needs_compiler
def test_a_nan_is_not_larger():
    x = integers(140, 16, dtype=torch.bfloat16)
    x[[3, 131], 4] = math.nan
    check_bounds(x, x, "dot")
    check_bounds(x, x, "cosine", splits=2)


def places(rows: int, columns: int, symmetric: bool) -> list[tuple[int, int]]:
    blocks = rows * (rows + 1) // 2 if symmetric else rows * columns
    found = torch.empty(blocks, 2, dtype=torch.int32)
    emulation.library("product_emulation").places_on_cpu(
        rows, columns, symmetric, ctypes.c_int64(blocks), emulation.pointer(found)
    )
    return [tuple(place) for place in found.tolist()]


@needs_compiler
def test_every_tile_is_taken_once():
    for tiles in range(1, 70):
        expected = [(row, column) for row in range(tiles) for column in range(row, tiles)]
        assert sorted(places(tiles, tiles, True)) == expected
    for rows, columns in product((1, 2, 7, 8, 9, 16, 19), repeat=2):
        assert sorted(places(rows, columns, False)) == list(product(range(rows), range(columns)))


@needs_compiler
def test_blocks_of_one_time_are_neighbours():
    """256 blocks read few rows and columns: at most 8 of one kind, and those of the other that follow one another."""
    for symmetric in (True, False):
        order = places(128, 128, symmetric)
        for start in range(0, len(order) - 256, 256):
            some = order[start : start + 256]
            assert len({row for row, _ in some}) + len({column for _, column in some}) <= 60


@needs_compiler
def test_the_order_holds_where_the_root_is_rounded():
    place = (ctypes.c_int32 * 2)()
    tiles = 65535  # a grid has no more blocks
    for group in range(1, 8191):
        begin = 32 * group**2 + 4 * group
        for block, expected in ((begin, (0, 8 * group)), (begin - 1, (8 * group - 1, 8 * group - 1))):
            emulation.library("product_emulation").place_in_triangle_on_cpu(ctypes.c_int64(block), tiles, place)
            assert tuple(place) == expected


@needs_compiler
@needs_triton
def test_the_launcher_in_the_interpreter():
    run_in_interpreter("interpreter_graph_product.py")


def overflow(k: int, stride: int, bins: int, capacity: int) -> float:
    """How probable it is that a row's buffer overflows, where any column may be the best and in any tile and bin.

    It does if of the best ``capacity + 1`` columns those that are looked at lie in fewer than k bins.
    """
    held = [1.0] + [0.0] * k  # by how many bins have something; the last: k or more
    for _ in range(capacity + 1):
        moved = [0.0] * (k + 1)
        for used, probability in enumerate(held):
            new = (1 - used / bins) / stride if used < k else 0.0
            moved[min(used + 1, k)] += probability * new
            moved[used] += probability * (1 - new)
        held = moved
    return sum(held[:k])


@needs_triton
def test_few_rows_have_more_hits_than_there_is_room_for():
    from kdfast.ops.graph import product as launcher
    from kdfast.ops.graph import triton_kernels

    assert overflow(20, 8, 256, 256) > 1e-3  # a stride of 8 would need another buffer
    for line in launcher.SELECTIONS:
        assert overflow(line.k, line.stride, line.bins, line.capacity) < 1e-5
        assert line.bins & (line.bins - 1) == 0 and line.bins % BINS == 0
        assert line.capacity in {other.capacity for other in triton_kernels.SELECTIONS}
    assert launcher.SELECTIONS[-1].k == MAX_K


@needs_triton
@pytest.mark.parametrize("k", [1, 20, 32, 33, 64, 65, 128])
def test_of_few_columns_enough_bins_hold_something(k):
    from kdfast.ops.graph import product as launcher

    for columns in (200, 1100, 2100, 5000, 10**5):
        line = launcher.selection(k, columns)
        assert line.k >= k
        full = min(line.bins, columns // line.stride // launcher.BIN)
        assert line.stride == 1 or full >= 2 * k
        assert columns > 10**4 or line.stride <= launcher.selection(k, 10**5).stride


@needs_triton
def test_it_takes_nothing_from_the_others_before_it_is_measured(monkeypatch):
    from kdfast.ops.graph import product as launcher
    from kdfast.ops.graph import select, triton_kernels

    for module, name in ((launcher, "product"), (select, "select"), (triton_kernels, "triton")):
        monkeypatch.setattr(module, "graph", lambda *arguments, name=name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "_missing_cuda", None)

    def chosen(n: int, dtype: torch.dtype = torch.bfloat16, k: int = 20) -> str:
        features = SimpleNamespace(shape=(n, 0), dtype=dtype, device=torch.device("cuda"), is_cpu=False)
        return graph_ops._graph_cuda(features, None, None, k, METRICS["cosine"])

    assert launcher.FASTER == ()
    assert chosen(2**14) == "select" and chosen(2**12) == "triton"
    monkeypatch.setattr(launcher, "FASTER", ((32, 2**20), (64, 2**26)))
    assert chosen(2**14) == chosen(2**10) == chosen(2**13, k=33) == "product"
    assert chosen(2**12, k=33) == chosen(2**9) == "triton"
    assert chosen(2**14, torch.float32) == "triton" and chosen(2**14, k=65) == "select"
    for name, expected in ((backends.CUDA, "select"), (backends.TRITON, "triton")):
        with backends.use(name):
            assert chosen(2**14) == expected
