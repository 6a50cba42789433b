"""Autograd nodes in C++ and in Python: the same bits, the same rules of PyTorch, whichever of them a loss gets."""

from __future__ import annotations

import itertools
import runpy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import backends
from kdfast.ops import nodes
from samples import SAMPLES
from support import DTYPES, cast, is_differentiable, run, sample_inputs

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

ROOT = Path(__file__).resolve().parents[2]
OF_KEPT_NEIGHBOURS = ("similarity_graph", "hardest_negatives")  # not losses: their backward has a kernel of its own
OF_ROWS = (*backends.FUNCTIONS["kl"], *backends.FUNCTIONS["topk_kl"], "graph_distillation_loss")
LOSSES = [name for names in backends.FUNCTIONS.values() for name in names if name not in OF_KEPT_NEIGHBOURS]

OF_ONE_STUDENT = [name for name in LOSSES if name != "linear_kl_divergence"]  # which has hidden states and a weight


@pytest.fixture(params=["C++", "Python"])
def written_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The language of the nodes of the losses that a test makes."""
    if request.param == "Python":
        monkeypatch.setattr(nodes, "_missing", "left out")
    return request.param


def language(loss: Tensor) -> str:
    """In which the node behind ``loss`` is written."""
    return "C++" if type(loss.grad_fn).__name__ == "CppFunction" else "Python"


def logits(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 10, generator=generator).mul_(3).to(dtype)
    return student.clone().requires_grad_(), teacher.clone()


def test_the_binary_was_built_with_this_torch():
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    assert setup["autograd_module"]() == nodes.MODULE
    assert nodes.problem() is None


def test_a_loss_gets_the_node_that_a_test_asks_for(written_in):
    assert language(kdfast.kl_divergence(*logits())) == written_in


def arguments_of(name: str, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
    """A sample of ``name`` whose loss is one number."""
    inputs, options = sample_inputs(name, seed, SAMPLES[name].leading[0], max(SAMPLES[name].widths))
    if options.get("reduction") == "none":
        options["reduction"] = "sum"
    return cast({**inputs, **options}, dtype)


def value_and_gradients(name: str, dtype: torch.dtype, seed: int, factor: float, expected: str) -> list[Tensor]:
    """For grad_output ``factor``, of a graph kept and freed, by a node in the ``expected`` language."""

    def loss(**arguments: Any) -> Tensor:
        value = getattr(kdfast, name)(**arguments)
        assert language(value) == expected
        return value

    value, gradients = run(loss, arguments_of(name, dtype, seed), torch.tensor(factor))
    return [value, *gradients.values()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_bits_do_not_depend_on_the_language(monkeypatch, name, dtype):
    cases = list(itertools.product(range(6), (1.0, -2.5, 0.0)))
    # Rows of float16 need their kernel again in backward, and those nodes are in Python alone.
    expected = "Python" if dtype == torch.float16 and name in OF_ROWS else "C++"
    in_cpp = [value_and_gradients(name, dtype, *case, expected) for case in cases]
    monkeypatch.setattr(nodes, "_missing", "left out")
    for found, case in zip(in_cpp, cases, strict=True):
        for one, other in zip(found, value_and_gradients(name, dtype, *case, "Python"), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_one_value_a_row_has_its_node_in_python():
    assert language(kdfast.kl_divergence(*logits(), reduction="none")) == "Python"


def test_the_graph_is_freed_by_a_backward_and_kept_where_asked(written_in):
    student, teacher = logits()
    loss = kdfast.kl_divergence(student, teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    first.fill_(7)  # is the caller's
    (second,) = torch.autograd.grad(loss, student)
    assert not torch.equal(first, second)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


class Results(TorchDispatchMode):
    """Notes where kdfast's ops have left what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        results = function(*arguments, **(named or {}))
        if function.namespace == "kdfast" and isinstance(results, tuple):
            self.addresses += [result.data_ptr() for result in results]
        return results


@pytest.mark.parametrize("name", OF_ONE_STUDENT)
def test_the_gradient_alone_is_kept_and_handed_over(written_in, name):
    arguments = arguments_of(name, torch.float32)
    (student,) = (value for key, value in arguments.items() if is_differentiable(key, value))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        getattr(kdfast, name)(**arguments)
    (gradient,) = (x for x in kept if x.numel() > 0)
    assert gradient.data_ptr() != student.data_ptr() and gradient.grad_fn is None

    with Results() as results:
        loss = getattr(kdfast, name)(**arguments)
    (grad,) = torch.autograd.grad(loss, student, torch.tensor(2.0))
    assert language(loss) == written_in
    assert grad.data_ptr() in results.addresses


def test_what_a_hook_unpacks_is_not_written(written_in):
    student, teacher = logits()
    (expected,) = torch.autograd.grad(kdfast.kl_divergence(student, teacher), student)
    store = expected.clone()
    for loss_of in (kdfast.kl_divergence, partial(kdfast.kl_divergence, inplace_backward=True)):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: store if x.numel() > 0 else x):
            one, other = loss_of(student * 1.0, teacher), loss_of(student * 1.0, teacher)
            (grad,) = torch.autograd.grad(0.5 * one + 0.25 * other, student)
        assert torch.equal(store, expected)
        torch.testing.assert_close(grad, 0.75 * expected)


def neighbours(features: Tensor, **options: Any) -> Tensor:
    return kdfast.similarity_graph(features, k=2, **options).values


DIFFERENTIABLE_ONCE = {
    **{name: lambda name=name, **arguments: getattr(kdfast, name)(**arguments) for name in OF_ONE_STUDENT},
    "one value a row": lambda **arguments: kdfast.kl_divergence(**{**arguments, "reduction": "none"}),
    "in place": lambda **arguments: kdfast.kl_divergence(**arguments, inplace_backward=True),
    "similarity_graph": lambda student, teacher: neighbours(student),
    "similarity_graph of keys": lambda student, teacher: neighbours(student, keys=student.detach() + 1),
    "similarity_graph by keys": lambda student, teacher: neighbours(student.detach() + 1, keys=student),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE_ONCE)
def test_a_second_derivative_is_refused(written_in, name):
    sample = name if name in OF_ONE_STUDENT else "similarity_preserving_loss" if "graph" in name else "kl_divergence"
    arguments = arguments_of(sample, torch.float64)
    ((key, base),) = ((key, value) for key, value in arguments.items() if is_differentiable(key, value))
    factor = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    arguments[key] = base * factor
    values = DIFFERENTIABLE_ONCE[name](**arguments)
    grad_output = torch.ones_like(values, requires_grad=True)
    (grad,) = torch.autograd.grad(values, base, grad_output, create_graph=True)
    grad.mul_(2)  # is the caller's, and may be written
    for behind in (factor, base, grad_output):
        with pytest.raises(RuntimeError, match="differentiated once"):
            torch.autograd.grad(grad.sum(), behind, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        (grad.sum() + values.sum()).backward()


def test_functions_of_second_derivatives_do_not_take_0_for_one(written_in):
    student, teacher = logits(torch.float64)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.functional.hessian(lambda x: kdfast.kl_divergence(x, teacher), student)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.functional.jvp(lambda x: kdfast.kl_divergence(x, teacher), student, teacher)


class Swallow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> None:
        return None


@pytest.mark.parametrize(
    "loss_of", [kdfast.kl_divergence, kdfast.pkt_loss, partial(kdfast.kl_divergence, reduction="none")]
)
def test_a_gradient_that_does_not_come_is_0(written_in, loss_of):
    student, teacher = logits()
    Swallow.apply(loss_of(student, teacher)).sum().backward()
    assert student.grad is None or (student.grad == 0).all()


def test_nothing_is_recorded_where_nobody_asks(written_in):
    student, teacher = logits()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert not kdfast.kl_divergence(student, teacher).requires_grad
    assert not kdfast.kl_divergence(student.detach(), teacher).requires_grad
    assert not kdfast.kl_divergence(student.detach(), teacher.requires_grad_()).requires_grad


def test_a_teacher_of_inference_mode_is_taken(written_in):
    student, teacher = logits()
    with torch.inference_mode():
        made = teacher.clone()
    expected, loss = kdfast.kl_divergence(student, teacher), kdfast.kl_divergence(student, made)
    assert language(loss) == written_in
    for one, other in zip(*(torch.autograd.grad(x, student) for x in (loss, expected)), strict=True):
        assert torch.equal(one, other)


def test_checkpoints_make_the_loss_again(written_in):
    student, teacher = logits()

    def loss(x: Tensor) -> Tensor:
        return kdfast.kl_divergence(2 * x, teacher)

    again = torch.utils.checkpoint.checkpoint(loss, student, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(value, student)[0] for value in (again, loss(student))))


def test_fake_tensors_have_gradients_without_values(written_in):
    with FakeTensorMode() as mode:
        student, teacher = (mode.from_tensor(x) for x in logits(torch.bfloat16))
        loss = kdfast.kl_divergence(student, teacher)
        (grad,) = torch.autograd.grad(loss, student)
    assert (grad.shape, grad.dtype) == (student.shape, torch.bfloat16)


def test_a_compiler_traces_backward(written_in):
    student, teacher = logits()
    (expected,) = torch.autograd.grad(kdfast.kl_divergence(student, teacher), student)

    def compiler(module: Callable) -> Callable:
        return torch.compile(module, backend="aot_eager", fullgraph=True)

    torch._dynamo.reset()
    with compiled_autograd._enable(compiler):
        loss = kdfast.kl_divergence(student, teacher)
        (-2 * loss).backward()
    assert language(loss) == written_in
    torch.testing.assert_close(student.grad, -2 * expected)


def test_transforms_and_forward_mode_are_refused(written_in):
    student, teacher = logits()
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: kdfast.kl_divergence(x, teacher))(student)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp"):
            kdfast.kl_divergence(forward_ad.make_dual(student, torch.ones_like(student)), teacher)


WITHOUT_BINARY = f"""
import sys
sys.modules[{nodes.MODULE!r}] = None  # what a build for another PyTorch looks like
import torch, kdfast
x = torch.randn(3, 5, requires_grad=True)
kdfast.kl_divergence(x, torch.randn(3, 5)).backward()
assert x.grad is not None
from kdfast.__main__ import report
print(report())
"""


def test_without_the_binary_nodes_are_in_python_and_the_report_says_why():
    arguments = [sys.executable, "-W", "error", "-c", WITHOUT_BINARY]
    printed = subprocess.run(arguments, check=True, capture_output=True, text=True).stdout
    line = next(line for line in printed.splitlines() if line.startswith("autograd nodes:"))
    assert line.startswith(f"autograd nodes: in Python: not built with torch {torch.__version__}")
