"""The launcher of our own product on the CPU: its kernels emulated, Triton's interpreted.

Run by test_graph_product.py with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import product_emulation
import pytest
import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops.graph import METRICS, product, triton_kernels
from kdfast.ops.graph.product import Selection

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

WIDTH = 21  # no multiple of 8


class Path(NamedTuple):
    rows: int
    room: int  # of a row's buffer
    dtype: torch.dtype


PATHS = {"two tiles either way": Path(130, 32, torch.bfloat16), "buffers overflow": Path(18, 8, torch.float16)}

every_metric = pytest.mark.parametrize("metric", METRICS)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch) -> Path:
    chosen = PATHS[request.param]
    monkeypatch.setattr(product, "SELECTIONS", tuple(Selection(k, 2, 32, chosen.room) for k in (8, 16)))
    return chosen


@pytest.fixture(autouse=True)
def uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def emulated():
    library = product_emulation.registered()
    yield
    library._destroy()


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def launch(x: Tensor, k: int, metric: str, *, keys=None, labels=None, include_self=False) -> tuple[Tensor, Tensor]:
    with np.errstate(all="ignore"):
        return product.graph(x, keys, labels, k, METRICS[metric], include_self, True)


def assert_reference(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(got[1], expected[1])
    torch.testing.assert_close(got[0].double(), expected[0].double(), rtol=1e-5, atol=1e-5, equal_nan=True)


@every_metric
def test_neighbours_are_the_reference_s(path, metric):
    x = normal(path.rows, WIDTH, dtype=path.dtype)
    assert_reference(launch(x, 7, metric), reference.similarity_graph(x.double(), 7, metric=metric))
    x, itself = x[:18], {"include_self": True}
    assert_reference(launch(x, 7, metric, **itself), reference.similarity_graph(x.double(), 7, metric=metric, **itself))


@every_metric
def test_neighbours_among_other_keys(path, metric):
    x, keys = normal(10, WIDTH, dtype=path.dtype), normal(300, WIDTH, dtype=path.dtype, seed=1)
    expected = reference.similarity_graph(x.double(), 7, metric=metric, keys=keys.double())
    assert_reference(launch(x, 7, metric, keys=keys), expected)


@pytest.mark.parametrize("metric", ["dot", "euclidean"])
def test_ties_break_to_the_smaller_index(path, metric):
    x, labels = integers(path.rows, 8, dtype=path.dtype), torch.arange(path.rows) % 3
    assert_reference(launch(x, 6, metric), reference.similarity_graph(x.double(), 6, metric=metric))
    expected = reference.hardest_negatives(x.double(), labels, 6, metric=metric)
    assert_reference(launch(x, 6, metric, labels=labels), expected)


@every_metric
def test_equal_rows_have_equal_bits(path, metric):
    which = torch.arange(path.rows) * 5 % 9
    values, indices = launch(normal(9, WIDTH, dtype=path.dtype)[which], 7, metric)
    tied = which[indices]
    same = tied[:, 1:] == tied[:, :-1]
    assert same.any() and torch.equal(values[:, 1:][same], values[:, :-1][same])
    assert (indices.diff(dim=1)[same] > 0).all()


def test_zero_rows_and_nan(path):
    x, last = normal(path.rows, WIDTH, dtype=path.dtype), path.rows - 1
    x[5] = 0
    x[last, 2] = math.nan
    values, indices = launch(x, 5, "cosine")
    assert values[last].isnan().all() and indices[last].tolist() == [0, 1, 2, 3, 4]
    assert (values[5] == 0).all() and indices[5].tolist() == [0, 1, 2, 3, 4]
    clean = reference.similarity_graph(x[:last].double(), 5, metric="cosine")
    assert_reference((values[:last], indices[:last]), (clean.values, clean.indices))


def test_missing_neighbours(path):
    x, labels = normal(18, WIDTH, dtype=path.dtype), torch.zeros(18, dtype=torch.int64)
    labels[3] = 9
    got = launch(x, 4, "dot", labels=labels)
    assert_reference(got, reference.hardest_negatives(x.double(), labels, 4, metric="dot"))


def test_near_rows_far_from_the_origin_keep_their_order(path):
    x = integers(18, 5, dtype=path.dtype) / 8 + 8
    assert_reference(launch(x, 6, "euclidean"), reference.similarity_graph(x.double(), 6, metric="euclidean"))


def test_any_layout_and_no_rows():
    x = normal(6, 24, dtype=torch.bfloat16)
    expected = reference.similarity_graph(x.double(), 3, metric="dot")
    off = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(6, 24)
    assert off.data_ptr() % 16
    for same in (x.T.contiguous().T, off, torch.cat([x, x], 1)[:, :24]):
        assert_reference(launch(same, 3, "dot"), expected)
        assert product.aligned(same).data_ptr() % 16 == 0
    assert product.aligned(x) is x
    values, indices = launch(x[:0], 3, "dot", keys=x)
    assert values.shape == indices.shape == (0, 3)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match=r"float16 or bfloat16, got torch\.float32"):
        launch(torch.ones(4, 8), 1, "dot")


def test_the_benchmark_of_the_steps_runs_each_of_them(monkeypatch):
    import graph_kernels

    assert graph_kernels.agreement(normal(20, 24, dtype=torch.bfloat16), 4) == 1
    ran = []
    monkeypatch.setattr(graph_kernels, "milliseconds", lambda run: ran.append(run()) or 1.0)
    with np.errstate(all="ignore"):
        found = graph_kernels.record(normal(20, 24, dtype=torch.bfloat16), 256, Selection(4, 1, 32, 16))
    assert list(found["steps"]) == ["coefficients", "bounds", "limit", "zeros and hits", "finish"]
    assert len(ran) == 6 and 4 <= found["hits of a row"] <= 19 and 0 <= found["rows without room"] < 20
