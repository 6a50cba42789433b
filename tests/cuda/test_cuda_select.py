"""The selection of graphs from tiles of cuBLAS, which runs where it is forced, and that in a product of our own."""

from __future__ import annotations

import configurations
import pytest
import torch
from cuda_support import arguments_of, assert_same_bits, captured, graphs_by, step, waiting_is_an_error

import kdfast
from kdfast import backends, reference
from support import LAYOUTS, assert_parity, cast, sample_inputs

pytestmark = pytest.mark.gpu

METRICS = ("cosine", "dot", "euclidean")
every_metric = pytest.mark.parametrize("metric", METRICS)
HALF = (torch.bfloat16, torch.float16)
TYPES = [*(("select", dtype) for dtype in configurations.DTYPES), *(("product", dtype) for dtype in HALF)]
every_type = pytest.mark.parametrize("launcher, dtype", TYPES, indirect=["launcher"], ids=str)
every_launcher = pytest.mark.parametrize("launcher", ["select", "product"], indirect=True)


@pytest.fixture(autouse=True)
def launcher(request):
    able, reason = backends.can_run(backends.CUDA, "graph", "cuda")
    if not able:
        pytest.skip(reason)
    with graphs_by(getattr(request, "param", "select")):
        yield


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to("cuda", dtype)


@every_type
@pytest.mark.parametrize("call", configurations.graph(), ids=str)
def test_every_configuration_keeps_the_rule_and_gives_the_same_bits_twice(call, dtype):
    inputs, options = call.arguments()
    assert_parity(call.function, inputs, options, dtype, device="cuda")
    run = step(call.function, cast({**inputs, **options}, dtype, device="cuda"))
    assert_same_bits(run(), run(), str(call))


@pytest.mark.parametrize("name", ["similarity_graph", "graph_distillation_loss", "hardest_negatives"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_few_rows_in_any_layout(name, layout):
    for seed in range(4):
        inputs, options = sample_inputs(name, seed, (6,), 5)
        assert_parity(name, inputs, options, torch.float32, seed=seed, layout=layout, device="cuda")


@every_type
@every_metric
def test_several_tiles_either_way_find_the_reference_s_neighbours(metric, dtype):
    """Integers, whose products are exact, so that ties are where they are in the reference."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (4500, 6), generator=generator).to("cuda", dtype)
    # Of a cosine that is rounded, ties are no ties: signs of a width that is a power of 4 have exact ones.
    x = torch.where(x[:, :4] < 0, -1, 1).to(dtype) if metric == "cosine" else x
    keys = x.roll(77, 0).repeat(2, 1)[:8777].contiguous()
    for options in ({}, {"keys": keys}, {"include_self": True}):
        for k in (1, 20, 128):
            found = kdfast.similarity_graph(x, k, metric=metric, **options)
            wide = {name: v.double() if name == "keys" else v for name, v in options.items()}
            expected = reference.similarity_graph(x.double(), k, metric=metric, **wide)
            assert torch.equal(found.indices, expected.indices), (k, list(options))
            torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-6, atol=1e-6)


@every_type
@every_metric
def test_equal_rows_have_equal_bits_whichever_tile_they_are_in(metric, dtype):
    """Products of every size that cuBLAS may choose another way to sum for."""
    for n, width in ((300, 40), (2049, 100), (9000, 512)):
        which = torch.randint(70, (n,), generator=torch.Generator().manual_seed(n)).cuda()
        values, indices = kdfast.similarity_graph(normal(70, width, dtype=dtype)[which], 100, metric=metric)
        tied = which[indices]
        same = tied[:, 1:] == tied[:, :-1]
        assert torch.equal(values[:, 1:][same], values[:, :-1][same])
        assert (indices.diff(dim=1)[same] > 0).all()


@every_type
def test_rows_of_nan_and_missing_negatives(dtype):
    x = normal(5000, 30, dtype=dtype)
    x[50, 3] = torch.nan
    labels = torch.zeros(5000, dtype=torch.int64, device="cuda")
    labels[[7, 4000]] = -3
    for metric in METRICS:
        values, indices = kdfast.similarity_graph(x, 9, metric=metric)
        assert values[50].isnan().all() and indices[50].tolist() == list(range(9))
        assert not values[torch.arange(5000) != 50].isnan().any()
        fast = kdfast.hardest_negatives(x, labels, 4, metric=metric)
        expected = reference.hardest_negatives(x.double(), labels, 4, metric=metric)
        found = torch.arange(5000) != 50
        assert torch.equal(fast.indices[found], expected.indices[found])


def test_distances_of_near_rows_far_from_the_origin_keep_their_order():
    crowds = 1000 * torch.randint(-3, 4, (4, 5), generator=torch.Generator().manual_seed(1))
    x = torch.randint(-30, 31, (4800, 5), generator=torch.Generator().manual_seed(0)) / 64
    x = (x + crowds.repeat_interleave(1200, 0)).cuda()
    found, expected = (module.similarity_graph(x, 20, metric="euclidean") for module in (kdfast, reference))
    assert torch.equal(found.indices, expected.indices)


@every_launcher
@every_metric
def test_two_runs_give_the_same_bits_and_nothing_waits(metric):
    arguments = arguments_of("similarity_graph", torch.bfloat16, leading=(9000,), width=128, metric=metric, k=20)
    run = step("similarity_graph", arguments)
    first = run()
    with waiting_is_an_error():
        second = run()
    assert_same_bits(first, second)


@every_launcher
def test_a_captured_graph_replays():
    run = step("similarity_graph", arguments_of("similarity_graph", torch.bfloat16, leading=(5000,), width=64, k=20))
    expected = run()
    graph, results = captured(run)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, expected)


@every_launcher
def test_the_matrix_is_never_stored():
    x = normal(30000, 32, dtype=torch.bfloat16)
    kdfast.similarity_graph(x[:5000], 20)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kdfast.similarity_graph(x, 20)
    assert torch.cuda.max_memory_allocated() - before < 4 * len(x) ** 2 / 20


@pytest.mark.parametrize("dtype", HALF, ids=str)
@every_metric
def test_a_pair_has_the_same_bits_for_both_of_its_rows(metric, dtype):
    """One half of the matrix is multiplied: tensor cores must treat both operands of a product alike."""
    with graphs_by("product"):
        for n, width in ((100, 40), (129, 512)):
            values, indices = kdfast.similarity_graph(normal(n, width, dtype=dtype), n - 1, metric=metric)
            matrix = torch.zeros(n, n, device="cuda").scatter(1, indices, values)
            assert torch.equal(matrix, matrix.T)
