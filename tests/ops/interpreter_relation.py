"""The Triton kernels of relation on the CPU, interpreted. Run by test_relation_triton.py with TRITON_INTERPRET=1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdfast.ops import relation
from kdfast.ops.relation import products, rows, tiles, triton_kernels
from samples import SAMPLES
from support import assert_parity

assert triton_kernels.triton.knobs.runtime.interpret, "TRITON_INTERPRET=1 must be set before triton is imported"

FUNCTIONS = {"crd_loss": relation.crd, "pkt_loss": relation.pkt}


@pytest.fixture(autouse=True)
def triton_panels(monkeypatch) -> None:
    """The drivers on CPU tensors, with Triton's panels of 16 rows in tiles of (4, 8)."""
    for name in ("crd_panel", "pkt_panel"):
        monkeypatch.setattr(torch.ops.kdfast, name, getattr(triton_kernels, name))
    monkeypatch.setitem(tiles.MOST, "cpu", 16)
    monkeypatch.setitem(tiles.ALIGNED, "cpu", tiles.ALIGNED["cuda"])
    monkeypatch.setattr(triton_kernels, "ROWS", 4)
    monkeypatch.setattr(triton_kernels, "COLUMNS", 8)


@pytest.fixture(autouse=True)
def no_warnings():
    with np.errstate(all="ignore"):  # what lies beyond the end is masked afterwards
        yield


def call(name: str, **arguments) -> torch.Tensor:
    if name == "pkt_loss":
        return relation.pkt(arguments["student"], arguments["teacher"], arguments.get("eps", 1e-7))
    options = {"temperature": 0.1, "alignment_weight": 1.0, "normalize": False, **arguments}
    return relation.crd(**options)


def inputs(name: str, n: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = SAMPLES[name].inputs(generator, (n,), 6)
    return made


@pytest.mark.parametrize("cost", [0.0, math.inf], ids=["features", "rows"])
@pytest.mark.parametrize("n", [1, 3, 4, 16, 17, 33, 40])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_value_and_gradient_keep_the_rule(monkeypatch, name, n, cost):
    monkeypatch.setattr(products, "double_cost", lambda device: cost)
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        options = {"normalize": seed % 2 == 0, "temperature": 0.5} if name == "crd_loss" else {}
        assert_parity(name, inputs(name, n, seed), options, dtype, function=lambda **kw: call(name, **kw), seed=seed)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_factors_beside_raw_rows(monkeypatch, name):
    monkeypatch.setattr(rows, "STORED_BYTES", 0)
    options = {"normalize": True} if name == "crd_loss" else {}
    assert_parity(name, inputs(name, 33, 1), options, torch.float32, function=lambda **kw: call(name, **kw))


def test_softplus_keeps_its_digits_far_from_zero():
    student = torch.full((20, 1), math.sqrt(1.7))
    labels = torch.zeros(20, dtype=torch.int64)
    loss = relation.crd(student, student, labels, 0.05, 0.0, False)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-34)), rel=1e-4, abs=0)
    loss = relation.crd(1e3 * student, student, labels.index_fill(0, torch.tensor([3]), 1), 0.05, 0.0, False)
    assert loss.item() == pytest.approx(34e6 * 38 / 400, rel=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_nan_is_not_hidden(name):
    for side in ("student", "teacher"):
        made = {k: v.float() if v.is_floating_point() else v for k, v in inputs(name, 20, 0).items()}
        made[side][7, 2] = math.nan
        assert call(name, **made).isnan(), side
