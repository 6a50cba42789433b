"""The Triton kernels of the graph ops on the CPU, interpreted. Run by test_graph_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import select_emulation
import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.graph import METRICS, select, triton_kernels
from kdfast.ops.graph.triton_kernels import Selection, Tiling

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

# Several tiles either way, and a width that is no multiple of the depth.
TILE = Tiling(16, 16, 16, 1, 1, "ieee")
N, WIDTH = 14, 21
# How the columns reach the selection: two looks at tiles, buffers that overflow, or tiles of cuBLAS with the kernel of
# CUDA C++, emulated. Buffer of a row.
PATHS = {"tiles": 16, "overflow": 8, "select": 32}

path = pytest.mark.parametrize("path", PATHS)
metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tables(monkeypatch):
    take(monkeypatch, "tiles")


def take(monkeypatch, path):
    capacity = PATHS[path]
    monkeypatch.setattr(triton_kernels, "SELECTIONS", (Selection(8, 2, capacity), Selection(16, 2, capacity)))
    monkeypatch.setattr(
        triton_kernels, "tiling", lambda dtype, ieee, nvidia: TILE._replace(precision="ieee" if ieee else "tf32")
    )
    monkeypatch.setattr(triton_kernels, "BINS_SPLITS", 2)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    library = None if select_emulation.MISSING else select_emulation.registered()
    yield
    if library is not None:
        library._destroy()


def product(rows, columns, out):
    """PyTorch has no product of half types in float32 on the CPU."""
    torch.mm(rows.float(), columns.float(), out=out)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def launch(monkeypatch, path, x, k, metric, *, keys=None, labels=None, include_self=False, ieee=True):
    take(monkeypatch, path)
    launcher = select if path == "select" else triton_kernels
    if launcher is select:
        if select_emulation.MISSING:
            pytest.skip(select_emulation.MISSING)
        for name, value in {"TILE": 128, "ROWS": 8, "COLUMNS": 16, "product": product}.items():
            monkeypatch.setattr(select, name, value)
    with np.errstate(all="ignore"):
        return launcher.graph(x, keys, labels, k, METRICS[metric], include_self, ieee)


def assert_reference(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=1e-5, atol=1e-5, equal_nan=True)


OPTIONS = {torch.float32: "keys", torch.bfloat16: "rows", torch.float16: "include_self"}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("metric", ["cosine", "dot"])
def test_limits_are_lower_by_what_products_may_be_off(metric, exact):
    """What k columns reach and what is above it may each be off by ``error`` of |x| |y|; here nothing is."""
    bins, squares, largest = integers(3, 16).sort(dim=1, descending=True).values, torch.tensor([4.0, 0.0, 9.0]), 25.0
    limits, k, error = torch.empty(3), 5, 0.125
    triton_kernels._limits_kernel[(3,)](
        bins, limits, squares, torch.tensor(largest) if exact and metric == "dot" else None, k, error,
        METRIC=METRICS[metric], EXACT=exact, BINS=16,
    )  # fmt: skip
    size = (squares * largest).sqrt() if metric == "dot" else 1.0
    torch.testing.assert_close(limits, bins[:, k - 1] - (2 * error * size if exact else 0.0))


def test_what_is_found_is_computed_anew_from_float32(monkeypatch):
    """Keys of float32 products come from parts of TF32 on a GPU; here they are made wrong."""
    x, made = normal(N, WIDTH), triton_kernels.finish
    expected = reference.similarity_graph(x.double(), 7, metric="dot")

    def finish(x, y, a, b, labels, counts, found, *rest):
        made(x, y, a, b, labels, counts, found ^ (1 << 40), *rest)  # another bit of each value

    monkeypatch.setattr(triton_kernels, "finish", finish)
    assert_reference(launch(monkeypatch, "tiles", x, 7, "dot"), expected)


@path
@metric
@pytest.mark.parametrize("dtype", OPTIONS, ids=str)
def test_neighbours_are_the_reference_s(monkeypatch, path, metric, dtype):
    x, keys = normal(N, WIDTH).to(dtype), normal(40, WIDTH, seed=1).to(dtype)
    options = {"keys": {"keys": keys}, "rows": {}, "include_self": {"include_self": True}}[OPTIONS[dtype]]
    wide = {n: v.double() if n == "keys" else v for n, v in options.items()}
    expected = reference.similarity_graph(x.double(), 7, metric=metric, **wide)
    assert_reference(launch(monkeypatch, path, x, 7, metric, **options), expected)


@path
@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_ties_break_to_the_smaller_index(monkeypatch, path, metric):
    k = 6
    x, labels = integers(N, 4), torch.arange(N) % 3
    assert_reference(launch(monkeypatch, path, x, k, metric), reference.similarity_graph(x, k, metric=metric))
    got = launch(monkeypatch, path, x, k, metric, labels=labels)
    assert_reference(got, reference.hardest_negatives(x, labels, k, metric=metric))


@pytest.mark.parametrize("path", ["tiles", "select"])
@metric
def test_as_many_neighbours_as_rows_and_missing_ones(monkeypatch, path, metric):
    x = integers(N, 4)
    if metric != "cosine":
        assert_reference(
            launch(monkeypatch, path, x, N - 1, metric), reference.similarity_graph(x, N - 1, metric=metric)
        )
    labels = torch.zeros(N, dtype=torch.int64)
    labels[3] = 5
    got = launch(monkeypatch, path, normal(N, 4), 4, metric, labels=labels)
    assert_reference(got, reference.hardest_negatives(normal(N, 4), labels, 4, metric=metric))


@path
def test_equal_rows_have_equal_bits(monkeypatch, path):
    x = normal(4, WIDTH)[torch.arange(N) % 4]
    values, indices = launch(monkeypatch, path, x, 2, "cosine")
    for row in range(N):
        assert values[row].unique().numel() == 1
        assert indices[row].tolist() == [j for j in range(row % 4, N, 4) if j != row][:2]


@path
def test_a_negative_zero_is_the_same_zero(monkeypatch, path):
    x = torch.tensor([[1e19, 0.0, 1e-4], [0.0, 1e19, -1e-4], [0.0, 0.0, 0.0]])  # -1e-46 rounds to -0, before 0
    values, indices = launch(monkeypatch, path, x, 1, "cosine")
    assert indices[0] == 1 and values[0] == 0


@path
@pytest.mark.parametrize("include_self", [False, True])
def test_more_equal_rows_than_a_buffer_holds(monkeypatch, path, include_self):
    x = integers(1, 4, seed=1).expand(N, 4)
    for name in ("dot", "euclidean"):
        values, indices = launch(monkeypatch, path, x, 6, name, include_self=include_self)
        assert values.unique().numel() == 1
        for row in range(N):
            assert indices[row].tolist() == [j for j in range(N) if include_self or j != row][:6]


@pytest.mark.parametrize("stride", [1, 2])
def test_the_first_look_sees_every_stride_th_tile(stride):
    """What it leaves out costs no neighbour, only work: so it is looked at here."""
    x, y, splits, width = normal(N, 4), normal(70, 4, seed=1), 2, TILE.bn
    bins, ones = torch.empty(N, splits * width), torch.ones(70)
    sizes = {"BM": TILE.bm, "BN": TILE.bn, "BD": TILE.bd}
    triton_kernels._bounds_kernel[(1, splits)](
        x, y, ones, ones, None, bins, N, len(y), 4, stride, METRIC=METRICS["dot"], PRECISION="ieee", SELF=True, **sizes
    )
    scores = torch.nn.functional.pad(x @ y.T, (0, -70 % width), value=-math.inf).unflatten(1, (-1, width))
    for split in range(splits):
        expected = scores[:, split * stride :: splits * stride].amax(1)
        torch.testing.assert_close(bins[:, split * width : (split + 1) * width], expected)


@metric
def test_better_rows_where_the_limits_do_not_look(monkeypatch, metric):
    """The tile in the middle has them all, more than a buffer holds; what follows in memory is better still."""
    n, k = 40, 2
    memory = torch.rand(64, WIDTH, generator=torch.Generator().manual_seed(4)) + 0.1
    memory[n:] = 3.0
    x = memory[:n]
    x[:16] -= 4
    x[32:] -= 4
    labels = torch.arange(n) % 3
    assert_reference(launch(monkeypatch, "overflow", x, k, metric), reference.similarity_graph(x, k, metric=metric))
    got = launch(monkeypatch, "overflow", x[16:22], k, metric, keys=x)
    assert_reference(got, reference.similarity_graph(x[16:22], k, metric=metric, keys=x))
    got = launch(monkeypatch, "overflow", x, k, metric, labels=labels)
    assert_reference(got, reference.hardest_negatives(x, labels, k, metric=metric))


@path
@metric
def test_nan_comes_last_and_stays_in_its_row(monkeypatch, path, metric):
    x = normal(N, WIDTH)
    clean = launch(monkeypatch, path, x[torch.arange(N) != 7], 5, metric)
    x[7, 2] = math.nan
    values, indices = launch(monkeypatch, path, x, 5, metric)
    others = torch.arange(N) != 7
    torch.testing.assert_close(values[others], clean[0])
    assert torch.equal(indices[others], clean[1] + (clean[1] >= 7))
    assert values[7].isnan().all()
    assert indices[7].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("path", ["tiles", "overflow", "select"])
def test_near_rows_far_from_the_origin_keep_their_order(monkeypatch, path):
    x = integers(N, 5) / 64 + 100 * integers(2, 5, seed=1).repeat_interleave(N // 2, dim=0)
    assert_reference(launch(monkeypatch, path, x, 6, "euclidean"), reference.similarity_graph(x, 6, metric="euclidean"))
    half = (integers(N, 5) / 8 + 8).bfloat16()
    expected = reference.similarity_graph(half.double(), 6, metric="euclidean")
    assert_reference(launch(monkeypatch, path, half, 6, "euclidean"), expected)


@pytest.mark.parametrize("with_keys", [False, True])
def test_crowds_larger_than_what_is_kept_of_distances(monkeypatch, with_keys):
    """Their differences are below the rounding of the squares: no product can tell who is nearest."""
    crowds = 100 * integers(2, 5, seed=1).repeat_interleave(40, dim=0)
    x = integers(80, 5) / 64 + crowds
    keys = x.flip(0)[:70].contiguous() if with_keys else None
    expected = reference.similarity_graph(x, 6, metric="euclidean", keys=keys)
    assert_reference(launch(monkeypatch, "select", x, 6, "euclidean", keys=keys), expected)


def test_an_offset_of_all_rows_hides_no_distance(monkeypatch):
    """Every row has its nearest among what is kept: none is looked up among all columns."""
    seen = []
    finish = triton_kernels.finish
    monkeypatch.setattr(triton_kernels, "finish", lambda *arguments: (seen.append(arguments), finish(*arguments)))
    x = normal(80, 5) + 4000
    got = launch(monkeypatch, "select", x, 6, "euclidean")
    assert_reference(got, reference.similarity_graph(x.double(), 6, metric="euclidean"))
    ((*_, counts, found, _, _, _, _, _),) = seen
    assert (counts <= found.shape[1]).all()


def test_tf32_is_allowed_and_no_rows_are_no_work(monkeypatch):
    x = integers(N, 4)  # exact in 11 bits
    got = launch(monkeypatch, "tiles", x, 6, "dot", ieee=False)
    assert_reference(got, reference.similarity_graph(x, 6, metric="dot"))
    values, indices = launch(monkeypatch, "tiles", x[:0], 3, "dot", keys=x)
    assert values.shape == indices.shape == (0, 3)
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        launch(monkeypatch, "tiles", x.double(), 3, "dot")


@metric
@pytest.mark.parametrize("with_keys", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_the_reference_s(metric, with_keys, dtype):
    x, keys = normal(30, 70).to(dtype), normal(20, 70, seed=1).to(dtype) if with_keys else None
    x[3] = 0
    k = 6
    leaves = [t.double().requires_grad_() for t in (x, keys) if t is not None]
    expected = reference.similarity_graph(leaves[0], k, metric=metric, keys=leaves[1] if with_keys else None)
    upstream = normal(30, k, seed=2)
    truth = torch.autograd.grad(expected.values, leaves, upstream.double())
    got = triton_kernels.graph_backward(
        x,
        keys,
        expected.values.detach().float(),
        expected.indices.contiguous(),
        upstream,
        METRICS[metric],
        True,
        with_keys,
    )
    for grad, wanted in zip(got, truth, strict=False):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad, wanted.to(dtype), rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=2e-5)
    assert (got[0][3] == 0).all() or metric != "cosine"


def test_a_row_shorter_than_eps_is_divided_by_eps_which_is_constant(monkeypatch):
    x = normal(N, WIDTH)
    x[3] *= 1e-13 / x[3].norm()
    leaf = x.double().requires_grad_()
    expected = reference.similarity_graph(leaf, 6, metric="cosine")
    values, indices = launch(monkeypatch, "overflow", x, 6, "cosine")
    assert_reference((values, indices), (expected.values.detach(), expected.indices))
    upstream = normal(N, 6, seed=2)
    (truth,) = torch.autograd.grad(expected.values, leaf, upstream.double())
    grad, _ = triton_kernels.graph_backward(x, None, values, indices, upstream, METRICS["cosine"], True, False)
    for row in (3, 4):  # a gradient of 1e12, and one beside it
        torch.testing.assert_close(grad[row].double(), truth[row], rtol=1e-4, atol=1e-4 * float(truth[row].abs().max()))


def test_a_missing_neighbour_passes_no_gradient():
    x, upstream = normal(6, 5), torch.ones(6, 2)
    indices = torch.tensor([[1, -1]] * 6)
    values = torch.tensor([[0.5, -math.inf]] * 6)
    grad, _ = triton_kernels.graph_backward(x, None, values, indices, upstream, METRICS["dot"], True, False)
    expected = x[1].repeat(6, 1)
    expected[1] += x.sum(0)
    torch.testing.assert_close(grad, expected)


@metric
@pytest.mark.parametrize("reduction", ["none", "sum", "batchmean"])
def test_the_loss_and_its_gradient_are_the_reference_s(metric, reduction):
    student, teacher, k, temperature = normal(30, 70), normal(30, 9, seed=1), 6, 0.5
    student[4] = student[5]
    graph = reference.similarity_graph(teacher, k, metric=metric)
    weight = None
    if reduction != "sum":
        weight = torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    leaf = student.double().requires_grad_()
    s = reference.relations.similarity_matrix(leaf, leaf, metric).gather(1, graph.indices)
    t = graph.values.double() * (-1 if metric == "euclidean" else 1)
    log_s, log_t = (torch.log_softmax(z / temperature, dim=1) for z in (s, t))
    rows = (log_t.exp() * (log_t - log_s)).sum(1) * (1 if weight is None else weight)
    expected = {"none": rows, "sum": rows.sum(), "batchmean": rows.mean()}[reduction]
    (truth,) = torch.autograd.grad(expected.sum(), leaf)
    for needs_grad in (False, True):
        loss, grad = triton_kernels.graph_kl(
            student,
            graph.values,
            graph.indices.contiguous(),
            weight,
            temperature,
            METRICS[metric],
            REDUCTIONS[reduction],
            needs_grad,
        )
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-4, atol=1e-6)
        assert grad.numel() == (student.numel() if needs_grad else 0)
    torch.testing.assert_close(grad.double(), truth, rtol=1e-4, atol=1e-6)
