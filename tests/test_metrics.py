"""Metrics against formulas written in another way, and against the properties they are chosen for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from kdfast import metrics
from kdfast.reference.features import kernel_alignment_loss


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def cka_from_hsic(x: Tensor, y: Tensor) -> float:
    """Hilbert-Schmidt independence criteria with explicit centring matrices."""
    n = len(x)
    H = np.eye(n) - np.ones((n, n)) / n
    K, L = x.numpy() @ x.numpy().T, y.numpy() @ y.numpy().T

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return np.trace(a @ H @ b @ H) / (n - 1) ** 2

    return hsic(K, L) / np.sqrt(hsic(K, K) * hsic(L, L))


@pytest.mark.parametrize(
    ("n", "d", "e"),
    [
        pytest.param(40, 5, 3, id="more rows than features: product of features"),
        pytest.param(6, 30, 20, id="fewer rows than features: Gram matrices"),
        pytest.param(10, 50, 1, id="one side wide, one narrow"),
    ],
)
def test_cka_agrees_with_hsic(n: int, d: int, e: int) -> None:
    x = features(n, d, seed=1) + 3.0
    y = features(n, e, seed=2) + x[:, :1]
    torch.testing.assert_close(metrics.cka(x, y).item(), cka_from_hsic(x, y), rtol=1e-10, atol=0)


def test_cka_is_one_minus_the_centred_alignment_loss() -> None:
    x, y = features(20, 4, 3, seed=3), features(20, 7, seed=4)
    torch.testing.assert_close(metrics.cka(x, y), 1 - kernel_alignment_loss(x, y, centered=True))


def test_cka_of_meta_tensors_is_a_scalar_there() -> None:
    x = features(20, 4, dtype=torch.bfloat16).to("meta")
    for y in (x, features(20, 70, dtype=torch.bfloat16).to("meta")):
        value = metrics.cka(x, y)
        assert value.device.type == "meta" and value.shape == () and value.dtype == torch.float32


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(features(d, d, seed=9)).Q


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x, id="nothing"),
        pytest.param(lambda x: x @ rotation(x.shape[1]), id="rotation"),
        pytest.param(lambda x: -1e-3 * x, id="scale"),
        pytest.param(lambda x: x + features(1, x.shape[1], seed=8), id="shift"),
        pytest.param(lambda x: torch.cat([x, torch.zeros_like(x)], dim=1), id="empty features"),
    ],
)
def test_cka_does_not_change_under(change: Callable[[Tensor], Tensor]) -> None:
    x, y = features(30, 5, seed=5), features(30, 8, seed=6)
    torch.testing.assert_close(metrics.cka(change(x), y), metrics.cka(x, y))
    torch.testing.assert_close(metrics.cka(y, change(x)), metrics.cka(x, y))
    torch.testing.assert_close(metrics.cka(change(x), x).item(), 1.0)


def test_cka_does_change_under_a_general_linear_map() -> None:
    x = features(30, 5, seed=5)
    assert metrics.cka(x * torch.tensor([100.0, 1, 1, 1, 1]), x) < 0.9


def test_cka_of_unrelated_features_is_small() -> None:
    assert metrics.cka(features(2000, 4, seed=1), features(2000, 4, seed=2)) < 0.01


@pytest.mark.parametrize("magnitude", [1e-20, 1e4, 1e20])
def test_cka_holds_at_any_magnitude(magnitude: float) -> None:
    x, y = features(12, 5, seed=1, dtype=torch.float32), features(12, 6, seed=2, dtype=torch.float32)
    torch.testing.assert_close(metrics.cka(magnitude * x, y), metrics.cka(x, y), rtol=1e-4, atol=0)


def test_cka_is_at_most_one_in_float32() -> None:
    for seed in range(20):
        x = features(50, 16, seed=seed, dtype=torch.float32)
        assert 0.99999 < metrics.cka(x, 3 * x) <= 1


@pytest.mark.parametrize(("n", "d"), [(2**20, 2), (4, 2**20)], ids=["tall", "wide"])
def test_cka_forms_only_the_smaller_of_the_two_products(n: int, d: int) -> None:
    # The other one would take four terabytes.
    x = features(n, d, dtype=torch.float32)
    torch.testing.assert_close(metrics.cka(x, 2 * x).item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_cka_with_a_side_of_equal_rows_is_zero(value: float) -> None:
    assert metrics.cka(torch.full((7, 3), value), features(7, 3, dtype=torch.float32)) == 0


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_cka_returns_a_scalar_without_gradient(given: torch.dtype, returned: torch.dtype) -> None:
    x = features(6, 3).to(given).requires_grad_()
    value = metrics.cka(x, x)
    assert value.dtype == returned and value.shape == () and not value.requires_grad


@pytest.mark.parametrize(
    ("student", "baseline", "teacher", "ratio"),
    [
        pytest.param(92.0, 90.0, 94.0, 0.5, id="half the gap"),
        pytest.param(90.0, 90.0, 94.0, 0.0, id="no gain"),
        pytest.param(95.0, 90.0, 94.0, 1.25, id="better than the teacher"),
        pytest.param(89.0, 90.0, 94.0, -0.25, id="worse than the baseline"),
        pytest.param(2.5, 3.0, 2.0, 0.5, id="a metric that falls"),
        pytest.param(1, 0, 2, 0.5, id="integers"),
    ],
)
def test_accuracy_transfer_ratio(student: float, baseline: float, teacher: float, ratio: float) -> None:
    assert metrics.accuracy_transfer_ratio(student, baseline, teacher) == ratio


def test_latency_reports_percentiles_of_the_calls_after_the_warmup(monkeypatch: pytest.MonkeyPatch) -> None:
    # The warm-up calls take 100 s each, the eleven timed ones 0, 1, ..., 10 s.
    durations = iter([100.0, 100.0, *(float(i) for i in range(11))])
    now = [0.0]

    def call() -> None:
        now[0] += next(durations)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    result = metrics.latency(call, warmup=2, repeats=11)
    assert (result.p20, result.p50, result.p80) == pytest.approx((2.0, 5.0, 8.0))
    assert next(durations, None) is None


def test_latency_waits_for_the_device_before_and_after_each_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: events.append("wait"))
    metrics.latency(lambda: events.append("call"), warmup=1, repeats=2)
    assert events == ["call", "wait", "call", "wait", "wait", "call", "wait"]


x = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "exception", "match"),
    [
        pytest.param(lambda: metrics.cka([1.0], x), TypeError, "x must be a torch.Tensor, got list", id="not a tensor"),
        pytest.param(lambda: metrics.cka(x, x.long()), TypeError, "y must have dtype .*got torch.int64", id="integers"),
        pytest.param(
            lambda: metrics.cka(x, x.double()), TypeError, "x and y must have the same dtype", id="two dtypes"
        ),
        pytest.param(lambda: metrics.cka(x, x[:3]), ValueError, "same number of rows, got 4 and 3", id="rows"),
        pytest.param(lambda: metrics.cka(x, x[:, 0]), ValueError, r"y must have shape \(N, ...\)", id="1-D"),
        pytest.param(lambda: metrics.cka(x, x.to("meta")), ValueError, "y is on meta but x is on cpu", id="devices"),
        pytest.param(
            lambda: metrics.accuracy_transfer_ratio(0.9, 0.8, 0.8),
            ValueError,
            "teacher must differ from baseline",
            id="no gap",
        ),
        pytest.param(
            lambda: metrics.accuracy_transfer_ratio(float("nan"), 0.8, 0.9),
            ValueError,
            "student must be finite",
            id="NaN",
        ),
        pytest.param(
            lambda: metrics.accuracy_transfer_ratio(0.9, torch.tensor(0.8), 0.9),
            TypeError,
            "baseline must be a float, got Tensor",
            id="tensor",
        ),
        pytest.param(lambda: metrics.latency(3), TypeError, "fn must be callable, got int", id="not callable"),
        pytest.param(
            lambda: metrics.latency(len, warmup=-1), ValueError, "warmup must be at least 0, got -1", id="warmup"
        ),
        pytest.param(
            lambda: metrics.latency(len, repeats=0), ValueError, "repeats must be at least 1, got 0", id="repeats"
        ),
        pytest.param(
            lambda: metrics.latency(len, repeats=2.0), TypeError, "repeats must be an int, got float", id="float"
        ),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], exception: type[Exception], match: str) -> None:
    with pytest.raises(exception, match=match):
        call()
