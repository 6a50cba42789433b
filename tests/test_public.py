"""Claims about every public function: it exists on every floor, is documented, differentiable, finite and compiles."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import kdfast
from kdfast import backends
from samples import NAMES, SAMPLES
from support import HALF, cast, first_output, is_differentiable, sample_inputs

CLASSES = ("CRDLoss", "SimilarityGraph")  # public names that are not functions
LOSSES = tuple(name for name in NAMES if name not in ("similarity_graph", "hardest_negatives"))


def parameters(function) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(function).parameters)


def test_the_samples_cover_the_public_list():
    others = {"backends", "empty_cache", "functional", "losses", "metrics", "reference"}
    assert set(kdfast.__all__) - others == set(NAMES) | set(CLASSES)
    assert set(kdfast.reference.__all__) == set(NAMES) | set(CLASSES)
    assert set(kdfast.losses.__all__) == {sample.module for sample in SAMPLES.values()} | {"CRDLoss"}


@pytest.mark.parametrize("name", NAMES)
def test_fast_and_reference_have_one_signature(name):
    assert parameters(getattr(kdfast, name)) == parameters(getattr(kdfast.reference, name))


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_is_complete(name):
    text = getattr(kdfast, name).__doc__
    for section in ("Args:", "Returns:", "Raises:", "Source:"):
        assert section in text, f"{name} lacks {section}"
    assert re.search(r"float16|half|dtype", text), f"{name} says nothing of dtypes"
    for parameter in parameters(getattr(kdfast, name)):
        assert re.search(rf"\b{parameter}\b", text), f"{name} does not document {parameter}"
    assert getattr(kdfast.reference, name).__doc__


@pytest.mark.parametrize("name", NAMES)
def test_the_module_twin_takes_the_same_arguments(name):
    function = parameters(getattr(kdfast, name))
    twin = getattr(kdfast.losses, SAMPLES[name].module)
    assert issubclass(twin, torch.nn.Module)
    assert re.search(rf"kdfast\.{name}\b", twin.__doc__)
    own = twin.__init__ is not kdfast.losses.module.LossModule.__init__  # a loss without options has none
    constructor, forward = parameters(twin.__init__) if own else {}, parameters(twin.forward)
    both = {**constructor, **forward}
    both.pop("self")  # of either
    assert set(both) == set(function)
    for key, parameter in both.items():
        assert parameter.default == function[key].default, key
    for key in constructor.keys() & function.keys():
        assert constructor[key].kind == function[key].kind, key


@pytest.mark.parametrize("name", NAMES)
def test_the_module_twin_gives_the_same_bits(name):
    inputs, options = sample_inputs(name, 3, SAMPLES[name].leading[0], SAMPLES[name].widths[0])
    twin = getattr(kdfast.losses, SAMPLES[name].module)
    tensors = {**inputs, **{k: v for k, v in options.items() if isinstance(v, Tensor)}}
    settings = {k: v for k, v in options.items() if k in parameters(twin.__init__)}
    tensors |= {k: v for k, v in options.items() if k not in settings}
    expected = getattr(kdfast, name)(**inputs, **options)
    got = twin(**settings)(**tensors)
    assert torch.equal(first_output(got), first_output(expected))


@pytest.mark.parametrize("name", NAMES)
def test_the_table_of_backends_has_its_op(name, monkeypatch):
    asked, real = set(), kdfast.backends.has_kernel
    monkeypatch.setattr(kdfast.backends, "has_kernel", lambda op, *args, **kw: asked.add(op) or real(op, *args, **kw))
    inputs, options = sample_inputs(name, 0, SAMPLES[name].leading[0], 5)
    getattr(kdfast, name)(**inputs, **options)
    assert asked == {op for op, functions in kdfast.backends.FUNCTIONS.items() if name in functions}


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    for seed in range(6):
        leading = SAMPLES[name].leading[0]
        inputs, options = sample_inputs(name, seed, leading, 5)
        arguments = cast({**inputs, **options}, torch.float64)
        leaves = [k for k, v in arguments.items() if is_differentiable(k, v)]

        def call(*values, arguments=arguments, leaves=leaves):
            value = first_output(getattr(kdfast, name)(**{**arguments, **dict(zip(leaves, values, strict=True))}))
            return value.masked_fill(value.isinf(), 0.0)  # missing negatives

        assert torch.autograd.gradcheck(call, [arguments[k] for k in leaves])


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_gets_no_gradient(name):
    inputs, options = sample_inputs(name, 0, SAMPLES[name].leading[0], 5)
    arguments = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    first_output(getattr(kdfast, name)(**arguments, **options)).sum().backward()
    for key, value in arguments.items():
        if key.startswith("teacher"):
            assert value.grad is None, key
        elif is_differentiable(key, value):
            assert value.grad is not None, key


@pytest.mark.parametrize("name", NAMES)
def test_a_gradient_is_the_callers_once_it_is_given(name):
    """A retained graph keeps none of the memory it has handed out: nobody writes the other's."""
    inputs, options = sample_inputs(name, 0, SAMPLES[name].leading[0], 5)
    tensors = cast({**inputs, **options}, torch.float32)
    leaves = {k: v.detach().flatten().requires_grad_() for k, v in tensors.items() if is_differentiable(k, v)}
    # Through a view the leaf's .grad may be the very memory the loss returned.
    views = {k: leaf.view(tensors[k].shape) for k, leaf in leaves.items()}
    value = first_output(getattr(kdfast, name)(**{**tensors, **views}))
    value = value.masked_fill(value.isinf(), 0.0).sum()  # missing negatives
    given = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
    kept = [gradient.clone() for gradient in given]
    value.backward(retain_graph=True)
    (3 * value).backward()
    for key, gradient, copy in zip(leaves, given, kept, strict=True):
        torch.testing.assert_close(gradient, copy, rtol=0, atol=0, msg=f"{key}: a later backward wrote the gradient")
        torch.testing.assert_close(leaves[key].grad, 4 * copy, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half_inputs_give_float32(name, dtype):
    inputs, options = sample_inputs(name, 0, SAMPLES[name].leading[0], 5)
    arguments = cast({**inputs, **options}, dtype)
    value = first_output(getattr(kdfast, name)(**arguments))
    assert value.dtype == torch.float32
    value.masked_fill(value.isinf(), 0.0).sum().backward()
    for key, leaf in arguments.items():
        if is_differentiable(key, leaf):
            assert leaf.grad.dtype == dtype


def same_as_teacher(name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Student and teacher exchange nothing but names where their shapes allow it."""
    twin = dict(inputs)
    for key, value in inputs.items():
        teacher = inputs.get(key.replace("student", "teacher"))
        if key.startswith("student") and teacher is not None and teacher.shape == value.shape:
            twin[key] = teacher.clone()
    return twin


def on_students(change):
    """Applies ``change`` to every floating input but stored log-probabilities, which must stay what they are."""

    def apply(name, inputs):
        return {
            k: change(v.clone()) if v.is_floating_point() and k != "teacher_values" else v for k, v in inputs.items()
        }

    return apply


def coincident(x: Tensor) -> Tensor:
    if x.dim() > 1:
        x[-1] = x[0]
    return x


def zero_row(x: Tensor) -> Tensor:
    if x.dim() > 1:
        x[0] = 0
    return x


def constant_row(x: Tensor) -> Tensor:
    if x.dim() > 1:
        x[0] = 3.0
    return x


HARD = {
    "identical student and teacher": same_as_teacher,
    "two coincident rows": on_students(coincident),
    "all rows coincident": on_students(lambda x: x[:1].expand_as(x).clone() if x.dim() > 1 else x),
    "a zero row": on_students(zero_row),
    "all zero": on_students(torch.zeros_like),
    "a constant row": on_students(constant_row),
    "values of 1e4": on_students(lambda x: x.sign() * 1e4),
    "random values of size 1e4": on_students(lambda x: x * 1e4),
    "as they are": lambda name, inputs: inputs,
}
DTYPES = (torch.float64, torch.float32)
EXTREMES = {"temperature": (0.05, 100.0)}


def check_finite(name: str, inputs: dict[str, Tensor], options: dict, dtype: torch.dtype) -> None:
    arguments = cast({**inputs, **options}, dtype)
    for function in (getattr(kdfast, name), getattr(kdfast.reference, name)):
        value = first_output(function(**arguments))
        missing = value.isinf() if name == "hardest_negatives" else torch.zeros_like(value, dtype=torch.bool)
        assert value[~missing].isfinite().all(), f"{name}{options}: {value}"
        leaves = [v for k, v in arguments.items() if is_differentiable(k, v)]
        for leaf, grad in zip(leaves, torch.autograd.grad(value[~missing].sum(), leaves), strict=True):
            assert grad.isfinite().all(), f"{name}{options}: gradient {grad} of {leaf}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", NAMES)
def test_hard_inputs_stay_finite(name, case, dtype):
    for seed in range(8):
        leading = SAMPLES[name].leading[0]
        inputs, options = sample_inputs(name, seed, leading, 5)
        check_finite(name, HARD[case](name, inputs), options, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_one_class_and_one_row_stay_finite(name):
    for seed in range(8):
        for leading in SAMPLES[name].leading:
            for width in (1, 2) if 1 in SAMPLES[name].widths else (2, 3):
                inputs, options = sample_inputs(name, seed, leading, width)
                check_finite(name, inputs, options, torch.float32)


@pytest.mark.parametrize("temperature", EXTREMES["temperature"])
@pytest.mark.parametrize("name", [name for name in NAMES if "temperature" in parameters(getattr(kdfast, name))])
def test_extreme_temperatures_stay_finite(name, temperature):
    for case in HARD:
        for seed in range(4):
            inputs, options = sample_inputs(name, seed, SAMPLES[name].leading[0], 5)
            options["temperature"] = temperature
            if options.get("values") == "logprobs":  # stored probabilities fix T = 1 unless they are renormalised
                options["tail"] = "renormalize"
            check_finite(name, HARD[case](name, inputs), options, torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_traces_without_a_graph_break(name):
    inputs, options = sample_inputs(name, 1, SAMPLES[name].leading[0], 5)
    function = getattr(kdfast, name)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kw: first_output(function(**kw)), backend="aot_eager", fullgraph=True)
    results = []
    for call in (function, compiled):
        arguments = cast({**inputs, **options}, torch.float32)
        value = first_output(call(**arguments))
        value.masked_fill(value.isinf(), 0.0).sum().backward()
        results.append([value, *(v.grad for k, v in arguments.items() if is_differentiable(k, v))])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")
@pytest.mark.parametrize("name", [name for names in backends.FUNCTIONS.values() for name in names])
def test_a_compiled_function_runs_the_kernel(name):
    called: set[str] = set()

    def note(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
        called.update(str(node.target) for graph in graphs for node in graph.nodes)
        return module.forward

    inputs, options = sample_inputs(name, 0, SAMPLES[name].leading[0], max(SAMPLES[name].widths))
    torch._dynamo.reset()
    torch.compile(getattr(kdfast, name), backend=note)(**cast({**inputs, **options}, torch.float32))
    assert any(target.startswith("kdfast.") for target in called), called


class Scaled(torch.nn.Module):
    """A function of inputs that a parameter has scaled, which gets the gradient."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.factor = torch.nn.Parameter(torch.tensor(1.5))

    def forward(self, **inputs: Tensor) -> Tensor:
        scaled = {k: v * self.factor if is_differentiable(k, v) else v for k, v in inputs.items()}
        return first_output(self.function(**scaled, **self.options))


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_program_has_the_gradient(name, strict):
    inputs, options = sample_inputs(name, 1, SAMPLES[name].leading[0], 5)
    tensors = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    module = Scaled(getattr(kdfast, name), options)
    exported = torch.export.export(module, (), tensors, strict=strict).module()
    gradients = []
    for program in (module, exported):
        value = program(**tensors)
        (parameter,) = program.parameters()
        gradients.append(torch.autograd.grad(value.masked_fill(value.isinf(), 0.0).sum(), parameter))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("floor", (kdfast, kdfast.reference), ids=lambda floor: floor.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_shapes_are_known_without_values(name, floor):
    """Forward and backward in FakeTensorMode, which has shapes and dtypes alone."""
    inputs, options = sample_inputs(name, 1, SAMPLES[name].leading[0], 5)
    arguments = cast({**inputs, **options}, torch.float32)
    leaves = [k for k, v in arguments.items() if is_differentiable(k, v)]
    with FakeTensorMode() as mode:
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        value = first_output(getattr(floor, name)(**fakes))
        grads = torch.autograd.grad(value.sum(), [fakes[k] for k in leaves])
    assert value.shape == first_output(getattr(floor, name)(**arguments)).shape
    assert [(g.shape, g.dtype) for g in grads] == [(arguments[k].shape, torch.float32) for k in leaves]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_teacher_may_come_from_inference_mode(name, dtype):
    for seed in range(4):  # with different reductions
        inputs, options = sample_inputs(name, seed, SAMPLES[name].leading[0], 5)
        results = []
        for context in (torch.no_grad, torch.inference_mode):
            arguments = cast({**inputs, **options}, dtype)
            others = [k for k, v in arguments.items() if k.startswith("teacher") and isinstance(v, Tensor)]
            with context():
                arguments |= {k: arguments[k].clone() for k in others}
            value = first_output(getattr(kdfast, name)(**arguments))
            value.masked_fill(value.isinf(), 0.0).sum().backward()  # missing negatives
            results.append([value, *(v.grad for k, v in arguments.items() if is_differentiable(k, v))])
        for usual, inference in zip(*results, strict=True):
            assert torch.equal(usual, inference)


@pytest.mark.parametrize("name", NAMES)
def test_meta_tensors_get_the_shapes_and_dtypes_of_others(name):
    """By the reference: a device without kernels, and without an autocast to switch off."""
    for seed in range(4):
        inputs, options = sample_inputs(name, seed, SAMPLES[name].leading[0], 5)
        results = []
        for device in ("cpu", "meta"):
            arguments = cast({**inputs, **options}, torch.bfloat16, device=device)
            value = first_output(getattr(kdfast, name)(**arguments))
            leaves = [v for k, v in arguments.items() if is_differentiable(k, v)]
            tensors = (value, *torch.autograd.grad(value.sum(), leaves))
            assert {x.device.type for x in tensors} == {device}
            results.append([(x.shape, x.dtype) for x in tensors])
        assert results[0] == results[1], options


class NothingIsReadByTheHost(TorchDispatchMode):
    """Operators that on a GPU would wait for it are errors: what a value decides, and results whose size it decides."""

    SYNCHRONISE = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.bincount.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.repeat_interleave.Tensor,
        torch.ops.aten._unique2.default,
        torch.ops.aten.lift_fresh.default,  # a tensor made from a number: copied from memory that is not pinned
    )
    INDEX = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        masks = function in self.INDEX and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if masks or function in self.SYNCHRONISE:
            # Values of labels and indices are checked, on the CPU alone.
            checked = any(frame.function.startswith(("check_", "refuse_")) for frame in inspect.stack(0))
            assert checked, f"{function} would wait for the device"
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("name", NAMES)
def test_no_value_is_needed_on_the_host(name):
    """The plain PyTorch that runs on a GPU where there is no kernel; on one tests/cuda asks the driver itself."""
    for seed in range(6):
        inputs, options = sample_inputs(name, seed, SAMPLES[name].leading[0], 5)
        arguments = cast({**inputs, **options}, torch.float32)
        leaves = [value for key, value in arguments.items() if is_differentiable(key, value)]
        with kdfast.backends.use("reference"), NothingIsReadByTheHost():
            torch.autograd.grad(first_output(getattr(kdfast, name)(**arguments)).sum(), leaves)


def test_what_would_wait_for_the_device_is_noticed():
    x = torch.ones(3)
    values = (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x.new_tensor(1))
    for synchronise in (*values, lambda: x[x > 0], lambda: x.nonzero()):
        with pytest.raises(AssertionError, match="would wait"), NothingIsReadByTheHost():
            synchronise()


@pytest.mark.parametrize("name", LOSSES)
def test_identical_student_and_teacher_lose_nothing(name):
    """Holds for every loss that measures a difference; the others are named with the reason."""
    not_zero = {
        "kd_loss": "cross-entropy with the labels stays",
        "crd_loss": "the contrastive term stays",
        "topk_kl_divergence": "the teacher is stored, not a pair of tensors",
        "linear_kl_divergence": "hidden widths differ",
        "attention_transfer_loss": "map sizes differ",
        "rkd_sequence_angle_loss": "widths differ",
    }
    if name in not_zero:
        pytest.skip(not_zero[name])
    inputs, options = sample_inputs(name, 0, SAMPLES[name].leading[0], 5)
    options.pop("reduction", None)
    value = getattr(kdfast, name)(**same_as_teacher(name, inputs), **options)
    # dist_loss adds its eps of 1e-8 to a product of norms that may be as small as 0.1, per row and column.
    assert math.isclose(value.item(), 0.0, abs_tol=1e-6 if name == "dist_loss" else 1e-12)
