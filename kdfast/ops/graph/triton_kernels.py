"""Triton kernels of the graph ops, written, compiled and interpreted without a GPU.

Formulas: kdfast/reference/relations.py.

The selection never stores the matrix, and never sorts a tile. It looks at the product twice:

1. ``_bounds_kernel`` takes every few tiles and keeps the largest value of each of BN columns (one comparison an
   element). The k-th largest of those is a value that k columns reach: a limit for the row (``_limits_kernel``).
2. ``_hits_kernel`` takes all tiles and appends what reaches the limit to the row's buffer, a few times k of M columns.
   Positions come from an integer counter, so the order in a buffer differs from run to run; what is in it does not.
3. ``_select_kernel`` sorts the buffer by value, then index: the result is the same whatever the order was. A row whose
   buffer was too small (the sampled tiles were unlike the others) goes through all its columns here instead.

A similarity is one integer, as in csrc/cpu/graph_select.h: value, then index, then whether it is NaN. Work: N M D (1 +
1 / stride) multiply-adds. Memory: N (CAPACITY * 8 + bins * 4) bytes.

Products of float32 are three of TF32 on NVIDIA's tensor cores, nearly as exact as float32's. Nearly: limits are lower
by what they may be off, and what is found is computed anew in float32 before it is sorted (EXACT). So are distances.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast import backends
from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.graph.function import empty_graph

COSINE = tl.constexpr(0)
DOT = tl.constexpr(1)
EUCLIDEAN = tl.constexpr(2)
INFINITY = tl.constexpr(float("inf"))
NORM_EPS = tl.constexpr(1e-12)
NOTHING = tl.constexpr(-(2**63))  # below every key
LARGEST_INDEX = tl.constexpr(2**31 - 1)


@triton.jit
def _key(value, index):
    """int64, larger for what comes first."""
    nan = value != value
    bits = tl.where(nan, -INFINITY, value + 0.0).to(tl.int32, bitcast=True)  # + 0: one zero
    ordered = tl.where(bits < 0, bits ^ LARGEST_INDEX, bits).to(tl.int64)
    return (ordered << 32) | ((LARGEST_INDEX - index.to(tl.int64)) << 1) | nan.to(tl.int64)


@triton.jit
def _value(key):
    ordered = (key >> 32).to(tl.int32)
    value = tl.where(ordered < 0, ordered ^ LARGEST_INDEX, ordered).to(tl.float32, bitcast=True)
    return tl.where((key & 1) != 0, float("nan"), value)


@triton.jit
def _index(key):
    return LARGEST_INDEX - ((key >> 1) & LARGEST_INDEX)


@triton.jit
def _combine(product, a, b, METRIC: tl.constexpr):
    """The similarity of rows with inner product ``product`` and coefficients a, b; larger is nearer."""
    if METRIC == COSINE:
        return product * a * b
    if METRIC == EUCLIDEAN:
        return 2.0 * product - (a + b)
    return product


@triton.jit
def _admitted(rows, columns, n, m, labels_ptr, SELF: tl.constexpr):
    """(rows, columns): whether a column may be a neighbour. Numbers of 32 bits, as a key has 31 for the index."""
    keep = (rows < n)[:, None] & (columns < m)[None, :]
    if labels_ptr is not None:  # which leave out the row itself
        # Of the last row past the end: no mask, which AMD's scalar registers have no room for.
        own = tl.load(labels_ptr + tl.minimum(rows, n - 1))
        other = tl.load(labels_ptr + tl.minimum(columns, m - 1))
        keep = keep & (own[:, None] != other[None, :])
    elif not SELF:
        keep = keep & (rows[:, None] != columns[None, :])
    return keep


@triton.jit
def _tile(
    x_ptr, y_ptr, a_ptr, b_ptr, rows, columns, n, m, width,
    METRIC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Similarities (BM, BN); rows and columns past the end repeat the last one."""
    rows, columns = tl.minimum(rows, n - 1).to(tl.int64), tl.minimum(columns, m - 1).to(tl.int64)
    product = tl.zeros([BM, BN], tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(x_ptr + rows[:, None] * width + d[None, :], mask=(d < width)[None, :], other=0.0)
        y = tl.load(y_ptr + columns[None, :] * width + d[:, None], mask=(d < width)[:, None], other=0.0)
        product = tl.dot(x, y, product, input_precision=PRECISION)
    a, b = tl.load(a_ptr + rows), tl.load(b_ptr + columns)
    return _combine(product, a[:, None], b[None, :], METRIC)


# Reads the rows once, writes 4 bytes each.
@triton.jit
def _coefficients_kernel(x_ptr, out_ptr, width, METRIC: tl.constexpr, BD: tl.constexpr):
    """1 / norm of a row (0 for a zero row), or its squared norm for distances."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BD], tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
        total += x * x
    square = tl.sum(total, axis=0)
    if METRIC == COSINE:
        norm = tl.sqrt_rn(square)
        norm_or_eps = tl.maximum(norm, NORM_EPS, propagate_nan=tl.PropagateNan.ALL)
        square = tl.where(norm == 0, 0.0, tl.div_rn(1.0, norm_or_eps))
    tl.store(out_ptr + row, square)


@triton.jit(do_not_specialize=["n", "m", "stride"])
def _bounds_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, labels_ptr, bins_ptr, n, m, width, stride,
    METRIC: tl.constexpr, PRECISION: tl.constexpr, SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """bins[row, split * BN + lane]: the largest similarity in lane ``lane`` of every stride-th tile of a split."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    split, splits = tl.program_id(1), tl.num_programs(1)
    largest = tl.full([BM, BN], -INFINITY, tl.float32)
    for start in range(split * stride * BN, m, splits * stride * BN):
        columns = start + tl.arange(0, BN)
        scores = _tile(
            x_ptr, y_ptr, a_ptr, b_ptr, rows, columns, n, m, width, METRIC, PRECISION, BM, BN, BD
        )  # fmt: skip
        # A NaN is not larger.
        largest = tl.where(_admitted(rows, columns, n, m, labels_ptr, SELF) & (scores > largest), scores, largest)
    bins = (splits * BN).to(tl.int64)
    lanes = split * BN + tl.arange(0, BN)
    tl.store(bins_ptr + rows.to(tl.int64)[:, None] * bins + lanes[None, :], largest, mask=(rows < n)[:, None])


@triton.jit(do_not_specialize=["k"])
def _limits_kernel(
    bins_ptr, limits_ptr, a_ptr, largest_ptr, k, error, METRIC: tl.constexpr, EXACT: tl.constexpr, BINS: tl.constexpr
):
    """The k-th largest of a row's bins, lowered by what rounding may have added where EXACT: see ``rounding``."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BINS)
    ordered = tl.sort(tl.load(bins_ptr + row * BINS + lanes), descending=True)
    limit = tl.max(tl.where(lanes == k - 1, ordered, -INFINITY), axis=0)
    if METRIC == EUCLIDEAN:
        # k columns are within `reach`; whatever is nearer has |y|^2 <= 2 |x|^2 + 2 reach, so its tile said `limit`.
        square = tl.load(a_ptr + row)
        reach = (-limit + 3.0 * error * square) / (1.0 - 2.0 * error)
        limit = -(reach * (1.0 + 2.0 * error) + 3.0 * error * square)
    elif EXACT:
        # k columns may be `error` below it, and what is above those may be said to be as much below.
        size = 1.0  # |x| |y| at most
        if METRIC != COSINE:
            size = tl.sqrt_rn(tl.load(a_ptr + row)) * tl.sqrt_rn(tl.load(largest_ptr))
        limit -= 2.0 * error * size
    tl.store(limits_ptr + row, tl.where(limit == limit, limit, -INFINITY))


@triton.jit(do_not_specialize=["n", "m"])
def _hits_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, labels_ptr, limits_ptr, counts_ptr, keys_ptr, capacity, n, m, width,
    METRIC: tl.constexpr, PRECISION: tl.constexpr, SELF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """Appends the keys of what is not below the row's limit; counts[row] goes on counting past the capacity."""
    # One axis: y ends at 65535 tiles, and keys may be more.
    tile, tiles = tl.program_id(0), tl.cdiv(m, BN)
    rows = (tile // tiles) * BM + tl.arange(0, BM)
    columns = (tile % tiles) * BN + tl.arange(0, BN)
    scores = _tile(
        x_ptr, y_ptr, a_ptr, b_ptr, rows, columns, n, m, width, METRIC, PRECISION, BM, BN, BD
    )  # fmt: skip
    limits = tl.load(limits_ptr + rows, mask=rows < n, other=INFINITY)
    below = scores < limits[:, None]
    hit = _admitted(rows, columns, n, m, labels_ptr, SELF) & (below == 0)  # a NaN is not below
    place = tl.atomic_add(counts_ptr + rows[:, None] + tl.zeros([BM, BN], tl.int32), 1, mask=hit, sem="relaxed")
    keys = _key(scores, columns[None, :] + tl.zeros([BM, BN], tl.int32))
    buffers = keys_ptr + rows.to(tl.int64)[:, None] * capacity
    tl.store(buffers + place, keys, mask=hit & (place < capacity))


@triton.jit
def _row_scores(
    x_ptr, y_ptr, a_ptr, b_ptr, row, columns, present, width, METRIC: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr
):
    """Similarities of a row to ``columns``; distances from the differences, negated."""
    total = tl.zeros([BC], tl.float32)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
        mask = present[:, None] & (d < width)[None, :]
        y = tl.load(y_ptr + columns[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if METRIC == EUCLIDEAN:
            total += tl.sum((x[None, :] - y) * (x[None, :] - y), axis=1)
        else:
            total += tl.sum(x[None, :] * y, axis=1)
    if METRIC == EUCLIDEAN:
        return -tl.sqrt_rn(total)
    return _combine(total, tl.load(a_ptr + row), tl.load(b_ptr + columns, mask=present, other=0.0), METRIC)


@triton.jit(do_not_specialize=["m", "k"])
def _select_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr, labels_ptr, counts_ptr, keys_ptr, values_ptr, indices_ptr, m, width, k,
    METRIC: tl.constexpr, SELF: tl.constexpr, EXACT: tl.constexpr, CAPACITY: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The first k keys of a row: of its buffer, or of all columns where that overflowed."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, CAPACITY)
    count = tl.load(counts_ptr + row)
    fits = count <= CAPACITY
    if fits:
        present = lanes < count
        best = tl.load(keys_ptr + row * CAPACITY + lanes, mask=present, other=NOTHING)
        if EXACT:
            columns = tl.where(present, _index(best), 0)
            scores = _row_scores(x_ptr, y_ptr, a_ptr, b_ptr, row, columns, present, width, METRIC, CAPACITY, BD)
            best = tl.where(present, _key(scores, columns), NOTHING)
    else:
        best = tl.full([CAPACITY], NOTHING, tl.int64)
        for start in range(0, m, CAPACITY):
            columns = (start + lanes).to(tl.int64)
            present = columns < m
            if labels_ptr is not None:
                present = present & (tl.load(labels_ptr + columns, mask=present, other=0) != tl.load(labels_ptr + row))
            elif not SELF:
                present = present & (columns != row)
            scores = _row_scores(x_ptr, y_ptr, a_ptr, b_ptr, row, columns, present, width, METRIC, CAPACITY, BD)
            more = tl.where(present, _key(scores, columns), NOTHING)
            # The larger of what one order and the reverse order hold at each place are the largest of both.
            best = tl.maximum(tl.sort(best, descending=True), tl.sort(more))
    best = tl.sort(best, descending=True)
    found = best != NOTHING
    value = tl.where(found, _value(best), -INFINITY)
    if METRIC == EUCLIDEAN:
        value = -value
    tl.store(values_ptr + row * k + lanes, value, mask=lanes < k)
    tl.store(indices_ptr + row * k + lanes, tl.where(found, _index(best), -1), mask=lanes < k)


# Reads each row and its k neighbours once; writes k values and k slopes.
@triton.jit(do_not_specialize=["k"])
def _edges_kernel(
    x_ptr, a_ptr, teacher_ptr, indices_ptr, weight_ptr, loss_ptr, values_ptr, slopes_ptr, width, k, inverse_temperature,
    factor, METRIC: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """KL(teacher || student) of a row's edges, times ``factor`` and its weight.

    Similarities and the loss's gradient by them go to ``values_ptr`` and ``slopes_ptr``; both None: no gradient.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, K)
    present = lanes < k
    ends = tl.load(indices_ptr + row * k + lanes, mask=present, other=0)
    scores = _row_scores(x_ptr, x_ptr, a_ptr, a_ptr, row, ends, present, width, METRIC, K, BD)
    teacher = tl.load(teacher_ptr + row * k + lanes, mask=present, other=0.0)
    if METRIC == EUCLIDEAN:
        teacher = -teacher
    student_z = tl.where(present, scores * inverse_temperature, -INFINITY)
    teacher_z = tl.where(present, teacher * inverse_temperature, -INFINITY)
    student_z -= tl.max(student_z, axis=0)
    teacher_z -= tl.max(teacher_z, axis=0)
    e_student, e_teacher = tl.exp(student_z), tl.exp(teacher_z)
    sum_student, sum_teacher = tl.sum(e_student, axis=0), tl.sum(e_teacher, axis=0)
    p_student, p_teacher = tl.div_rn(e_student, sum_student), tl.div_rn(e_teacher, sum_teacher)
    terms = tl.where(p_teacher == 0, 0.0, p_teacher * (teacher_z - student_z))
    weight = factor
    if weight_ptr is not None:
        weight = factor * tl.load(weight_ptr + row).to(tl.float32)
    tl.store(loss_ptr + row, weight * (tl.sum(terms, axis=0) + tl.log(sum_student) - tl.log(sum_teacher)))
    if slopes_ptr is not None:
        slope = weight * inverse_temperature * (p_student - p_teacher)
        if METRIC == EUCLIDEAN:
            slope, scores = -slope, -scores
        tl.store(values_ptr + row * k + lanes, scores, mask=present)
        tl.store(slopes_ptr + row * k + lanes, slope, mask=present)


@triton.jit
def _edge_sum(
    x, total, along, edges, others, present, y_ptr, b_ptr, values_ptr, slopes_ptr, d, width, METRIC: tl.constexpr
):
    """Adds the share of ``edges``, whose other ends are ``others``, to the gradient of one row's slice x."""
    slope = tl.load(slopes_ptr + edges, mask=present, other=0.0)
    value = tl.load(values_ptr + edges, mask=present, other=0.0)
    mask = present[:, None] & (d < width)[None, :]
    y = tl.load(y_ptr + others[:, None] * width + d[None, :], mask=mask, other=0.0).to(tl.float32)
    if METRIC == EUCLIDEAN:
        weight = tl.where(present & (value != 0), tl.div_rn(slope, value), 0.0)
        total += tl.sum(weight[:, None] * tl.where(present[:, None], x[None, :] - y, 0.0), axis=0)
    else:
        weight = slope
        if METRIC == COSINE:
            weight = slope * tl.load(b_ptr + others, mask=present, other=0.0)
            along += tl.sum(tl.where(present, slope * value, 0.0), axis=0)
        total += tl.sum(weight[:, None] * y, axis=0)
    return total, along


# Reads the k rows of the edges that begin in a row and those of the edges that end in it, a slice of BD columns at a
# time; writes the gradient once. Edges are summed in a fixed order.
@triton.jit(do_not_specialize=["k"])
def _gradient_kernel(
    x_ptr, y_ptr, a_ptr, b_ptr,
    indices_ptr,  # None: no edges begin here
    order_ptr, begin_ptr,  # None: none end here
    values_ptr, slopes_ptr, grad_ptr, width, k, METRIC: tl.constexpr, K: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    lanes = tl.arange(0, K)
    x = tl.load(x_ptr + row * width + d, mask=d < width, other=0.0).to(tl.float32)
    total = tl.zeros([BD], tl.float32)
    along = 0.0
    if indices_ptr is not None:
        edges = row * k + lanes
        others = tl.load(indices_ptr + edges, mask=lanes < k, other=-1)
        total, along = _edge_sum(
            x, total, along, edges, others, others >= 0, y_ptr, b_ptr, values_ptr, slopes_ptr, d, width, METRIC
        )  # fmt: skip
    if order_ptr is not None:
        first, last = tl.load(begin_ptr + row), tl.load(begin_ptr + row + 1)
        for start in range(first, last, K):
            present = start + lanes < last
            edges = tl.load(order_ptr + start + lanes, mask=present, other=0)
            total, along = _edge_sum(
                x, total, along, edges, edges // k, present, y_ptr, b_ptr, values_ptr, slopes_ptr, d, width, METRIC
            )  # fmt: skip
    if METRIC == COSINE:
        a = tl.load(a_ptr + row)
        # Where the norm is below eps and a = 1 / eps, the length of x is no constant of its similarities.
        total = tl.where(a >= 1.0 / NORM_EPS, total, total - x * (a * along))
        total = tl.where(a == 0, 0.0, a * total)
    tl.store(grad_ptr + row * width + d, total.to(grad_ptr.dtype.element_ty), mask=d < width)


class Tiling(NamedTuple):
    """A tile of the product, and the depth of one tl.dot."""

    bm: int
    bn: int
    bd: int
    num_warps: int
    num_stages: int
    precision: str  # of a product of float32


# Of ten for half types and seven for float32 the fastest on an H100 at N = 16384, D = 512 and N = 8192, D = 128. On the
# ordinary units float32 takes several times as long as three products of TF32, and longer than storing the matrix.
TILINGS = {
    "half": Tiling(128, 64, 64, 8, 3, "ieee"),
    "tf32": Tiling(128, 64, 32, 8, 3, "tf32"),
    "float32": Tiling(64, 64, 32, 4, 3, "tf32x3"),
    "float32, AMD": Tiling(64, 64, 16, 8, 2, "ieee"),  # whose matrix units have float32; unmeasured
}


class Selection(NamedTuple):
    """For up to ``k`` neighbours: every how many tiles the limits look at, and the buffer of a row."""

    k: int  # what is made of a row's edges takes as many at a time
    stride: int
    capacity: int


# About stride * k columns reach a limit. select.py saves the first look, 1 / stride of the product, and the counters.
SELECTIONS = (Selection(32, 4, 256), Selection(64, 4, 512), Selection(128, 2, 1024))
BINS_SPLITS = 8  # programs along the columns that share a row's limits
COEFFICIENTS_BLOCK = 256  # columns of a row that are squared at a time
ROW_BLOCK = 64  # columns of a row that one program reads at a time
ROW_WARPS = 4
SELECT_BLOCK = 16  # columns of a row's whole buffer: 64 numbers a thread


def tiling(dtype: torch.dtype, ieee: bool, nvidia: bool) -> Tiling:
    if dtype != torch.float32:
        return TILINGS["half"]
    if not ieee:
        return TILINGS["tf32"]
    return TILINGS["float32" if nvidia else "float32, AMD"]


def selection(k: int) -> Selection:
    return next(line for line in SELECTIONS if k <= line.k)


def rounding(width: int, dtype: torch.dtype, ieee: bool) -> float:
    """Error of a tile's product over |x| |y|, and of its squared distance over |x|^2 + |y|^2.

    Sums of float32, on tensor cores cut off and of three parts; factors cut off to TF32's 11 bits, or to twice as many.
    """
    cut = 0.0 if dtype != torch.float32 else 3 * 2.0**-20 if ieee else 2.0**-9
    return (width + 8) * 2.0**-22 + cut


def coefficients(x: Tensor, metric: int) -> Tensor:
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    if x.shape[0]:
        _coefficients_kernel[(x.shape[0],)](
            x, out, x.shape[1], METRIC=metric, BD=COEFFICIENTS_BLOCK, num_warps=ROW_WARPS
        )
    return out


def graph(
    features: Tensor,
    keys: Tensor | None,
    labels: Tensor | None,
    k: int,
    metric: int,
    include_self: bool,
    ieee: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.graph``."""
    if features.dtype == torch.float64:
        raise TypeError("kdfast's Triton kernels take float16, bfloat16 or float32, got float64")
    x = features.contiguous()
    y = x if keys is None else keys.contiguous()
    n, m, width = x.shape[0], y.shape[0], x.shape[1]
    values, indices = empty_graph(features, k)
    if n == 0:
        return values, indices
    own, nvidia = include_self or keys is not None, backends.on_nvidia(x)
    tile = tiling(x.dtype, ieee, nvidia)
    exact = metric == EUCLIDEAN.value or (x.dtype == torch.float32 and ieee)
    _, stride, capacity = selection(k)
    stride = max(1, min(stride, m // (8 * k)))
    with torch.cuda.device_of(x):
        factors = centred(x, y, metric)
        a = coefficients(factors[0], metric)
        b = a if x is y else coefficients(factors[1], metric)
        largest = b.max() if exact and metric == DOT.value else None
        bins = torch.empty(n, BINS_SPLITS * tile.bn, dtype=torch.float32, device=x.device)
        limits = torch.empty(n, dtype=torch.float32, device=x.device)
        counts = torch.zeros(n, dtype=torch.int32, device=x.device)
        found = torch.empty(n, capacity, dtype=torch.int64, device=x.device)
        shared: dict[str, Any] = {"METRIC": metric, "PRECISION": tile.precision, "SELF": own}
        shared |= {"BM": tile.bm, "BN": tile.bn, "BD": tile.bd}
        shared |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        rows = triton.cdiv(n, tile.bm)
        _bounds_kernel[(rows, BINS_SPLITS)](*factors, a, b, labels, bins, n, m, width, stride, **shared)
        limit(bins, limits, a, largest, k, rounding(width, x.dtype, ieee), metric, exact)
        _hits_kernel[(rows * triton.cdiv(m, tile.bn),)](
            *factors, a, b, labels, limits, counts, found, capacity, n, m, width, **shared
        )
        finish(x, y, a, b, labels, counts, found, values, indices, k, metric, own, exact)
    return values, indices


def centred(x: Tensor, y: Tensor, metric: int) -> tuple[Tensor, Tensor]:
    """What to multiply for ``metric``: squares of distances cancel less around the centre of ``y``."""
    if metric != EUCLIDEAN.value or x.dtype != torch.float32:  # half types would be rounded again
        return x, y
    centre = y.nan_to_num(0, 0, 0).mean(dim=0)
    return (x - centre, y - centre) if x is not y else (x - centre,) * 2


def limit(
    bins: Tensor, limits: Tensor, a: Tensor, largest: Tensor | None, k: int, error: float, metric: int, exact: bool
) -> None:
    """``limits`` of rows from their ``bins``, a power of 2 of them."""
    _limits_kernel[(len(bins),)](
        bins, limits, a, largest, k, error, METRIC=metric, EXACT=exact, BINS=bins.shape[1], num_warps=ROW_WARPS
    )


def finish(
    x: Tensor,
    y: Tensor,
    a: Tensor,
    b: Tensor,
    labels: Tensor | None,
    counts: Tensor,
    found: Tensor,
    values: Tensor,
    indices: Tensor,
    k: int,
    metric: int,
    own: bool,
    exact: bool,
) -> None:
    """The k best of what was ``found``, ``counts`` of each row; of all columns where they are more than fit.

    ``exact``: by similarities that are computed anew.
    """
    capacity = found.shape[1]
    _select_kernel[(x.shape[0],)](
        x, y, a, b, labels, counts, found, values, indices, y.shape[0], x.shape[1], k,
        METRIC=metric, SELF=own, EXACT=exact, CAPACITY=capacity, BD=SELECT_BLOCK,
        **select_options(capacity, backends.on_nvidia(x)),
    )  # fmt: skip


def select_options(capacity: int, nvidia: bool) -> dict[str, int]:
    """At most 4 keys a thread: what sorting them takes fits in registers."""
    options = {"num_warps": max(ROW_WARPS, capacity // 128)}
    if nvidia:
        # All that a program can have: ptxas otherwise spills some to let one more program onto the SM.
        options["maxnreg"] = min(255, 65536 // (32 * options["num_warps"]))
    return options


def _transposed(indices: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Edges sorted by where they end, in a fixed order, and where those of each column begin. -1 comes before all."""
    ends, order = indices.flatten().sort(stable=True)
    return order, torch.searchsorted(ends, torch.arange(columns + 1, device=indices.device))


def _gradient(
    own: Tensor,
    other: Tensor,
    indices: Tensor,
    incoming: bool,
    outgoing: bool,
    values: Tensor,
    slopes: Tensor,
    metric: int,
) -> Tensor:
    grad = torch.empty_like(own)
    if own.numel() == 0:
        return grad
    order, begin = _transposed(indices, own.shape[0]) if incoming else (None, None)
    a = coefficients(own, metric)
    b = a if own is other else coefficients(other, metric)
    width, k = own.shape[1], indices.shape[1]
    # Up to 65535 slices, 4 million features. One axis of both, as for hits, takes registers that fp32 lacks: it spills.
    _gradient_kernel[(own.shape[0], triton.cdiv(width, ROW_BLOCK))](
        own, other, a, b, indices if outgoing else None, order, begin, values, slopes, grad, width, k,
        METRIC=metric, K=selection(k).k, BD=ROW_BLOCK, num_warps=ROW_WARPS,
    )  # fmt: skip
    return grad


def graph_backward(
    features: Tensor,
    keys: Tensor | None,
    values: Tensor,
    indices: Tensor,
    grad_values: Tensor,
    metric: int,
    needs_features: bool,
    needs_keys: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.graph_backward``."""
    x = features.contiguous()
    grad, grad_keys = x.new_empty(0), x.new_empty(0)
    with torch.cuda.device_of(x):
        if keys is None:
            return _gradient(x, x, indices, True, True, values, grad_values, metric), grad_keys
        y = keys.contiguous()
        if needs_features:
            grad = _gradient(x, y, indices, False, True, values, grad_values, metric)
        if needs_keys:
            grad_keys = _gradient(y, x, indices, True, False, values, grad_values, metric)
    return grad, grad_keys


def graph_kl(
    student: Tensor,
    teacher_values: Tensor,
    indices: Tensor,
    row_weight: Tensor | None,
    temperature: float,
    metric: int,
    reduction: int,
    needs_grad: bool,
) -> tuple[Tensor, Tensor]:
    """``torch.ops.kdfast.graph_kl``."""
    x = student.contiguous()
    n, width, k = x.shape[0], x.shape[1], indices.shape[1]
    losses = torch.empty(n, dtype=torch.float32, device=x.device)
    # Similarities, and the loss's gradient by them.
    edges = (
        (x.new_empty(indices.shape, dtype=torch.float32), x.new_empty(indices.shape, dtype=torch.float32))
        if needs_grad
        else None
    )
    divisor = {REDUCTIONS["mean"]: n * width, REDUCTIONS["batchmean"]: n}.get(reduction, 1)
    with torch.cuda.device_of(x):
        _edges_kernel[(n,)](
            x, coefficients(x, metric), teacher_values, indices, row_weight, losses, *(edges or (None, None)), width, k,
            1 / temperature, 1 / max(divisor, 1), METRIC=metric, K=selection(k).k, BD=ROW_BLOCK, num_warps=ROW_WARPS,
        )  # fmt: skip
        grad = x.new_empty(0) if edges is None else _gradient(x, x, indices, True, True, *edges, metric)
    return losses if reduction == REDUCTIONS["none"] else losses.sum(), grad
