"""KL divergence and its relatives, forward + backward, from raw logits: kdfast, eager PyTorch, torch.compile, peers.

``python benchmarks/kl.py`` measures everything (CPU: about five minutes on two cores) and saves it in
``benchmarks/results``; ``--device cuda`` does the same on a GPU, in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from harness import Case, Loss, Options, Step, fresh, main, step

try:
    from liger_kernel.transformers import LigerKLDIVLoss
except ImportError:
    LigerKLDIVLoss = None
try:
    from speculators.losses import kl_div_loss as speculators_kl_div_loss
except ImportError:
    speculators_kl_div_loss = None
try:
    from fast_llm.functional.config import EntropyLossType, TargetFormat
    from fast_llm.functional.triton.entropy_loss import triton_entropy_loss_forward_backward
except ImportError:
    triton_entropy_loss_forward_backward = None

TEMPERATURE = 4.0
SHAPES = [(128, 100), (256, 1000), (512, 32000), (256, 128256)]
GPU_SHAPES = [(8192, 32000), (4096, 128256)]  # large enough to fill one
QUICK_SHAPES = SHAPES[:2]
LONG_ROWS = 8192  # from here on Triton reads a row in several tiles

# Column of the table -> what runs there: the fastest of several ways to write it counts.
BASELINES = {
    "eager": ("eager reference", "eager F.kl_div"),
    "torch.compile": ("compiled reference", "compiled F.kl_div"),
    "Liger": ("Liger",),
    "speculators": ("speculators",),
    "Fast-LLM": ("Fast-LLM",),
}


def common_form(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """What people write. Half types are widened: with rounded probabilities it would fail the parity rule."""
    log_p_student = F.log_softmax(student_logits.float() / TEMPERATURE, dim=-1)
    p_teacher = F.softmax(teacher_logits.float() / TEMPERATURE, dim=-1)
    return F.kl_div(log_p_student, p_teacher, reduction="batchmean") * TEMPERATURE * TEMPERATURE


def liger(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Liger's kernel takes log-probabilities, so making them is part of it."""
    log_p_student = F.log_softmax(student_logits.float() / TEMPERATURE, dim=-1)
    log_p_teacher = F.log_softmax(teacher_logits.float() / TEMPERATURE, dim=-1)
    return LigerKLDIVLoss(reduction="batchmean", log_target=True)(log_p_student, log_p_teacher) * TEMPERATURE**2


def speculators(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """vLLM's kernel takes one sequence of logits and no temperature. To divide by 4 is exact in half types too."""
    sequences = (tensor.div(TEMPERATURE).unsqueeze(0) for tensor in (student_logits, teacher_logits))
    return speculators_kl_div_loss(*sequences).mean() * TEMPERATURE**2


class FastLLM(torch.autograd.Function):
    """Fast-LLM's kernel writes the gradient in forward, and is told before by what it will be multiplied: here 1."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        value, _, ctx.gradient = triton_entropy_loss_forward_backward(
            student_logits,
            teacher_logits,
            loss_mask=None,
            grad_output=1.0,
            logits_scale_factor=1 / TEMPERATURE,  # of both sides; its ``temperature`` is the teacher's alone
            target_format=TargetFormat.logits,
            entropy_loss_type=EntropyLossType.forward_kl,
            divisor=len(student_logits) / TEMPERATURE**2,
        )
        return value

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None


def fast_llm(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    return FastLLM.apply(student_logits, teacher_logits)


# Other libraries: what is imported of each, None where it is not installed, and how it computes the loss.
PEERS: dict[str, tuple[object, Loss]] = {
    "Liger": (LigerKLDIVLoss, liger),
    "speculators": (speculators_kl_div_loss, speculators),
    "Fast-LLM": (triton_entropy_loss_forward_backward, fast_llm),
}


def forced(backend: str, loss: Loss, **inputs: Tensor) -> Tensor:
    """``loss`` by the kernel of ``backend``, whichever is the default."""
    with kdfast.backends.use(backend):
        return loss(**inputs)


class Empty(torch.autograd.Function):
    """A loss that computes nothing: what Python and autograd cost."""

    @staticmethod
    def forward(ctx: Any, student_logits: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return ctx.gradient, None, None


def logits(shape: tuple[int, int], options: Options) -> dict[str, Tensor]:
    generator = torch.Generator(options.device).manual_seed(0)
    draw = partial(torch.randn, *shape, generator=generator, device=options.device)
    student, teacher = (draw().mul_(3).to(options.dtype) for _ in range(2))
    return {"student_logits": student.requires_grad_(), "teacher_logits": teacher}


def floors(student_logits: Tensor, teacher_logits: Tensor, **_: Tensor) -> dict[str, Callable[[], object]]:
    """Memory: student and teacher read, gradient written, into memory in use already. Python: an empty Function."""
    student, warm = student_logits.detach(), torch.zeros_like(teacher_logits)
    value = torch.zeros((), device=warm.device)
    if warm.is_cuda:  # there the yardstick is the copy bandwidth: half of the three tensors' bytes read, half written
        source, target = torch.zeros(2, 3 * warm.numel() // 2, dtype=warm.dtype, device=warm.device)
        memory = partial(target.copy_, source)
    else:
        memory = partial(torch.add, student, teacher_logits, out=warm)
    return {"memory floor": memory, "Python floor": step(lambda x: Empty.apply(x, value, warm), {"x": student_logits})}


def case(name: str, function: str, arguments: dict[str, Any], shape: tuple[int, int], options: Options) -> Case:
    """``kdfast.<function>`` against its reference, plain and compiled."""
    inputs = logits(shape, options)
    if function in ("kd_loss", "dkd_loss"):
        generator = torch.Generator(options.device).manual_seed(1)
        inputs["labels"] = torch.randint(shape[1], shape[:1], generator=generator, device=options.device)
    fast = partial(getattr(kdfast, function), **arguments)
    reference = partial(getattr(kdfast.reference, function), **arguments)
    plain = {"reference": reference}
    candidates = {"kdfast": step(fast, inputs)}
    if name == "forward KL":
        if kdfast.backends.select("kl", inputs["student_logits"]) != kdfast.backends.REFERENCE:
            # Its own copy of the inputs, which from the second call on hold a gradient: as good as any other logits.
            candidates["kdfast, in place"] = step(partial(fast, inplace_backward=True), fresh(inputs))
        plain["F.kl_div"] = common_form
        if kdfast.backends.can_run(kdfast.backends.CUDA, "kl", options.device.type)[0] and shape[1] >= LONG_ROWS:
            for backend in (kdfast.backends.TRITON, kdfast.backends.CUDA):
                candidates[f"kdfast, {backend}"] = step(partial(forced, backend, fast), inputs)
        if options.device.type == "cuda":
            installed = {label: loss for label, (imported, loss) in PEERS.items() if imported is not None}
            candidates.update({label: step(loss, inputs) for label, loss in installed.items()})
    for label, loss in plain.items():
        candidates[f"eager {label}"] = step(loss, inputs)
        candidates[f"compiled {label}"] = compiled(loss, inputs)
    return Case(
        name=name,
        shape=shape,
        inputs=inputs,
        reference=reference,
        candidates=candidates,
        baselines=BASELINES,
        floors=floors(**inputs),
        floor_bytes=3 * inputs["student_logits"].nbytes,
        ours=tuple(label for label in candidates if label.startswith("kdfast")),
        peers=frozenset(PEERS),
        term_size=TEMPERATURE**2,
    )


def compiled(loss: Loss, inputs: dict[str, Tensor]) -> Step:
    return step(torch.compile(lambda **tensors: loss(**tensors), fullgraph=True, dynamic=False), inputs)


# Name in the table -> function and arguments. The first is measured at every shape, the others at one.
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "forward KL": ("kl_divergence", {"temperature": TEMPERATURE}),
    "reverse KL": ("kl_divergence", {"temperature": TEMPERATURE, "direction": "reverse"}),
    "JS": ("js_divergence", {"beta": 0.5, "temperature": TEMPERATURE}),
    "KD with labels": ("kd_loss", {"temperature": TEMPERATURE}),
    "DKD": ("dkd_loss", {"temperature": TEMPERATURE}),
}


def cases(options: Options) -> list[Callable[[], Case]]:
    cuda = options.device.type == "cuda"
    # On a GPU what decides comes first, in case that time runs out, and the long rows of the CPU would not fill it.
    shapes = options.shapes or (QUICK_SHAPES if options.quick else GPU_SHAPES + SHAPES[:2] if cuda else SHAPES)
    chosen = [("forward KL", shape) for shape in shapes]
    others_at = GPU_SHAPES[0] if cuda else SHAPES[2]
    if others_at in shapes:
        chosen += [(name, others_at) for name in list(LOSSES)[1:]]
    return [partial(case, name, *LOSSES[name], shape, options) for name, shape in chosen]


if __name__ == "__main__":
    main(__file__, cases)
