"""The one parity harness: a public function against its reference in float64, value and gradient.

The rule, written once: the error against float64 is at most twice the error PyTorch itself makes (the reference in
the same dtype), plus a bound from the dtype and the length of the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import kdfast
from samples import SAMPLES

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def contiguous(x: Tensor) -> Tensor:
    return x.clone()


def classes_strided(x: Tensor) -> Tensor:
    """Every second element of a row twice as wide."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), math.nan)
    wide[..., ::2] = x
    return wide[..., ::2]


def shifted(x: Tensor) -> Tensor:
    """logits[:, :-1] of a longer sequence: rows adjacent in pairs of strides, memory between them is not ours."""
    if x.dim() < 2:
        return x.clone()
    longer = x.new_full((*x.shape[:-2], x.shape[-2] + 1, x.shape[-1]), math.nan)
    longer[..., :-1, :] = x
    return longer[..., :-1, :]


def transposed(x: Tensor) -> Tensor:
    """First dimension last in memory."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    layout.__name__: layout for layout in (contiguous, classes_strided, shifted, transposed)
}


def is_differentiable(name: str, value: object) -> bool:
    """Whether a gradient flows to the argument: the student's side, or features and what they are compared to."""
    sides = ("student", "features", "keys")
    return isinstance(value, Tensor) and value.is_floating_point() and name.split("_")[0] in sides


def cast(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    layout: Callable[[Tensor], Tensor] = contiguous,
    device: str = "cpu",
) -> dict[str, Any]:
    """Floating tensors to ``dtype`` in ``layout``, fresh leaves; everything else as it is; tensors to ``device``."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            value = value.to(device)
        if isinstance(value, Tensor) and value.is_floating_point() and name not in ("row_weight",):
            value = layout(value.to(dtype)).detach().requires_grad_(is_differentiable(name, value))
        result[name] = value
    return result


def first_output(result: Any) -> Tensor:
    """The loss, or the values of a graph."""
    return result if isinstance(result, Tensor) else result[0]


def run(
    function: Callable[..., Any], arguments: dict[str, Any], grad_output: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients for ``grad_output``; a second backward must repeat the first bit for bit."""
    leaves = {name: value for name, value in arguments.items() if is_differentiable(name, value)}
    value = first_output(function(**arguments))
    upstream = grad_output.to(value)
    first = torch.autograd.grad(value, list(leaves.values()), upstream, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(value, list(leaves.values()), upstream)
    for name, a, b, c in zip(leaves, first, second, kept, strict=True):
        torch.testing.assert_close(a, c, rtol=0, atol=0, equal_nan=True, msg=f"{name}: second backward wrote the first")
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=f"{name}: second backward differs")
    return value.detach(), dict(zip(leaves, kept, strict=True))


def assert_parity(
    name: str,
    inputs: dict[str, Tensor],
    options: dict[str, Any],
    dtype: torch.dtype,
    *,
    layout: str = "contiguous",
    function: Callable[..., Any] | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """``kdfast.<name>`` (or ``function``) keeps the rule for value and every gradient, and leaves its inputs alone.

    On ``device``, where the truth is computed too.
    """
    reference = getattr(kdfast.reference, name)
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    truth_arguments = cast({**rounded, **options}, torch.float64, device=device)
    shape = first_output(reference(**truth_arguments)).shape
    generator = torch.Generator().manual_seed(seed)
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64)
    if grad_output.numel() == 1:
        grad_output.copy_([torch.tensor(1.0), torch.tensor(-2.5)][seed % 2])  # 1 is a path of its own

    truth = run(reference, truth_arguments, grad_output)
    plain = run(reference, cast({**rounded, **options}, dtype, device=device), grad_output)
    arguments = cast({**rounded, **options}, dtype, LAYOUTS[layout], device)
    before = {k: (v.detach().clone(), v._version) for k, v in arguments.items() if isinstance(v, Tensor)}
    fast = run(function or getattr(kdfast, name), arguments, grad_output)

    for k, (values, version) in before.items():
        assert arguments[k]._version == version, f"{name} wrote its argument {k}"
        torch.testing.assert_close(arguments[k].detach(), values, rtol=0, atol=0, equal_nan=True)
    assert fast[0].dtype == (torch.float32 if dtype in HALF else dtype)
    length = max(v.numel() for v in inputs.values())
    floor = SAMPLES[name].value_terms(inputs, options)
    assert_within_rule(f"{name}: value", fast[0], plain[0], truth[0], dtype, length, floor)
    terms = gradient_terms(name, inputs, options) * float(grad_output.abs().max()) if grad_output.numel() else 0.0
    for k in truth[1]:
        assert fast[1][k].dtype == dtype, f"gradient of {k} has dtype {fast[1][k].dtype}"
        assert_within_rule(
            f"{name}: gradient of {k}", fast[1][k], plain[1][k], truth[1][k], dtype, length, terms, stored=dtype
        )


def gradient_terms(name: str, inputs: dict[str, Tensor], options: dict[str, Any]) -> float:
    """What the sample says of one row, over what the reduction divides by."""
    classes = inputs["student_logits"].shape[-1] if "student_logits" in inputs else 1
    rows = max(inputs["student_logits"].numel() // classes, 1) if "student_logits" in inputs else 1
    divisor = {"none": 1, "sum": 1, "mean": rows * classes}.get(options.get("reduction", "batchmean"), rows)
    return SAMPLES[name].gradient_terms(inputs, options) / divisor


def assert_within_rule(
    what: str,
    fast: Tensor,
    plain: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    length: int,
    floor: float = 0.0,
    stored: torch.dtype = torch.float32,
) -> None:
    """The rule. ``floor`` is the size of the summed terms where they may cancel, ``stored`` the dtype of the result."""
    assert fast.shape == truth.shape, f"{what}: shape {tuple(fast.shape)}, expected {tuple(truth.shape)}"
    fast, plain, truth = fast.double().cpu(), plain.double().cpu(), truth.double().cpu()
    exact = ~truth.isfinite()
    torch.testing.assert_close(fast[exact], truth[exact], equal_nan=True, msg=lambda m: f"{what}: {m}")
    keep = ~exact
    if not bool(keep.any()):
        return
    error = (fast - truth)[keep].abs()
    own = (plain - truth)[keep].abs().nan_to_num(nan=0.0, posinf=0.0).max()
    # Sums of n rounded terms drift like sqrt(n); a half-typed result is rounded twice, before and after grad_output.
    compute_eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = max(float(truth[keep].abs().max()), floor)
    # In float64 the reference is no better than the kernel, and its own error, which reads 0 here, counts too.
    bound = (64 if dtype == torch.float64 else 8) * math.sqrt(length) * compute_eps * size
    if stored in HALF:
        bound += torch.finfo(stored).eps * float(truth[keep].abs().max())
        bound += torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    worst = int(error.argmax())
    assert bool(error[worst] <= 2 * own + bound), (
        f"{what}: error {float(error[worst]):.3g} at element {worst} (got {float(fast[keep][worst]):.9g}, "
        f"float64 {float(truth[keep][worst]):.9g}); PyTorch's own is {float(own):.3g}, bound {bound:.3g}"
    )


def sample_inputs(
    name: str, seed: int, leading: tuple[int, ...], width: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inputs and options of ``name``, all from one seed."""
    generator = torch.Generator().manual_seed(seed)
    sample = SAMPLES[name]
    return sample.inputs(generator, leading, width), sample.draw(generator, leading, width)


def of_rows(name: str, seed: int, rows: int, width: int) -> dict[str, Any]:
    """A sample of six rows and its options, with rows left out or repeated: options do not depend on ``rows``."""
    inputs, options = sample_inputs(name, seed, (6,), width)
    chosen = torch.arange(rows) % 6
    both = {**inputs, **options}
    return {k: v[chosen] if isinstance(v, Tensor) and v.shape[:1] == (6,) else v for k, v in both.items()}
