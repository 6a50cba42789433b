"""Every way to call a logit loss wrongly: the error, and that its message names the argument and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kdfast import checks
from kdfast.functional.logits import (
    dist_loss,
    dkd_loss,
    js_divergence,
    kd_loss,
    kl_divergence,
    linear_kl_divergence,
    standardized_kl_divergence,
    topk_kl_divergence,
)

ROWS, V, K = 4, 5, 3
LABELS = torch.tensor([0, 4, 1, 2])

Case = tuple[Callable[..., Tensor], dict[str, Any], type[Exception], str]


def logits(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape or (ROWS, V), dtype=dtype, device=device)


def indices(*rows: list[int]) -> Tensor:
    return torch.tensor(rows or [[0, 1, 2]] * ROWS)


def valid(function: Callable[..., Tensor]) -> dict[str, Any]:
    """Arguments ``function`` accepts; a case changes some of them."""
    if function is topk_kl_divergence:
        return {"student_logits": logits(), "teacher_values": logits(ROWS, K), "teacher_indices": indices()}
    if function is linear_kl_divergence:
        return {
            "student_hidden": logits(ROWS, 2),
            "student_weight": logits(V, 2),
            "teacher_hidden": logits(ROWS, 3),
            "teacher_weight": logits(V, 3),
        }
    pair: dict[str, Any] = {"student_logits": logits(), "teacher_logits": logits()}
    return {**pair, "labels": LABELS} if function in (kd_loss, dkd_loss) else pair


FUNCTIONS = (
    kl_divergence,
    js_divergence,
    kd_loss,
    dkd_loss,
    dist_loss,
    standardized_kl_divergence,
    topk_kl_divergence,
    linear_kl_divergence,
)
DENSE = FUNCTIONS[:6]
WITH_ROWS = (kl_divergence, js_divergence, standardized_kl_divergence, linear_kl_divergence)

CASES: dict[str, Case] = {}


def add(
    functions: tuple[Callable[..., Tensor], ...], what: str, error: type[Exception], match: str, **change: Any
) -> None:
    for function in functions:
        CASES[f"{function.__name__}: {what}"] = (function, change, error, match)


# logits
add(DENSE, "not a tensor", TypeError, "student_logits must be a torch.Tensor, got list", student_logits=[[1.0]])
add(DENSE, "integers", TypeError, "student_logits must have dtype .*got torch.int64", student_logits=logits().long())
add(DENSE, "integer teacher", TypeError, "teacher_logits must have dtype", teacher_logits=logits().long())
add(DENSE, "two dtypes", TypeError, r"same dtype.*cast one", teacher_logits=logits(dtype=torch.float64))
add(DENSE, "two devices", ValueError, "teacher_logits is on meta", teacher_logits=logits(device="meta"))
add(DENSE, "two vocabularies", ValueError, "has 5 classes but .* has 6", teacher_logits=logits(ROWS, 6))
add(DENSE, "two leading shapes", ValueError, "same shape", teacher_logits=logits(3, V))
add(DENSE, "no dimension", ValueError, "shape", student_logits=torch.tensor(0.0), teacher_logits=torch.tensor(0.0))
add(DENSE, "no class", ValueError, "at least one class", student_logits=logits(ROWS, 0), teacher_logits=logits(ROWS, 0))
add(DENSE, "sparse", TypeError, "student_logits must be a dense.*sparse_coo", student_logits=logits().to_sparse())
NESTED = torch.nested.nested_tensor([logits(), logits()], layout=torch.jagged)
add(DENSE, "nested", TypeError, "teacher_logits must be a dense tensor, got a nested", teacher_logits=NESTED)
add((dkd_loss,), "one class", ValueError, "at least 2", student_logits=logits(4, 1), teacher_logits=logits(4, 1))

# temperature
for name, value, error, match in [
    ("zero", 0.0, ValueError, "temperature must be greater than 0, got 0"),
    ("negative", -1.0, ValueError, "temperature must be greater than 0"),
    ("nan", math.nan, ValueError, "temperature must be finite, got nan"),
    ("inf", math.inf, ValueError, "temperature must be finite, got inf"),
    ("beyond float", 10**400, ValueError, "temperature must be finite, got 10000"),
    ("square infinite", 1e155, ValueError, r"temperature must be between 1e-150 and 1e150, got 1e\+155"),
    ("square 0", 1e-170, ValueError, "temperature must be between 1e-150 and 1e150, got 1e-170"),
    ("tensor", torch.tensor(2.0), TypeError, "temperature must be a float, got Tensor"),
    ("string", "2", TypeError, "temperature must be a float, got str"),
]:
    add(FUNCTIONS, f"temperature {name}", error, match, temperature=value)

# weights of terms
for name in ("alpha", "label_smoothing"):
    for value in (-0.1, 1.1):
        match = rf"{name} must be between 0 and 1, got {value}"
        add((kd_loss, linear_kl_divergence), f"{name} {value}", ValueError, match, **{name: value}, labels=LABELS)
    add((kd_loss,), f"{name} none", TypeError, f"{name} must be a float", **{name: None})
for value in (-0.1, 1.1, math.nan):
    add((js_divergence, linear_kl_divergence), f"beta {value}", ValueError, "beta must be", beta=value)
for function, name in [(dkd_loss, "alpha"), (dkd_loss, "beta"), (dist_loss, "beta"), (dist_loss, "gamma")]:
    add((function,), f"{name} negative", ValueError, f"{name} must be at least 0, got -1", **{name: -1})
    add((function,), f"{name} inf", ValueError, f"{name} must be finite", **{name: math.inf})
add((linear_kl_divergence,), "alpha without labels", ValueError, "alpha must be 1 without labels, got 0.5", alpha=0.5)

# options
add((kl_divergence,), "direction", ValueError, "direction must be 'forward' or 'reverse', got 'back'", direction="back")
add((linear_kl_divergence,), "divergence", ValueError, "'forward', 'reverse' or 'js', got 'x'", divergence="x")
add((topk_kl_divergence,), "values", ValueError, "values must be 'logits' or 'logprobs', got 'p'", values="p")
add((topk_kl_divergence,), "tail", ValueError, "tail must be 'drop', 'bucket' or 'renormalize', got 't'", tail="t")
REDUCING = (*WITH_ROWS, kd_loss, topk_kl_divergence)
add(REDUCING, "reduction", ValueError, "reduction must be 'none', 'sum'.*got 'median'", reduction="median")
MIXED = (kd_loss, linear_kl_divergence)
add(MIXED, "mean", ValueError, "got 'mean': it would divide the divergence by the number of classes", reduction="mean")

# mask and row_weight
MASKED = (*WITH_ROWS, topk_kl_divergence)
add(MASKED, "float mask", TypeError, "mask must have dtype torch.bool", mask=torch.ones(ROWS))
add(MASKED, "int mask", TypeError, r"torch.int64: mask.bool\(\) counts what is not 0", mask=torch.ones(ROWS).long())
add(MASKED, "mask shape", ValueError, r"mask must have shape \(4,\), got \(4, 5\)", mask=torch.ones(ROWS, V) > 0)
add(MASKED, "mask device", ValueError, "mask is on meta", mask=torch.ones(ROWS, device="meta") > 0)
add(WITH_ROWS, "integer row_weight", TypeError, "row_weight must have dtype", row_weight=torch.ones(ROWS).long())
add(WITH_ROWS, "row_weight shape", ValueError, r"row_weight must have shape \(4,\)", row_weight=torch.ones(3))
add(WITH_ROWS, "row_weight device", ValueError, "row_weight is on meta", row_weight=torch.ones(ROWS, device="meta"))

# labels
LABELLED = (kd_loss, dkd_loss, linear_kl_divergence)
add(LABELLED, "float labels", TypeError, "labels must have dtype torch.int64, got torch.float32", labels=LABELS.float())
add(LABELLED, "label shape", ValueError, r"labels must have shape \(4,\), got \(4, 1\)", labels=LABELS[:, None])
add(LABELLED, "label device", ValueError, "labels is on meta", labels=LABELS.to("meta"))
add(LABELLED, "label too large", ValueError, r"labels must lie in \[0, 5\).*got 5", labels=LABELS + 1)
add(LABELLED, "negative label", ValueError, r"labels must lie in \[0, 5\).*got -1", labels=LABELS - 1)
add(
    (dkd_loss,),
    "ignored label",
    ValueError,
    r"labels must lie in \[0, 5\), got -100: this loss ignores no label",
    labels=LABELS * 0 - 100,
)
add((dkd_loss,), "no labels", TypeError, "labels must be a torch.Tensor, got NoneType", labels=None)
add(MIXED, "ignore_index None", TypeError, "ignore_index must be an int, got NoneType", ignore_index=None)
add(MIXED, "ignore_index float", TypeError, "ignore_index must be an int, got float", ignore_index=-100.0)
add(MIXED, "ignore_index beyond int64", ValueError, "ignore_index must be an int of 64 bits", ignore_index=2**70)
add(MIXED, "another ignore_index", ValueError, "ignore_index=-1, got -100", labels=LABELS * 0 - 100, ignore_index=-1)

# a stored teacher
for what, error, match, change in [
    ("student not a tensor", TypeError, "student_logits must be a torch.Tensor", {"student_logits": [1.0]}),
    ("student of no dimension", ValueError, "student_logits must have shape", {"student_logits": torch.tensor(0.0)}),
    ("student of no class", ValueError, "at least one class", {"student_logits": logits(ROWS, 0)}),
    ("integer values", TypeError, "teacher_values must have dtype", {"teacher_values": logits(ROWS, K).long()}),
    ("float indices", TypeError, "torch.int32 or torch.int64", {"teacher_indices": indices().float()}),
    ("other rows", ValueError, r"leading shape \(4,\) of student_logits", {"teacher_values": logits(3, K)}),
    ("values of no dimension", ValueError, "teacher_values must have shape", {"teacher_values": torch.tensor(0.0)}),
    ("other k", ValueError, r"teacher_indices must have shape \(4, 3\)", {"teacher_indices": indices()[:, :2]}),
    (
        "k of 0",
        ValueError,
        "k must be between 1 and V = 5, got 0",
        {"teacher_values": logits(ROWS, 0), "teacher_indices": indices()[:, :0]},
    ),
    (
        "k above V",
        ValueError,
        "k must be between 1 and V = 5, got 6",
        {"teacher_values": logits(ROWS, 6), "teacher_indices": indices().repeat(1, 2)},
    ),
    ("values elsewhere", ValueError, "teacher_values is on meta", {"teacher_values": logits(ROWS, K, device="meta")}),
    ("indices elsewhere", ValueError, "teacher_indices is on meta", {"teacher_indices": indices().to("meta")}),
    ("index too large", ValueError, r"must lie in \[0, 5\).*got 5", {"teacher_indices": indices() + 3}),
    ("negative index", ValueError, r"or be -100 \(padding\), got -1", {"teacher_indices": indices() - 1}),
    ("class twice", ValueError, "a class twice in a row, got 2", {"teacher_indices": indices(*[[2, 0, 2]] * ROWS)}),
    (
        "logits for logprobs",
        ValueError,
        "must be log-probabilities, at most 0, for values='logprobs', got 1.0",
        {"teacher_values": logits(ROWS, K) + 1, "values": "logprobs"},
    ),
    ("bucket of logits", ValueError, "tail='bucket' needs values='logprobs'", {"tail": "bucket"}),
    (
        "temperature of logprobs",
        ValueError,
        "temperature must be 1 for values='logprobs' with tail='drop', got 2",
        {"values": "logprobs", "temperature": 2},
    ),
]:
    add((topk_kl_divergence,), what, error, match, **change)

# projections
for side, width in (("student", 2), ("teacher", 3)):
    for what, error, match, change in [
        ("hidden not a tensor", TypeError, "must be a torch.Tensor, got list", {"hidden": [1.0]}),
        ("hidden of no dimension", ValueError, "hidden must have shape", {"hidden": torch.tensor(0.0)}),
        ("integer weight", TypeError, "weight must have dtype", {"weight": logits(V, width).long()}),
        ("weight of one dimension", ValueError, r"weight must have shape \(V, H\)", {"weight": logits(V)}),
        ("no class", ValueError, "at least one class", {"weight": logits(0, width)}),
        ("another width", ValueError, f"the H = {width} of {side}_hidden", {"weight": logits(V, 9)}),
        ("weight of another dtype", TypeError, "must have the same dtype", {"weight": logits(V, width).double()}),
        ("weight elsewhere", ValueError, "weight is on meta", {"weight": logits(V, width, device="meta")}),
        ("bias shape", ValueError, rf"{side}_bias must have shape \(5,\), got \(1,\)", {"bias": logits(1)}),
        ("bias of another dtype", TypeError, f"{side}_bias and {side}_hidden must have", {"bias": logits(V).double()}),
        ("bias elsewhere", ValueError, f"{side}_bias is on meta", {"bias": logits(V, device="meta")}),
    ]:
        named = {f"{side}_{name}": value for name, value in change.items()}
        add((linear_kl_divergence,), f"{side} {what}", error, match, **named)
add((linear_kl_divergence,), "two vocabularies", ValueError, "has 5 classes but .* has 6", teacher_weight=logits(6, 3))
add((linear_kl_divergence,), "two leading shapes", ValueError, "same leading shape", teacher_hidden=logits(3, 3))
add(
    (linear_kl_divergence,),
    "sides of two dtypes",
    TypeError,
    "student_hidden and teacher_hidden must have the same dtype",
    teacher_hidden=logits(ROWS, 3).double(),
    teacher_weight=logits(V, 3).double(),
)


@pytest.mark.parametrize("case", CASES)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    function, change, error, match = CASES[case]
    with pytest.raises(error, match=match):
        function(**{**valid(function), **change})


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_table_starts_from_arguments_that_are_accepted(function: Callable[..., Tensor]) -> None:
    assert function(**valid(function)).isfinite()


@pytest.mark.parametrize("kind", ["logits", "logprobs"])
def test_topk_padding_and_masked_rows_may_hold_anything(kind: str) -> None:
    values, classes = logits(ROWS, K), indices([0, -100, -100], [1, 1, 0], [9, 9, -7], [0, 1, 2])
    values[0, 1:], values[1, 0], values[2] = 7, -math.inf, 7
    topk_kl_divergence(logits(), values, classes, values=kind, mask=torch.tensor([True, True, False, True]))


def first_repeated(indices: Tensor, listed: Tensor) -> int | None:
    """The first class that stands in its row before, by a loop."""
    for row, counts in zip(indices.tolist(), listed.tolist(), strict=True):
        seen: set[int] = set()
        for index, counted in zip(row, counts, strict=True):
            if counted and index in seen:
                return index
            seen |= {index} if counted else set()
    return None


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("classes", [1, 64, 65, 300])
def test_a_class_listed_twice_is_found(monkeypatch: pytest.MonkeyPatch, classes: int, dtype: torch.dtype) -> None:
    cases = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        k = int(torch.randint(1, min(classes, 9) + 1, (), generator=generator))
        distinct = torch.rand(6, classes, generator=generator).argsort(dim=-1)[:, :k]
        indices = torch.where(torch.rand(6, 1, generator=generator) < 0.2, distinct[:, :1], distinct).to(dtype)
        listed = torch.rand(6, k, generator=generator) < 0.7
        cases += [(x, listed, first_repeated(x, listed)) for x in (indices, indices.T.contiguous().T)]
    outcomes = [expected is None for *_, expected in cases]
    assert any(outcomes) and (classes == 1 or not all(outcomes))
    for indices, listed, expected in cases:
        assert checks._repeated_class(indices, listed, classes) == expected
    monkeypatch.setattr(torch.ops, "kdfast", object())  # without the extension: any of them
    for indices, listed, expected in cases:
        assert (checks._repeated_class(indices, listed, classes) is None) == (expected is None)


def test_log_probabilities_may_be_above_0_by_rounding() -> None:
    topk_kl_divergence(logits(), logits(ROWS, K) + 0.25, indices(), values="logprobs")


def test_two_dtypes_on_a_device_without_autocast_are_an_error_like_elsewhere() -> None:
    arguments = {name: value.to("meta") for name, value in valid(linear_kl_divergence).items()}
    arguments["teacher_hidden"] = arguments["teacher_hidden"].bfloat16()
    with pytest.raises(TypeError, match="must have the same dtype"):
        linear_kl_divergence(**arguments)


@pytest.mark.parametrize("halves", [("student_hidden", "teacher_hidden"), ("student_hidden",)])
def test_under_autocast_projections_may_have_two_dtypes(halves: tuple[str, ...]) -> None:
    arguments = valid(linear_kl_divergence)
    for name in halves:
        arguments[name] = arguments[name].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_kl_divergence(**arguments).dtype == torch.float32
