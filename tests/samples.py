"""Inputs of every public function, for the tests that walk all of them.

A sample builds float64 tensors from a generator, a leading shape and a width; options are the values worth drawing.
An option that is a function of the same three arguments makes a tensor (a mask, weights).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import kdfast

Shape = tuple[int, ...]
Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sample:
    """How to call one public function."""

    inputs: Callable[[torch.Generator, Shape, int], Inputs]
    options: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    leading: Sequence[Shape] = ((6,), (1,))  # leading shapes to draw from
    widths: Sequence[int] = (5, 1)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments every call needs
    module: str = ""  # the twin in kdfast.losses
    # Size of the terms a gradient is the sum of, for grad_output 1 and one row: they may cancel to nearly nothing.
    # 0.1 is that of features of size 1 in a batch of about ten.
    gradient_terms: Callable[[Inputs, Mapping[str, Any]], float] = lambda inputs, options: 0.1
    # The same for the value.
    value_terms: Callable[[Inputs, Mapping[str, Any]], float] = lambda inputs, options: (
        float(options.get("temperature", 1.0)) ** 2
    )

    def draw(self, generator: torch.Generator, leading: Shape, width: int) -> dict[str, Any]:
        """One random set of options."""
        chosen = dict(self.fixed)
        for name, values in self.options.items():
            value = values[int(torch.randint(len(values), (), generator=generator))]
            chosen[name] = value(generator, leading, width) if callable(value) else value
        return chosen


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def logit_pair(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    return {
        "student_logits": normal(generator, *leading, width, scale=3.0),
        "teacher_logits": normal(generator, *leading, width, scale=3.0),
    }


def labelled_logits(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    labels = torch.randint(width, leading, generator=generator)
    return {**logit_pair(generator, leading, width), "labels": labels}


def feature_pair(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    return {"student": normal(generator, *leading, width), "teacher": normal(generator, *leading, width)}


def labelled_features(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    return {**feature_pair(generator, leading, width), "labels": torch.randint(2, leading[:1], generator=generator)}


def map_pair(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    n = leading[0]
    return {
        "student_maps": normal(generator, n, width, 2, 2),
        "teacher_maps": normal(generator, n, width + 1, 4, 4),
    }


def sequence_pair(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    n = leading[0]
    return {"student": normal(generator, n, 5, width), "teacher": normal(generator, n, 5, width + 1)}


def stored_teacher(generator: torch.Generator, leading: Shape, width: int, k: int = 3) -> Inputs:
    k = min(k, width)
    teacher = torch.log_softmax(normal(generator, *leading, width, scale=3.0), dim=-1)
    values, indices = teacher.topk(k, dim=-1)
    return {
        "student_logits": normal(generator, *leading, width, scale=3.0),
        "teacher_values": values,
        "teacher_indices": indices,
    }


def projections(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    return {
        "student_hidden": normal(generator, *leading, 3),
        "student_weight": normal(generator, width, 3),
        "teacher_hidden": normal(generator, *leading, 4),
        "teacher_weight": normal(generator, width, 4),
    }


def single_features(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    return {"features": normal(generator, *leading, width)}


def single_labelled(generator: torch.Generator, leading: Shape, width: int) -> Inputs:
    return {
        "features": normal(generator, *leading, width),
        "labels": torch.randint(2, leading[:1], generator=generator),
    }


def row_mask(generator: torch.Generator, leading: Shape, width: int) -> Tensor:
    return torch.rand(leading, generator=generator) < 0.7


def element_mask(generator: torch.Generator, leading: Shape, width: int) -> Tensor:
    return torch.rand((*leading, width), generator=generator) < 0.7


def token_mask(generator: torch.Generator, leading: Shape, width: int) -> Tensor:
    return torch.rand((leading[0], 5), generator=generator) < 0.8


def row_weights(generator: torch.Generator, leading: Shape, width: int) -> Tensor:
    return torch.rand(leading, generator=generator, dtype=torch.float64) * 2


def softmax_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """T^2 p / T, with p up to 1; in reverse KL times log(p_s / p_t), of which the KL is taken off."""
    temperature = float(options.get("temperature", 1.0))
    if options.get("direction") != "reverse" and options.get("beta") != 1.0:
        return temperature + 1.0
    log_s, log_t = ((inputs[side] / temperature).log_softmax(-1) for side in ("student_logits", "teacher_logits"))
    apart = (log_s - log_t).abs().max() if log_s.numel() else 0.0
    return (temperature + 1.0) * (1.0 + float(apart))


def dkd_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    return softmax_terms(inputs, options) * (options.get("alpha", 1.0) + options.get("beta", 8.0))


def standardized_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """The chain through z = (x - mean) / std divides by the deviation of the row."""
    if inputs["student_logits"].shape[-1] == 1:
        return 0.0
    deviation = inputs["student_logits"].std(dim=-1).min()
    return softmax_terms(inputs, options) / max(float(deviation), 1e-7)


def crd_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """2 / N (1 + 2 |s - t|) |x| / temperature, unit x over the norm of its row with ``normalize``."""
    student, teacher = (inputs[side].flatten(1) for side in ("student", "teacher"))
    norms = student.norm(dim=1)
    slope = norms.max()
    if options.get("normalize"):
        student, teacher, slope = (*(torch.nn.functional.normalize(x) for x in (student, teacher)), 1 / norms.min())
    temperature = options.get("temperature", 0.1)
    apart = (student @ student.mT - teacher @ teacher.mT).abs().max() / temperature
    return float(2 / len(student) * (1 + 2 * apart) * slope / temperature)


def crd_value_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """2 |s - t| |s|: a square is known as well as the similarities whose difference it is of."""
    student, teacher = (inputs[side].flatten(1) for side in ("student", "teacher"))
    if options.get("normalize"):
        student, teacher = (torch.nn.functional.normalize(x) for x in (student, teacher))
    s, t = (x @ x.mT / options.get("temperature", 0.1) for x in (student, teacher))
    return float((2 * (s - t).abs() * torch.maximum(s.abs(), t.abs())).mean())


def similarity_preserving_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """The gradient before what is along the row is taken off, which is all of it at width 1."""
    student, teacher = (torch.nn.functional.normalize(inputs[side].flatten(1)) for side in ("student", "teacher"))
    norms = inputs["student"].flatten(1).norm(dim=1, keepdim=True)
    slopes = 4 / len(student) ** 2 * ((student @ student.mT).abs() + (teacher @ teacher.mT).abs()) @ student.abs()
    return float((slopes / norms).max())


def pkt_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """c_t / (c_s + eps), which is large for rows that only the student takes for opposite, over norms."""
    eps, norms = options.get("eps", 1e-7), inputs["student"].flatten(1).norm(dim=1)
    student, teacher = (kdfast.reference.features.neighbours(inputs[side], eps) for side in ("student", "teacher"))
    return float((teacher / (student + eps)).max() / len(student) / norms.min())


def similarity_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """The gradient of a cosine is made of terms of size 1 / |x|, which cancel to 0 at width 1."""
    x = inputs["features" if "features" in inputs else "student"].flatten(1)
    norms = x.norm(dim=1)
    return 1 / max(float(norms[norms > 0].min()), 1e-12) if options["metric"] == "cosine" else 0.1


def rkd_terms(inputs: Inputs, options: Mapping[str, Any]) -> float:
    """A direction turns by 1 over the distance, and float64 knows a cosine to eps times the ratio of its distances.

    On a line, where directions cannot turn, terms of that size cancel to 0. tests/ops/test_rkd.py is stricter.
    """
    d = torch.pdist(inputs["student"])
    d = d[d > 0]
    nearest, farthest = (min(float(d.min()), 1.0), max(float(d.max()), 1.0)) if len(d) else (1.0, 1.0)
    return 0.1 * (options.get("distance_weight", 1.0) + options.get("angle_weight", 1.0) * farthest / nearest**2)


LOGIT_SHAPES: Sequence[Shape] = ((6,), (2, 3), (1,), (), (2, 1, 2))
LOGIT_WIDTHS = (1, 2, 5, 16, 33, 100)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
TEMPERATURES = (1.0, 4.0, 0.5)
ROWS = {"reduction": REDUCTIONS, "mask": (None, row_mask), "row_weight": (None, row_weights)}
# 'sum' is as many times larger as there are pairs or triplets: the parity tests of rkd have it.
PAIRS = {"mask": (None, row_mask), "row_weight": (None, row_weights)}
TRIPLETS = {"triplets": ("all", 100), **PAIRS}  # no more than the batch: all of them, and none is drawn

SAMPLES: dict[str, Sample] = {
    "kl_divergence": Sample(
        logit_pair,
        {
            "temperature": TEMPERATURES,
            "direction": ("forward", "reverse"),
            "scale_by_temperature": (True, False),
            **ROWS,
        },
        LOGIT_SHAPES,
        (*LOGIT_WIDTHS, 5000),
        module="KLDivergence",
        gradient_terms=softmax_terms,
    ),
    "js_divergence": Sample(
        logit_pair,
        {"temperature": TEMPERATURES, "beta": (0.5, 0.1, 0.0, 1.0), **ROWS},
        LOGIT_SHAPES,
        LOGIT_WIDTHS,
        module="JSDivergence",
        gradient_terms=softmax_terms,
    ),
    "kd_loss": Sample(
        labelled_logits,
        {
            "temperature": TEMPERATURES,
            "alpha": (0.7, 0.0, 1.0),
            "label_smoothing": (0.0, 0.1),
            "reduction": ("none", "sum", "batchmean"),
            "ignore_index": (-100, 0),
        },
        LOGIT_SHAPES,
        LOGIT_WIDTHS,
        module="KDLoss",
        gradient_terms=softmax_terms,
    ),
    "dkd_loss": Sample(
        labelled_logits,
        {"temperature": TEMPERATURES, "alpha": (1.0, 0.3), "beta": (8.0, 1.0)},
        LOGIT_SHAPES,
        LOGIT_WIDTHS[1:],
        module="DKDLoss",
        gradient_terms=dkd_terms,
    ),
    "dist_loss": Sample(
        logit_pair,
        {"temperature": TEMPERATURES, "beta": (1.0, 2.0), "gamma": (1.0, 0.5)},
        LOGIT_SHAPES,
        LOGIT_WIDTHS,
        module="DISTLoss",
    ),
    "standardized_kl_divergence": Sample(
        logit_pair,
        {"temperature": (2.0, 1.0), **ROWS},
        LOGIT_SHAPES,
        LOGIT_WIDTHS,
        module="StandardizedKLDivergence",
        gradient_terms=standardized_terms,
    ),
    "topk_kl_divergence": Sample(
        stored_teacher,
        {"tail": ("drop", "bucket", "renormalize"), "reduction": REDUCTIONS, "mask": (None, row_mask)},
        LOGIT_SHAPES,
        LOGIT_WIDTHS,
        fixed={"values": "logprobs"},
        module="TopKKLDivergence",
        gradient_terms=softmax_terms,
    ),
    "linear_kl_divergence": Sample(
        projections,
        {"temperature": TEMPERATURES, "divergence": ("forward", "reverse", "js"), "beta": (0.5, 0.1)},
        LOGIT_SHAPES,
        LOGIT_WIDTHS,
        module="LinearKLDivergence",
    ),
    "feature_mse_loss": Sample(feature_pair, {"mask": (None, row_mask, element_mask)}, module="FeatureMSELoss"),
    "attention_transfer_loss": Sample(
        map_pair, {"p": (2, 1, 3), "normalize": (True, False)}, module="AttentionTransferLoss"
    ),
    "pkt_loss": Sample(feature_pair, module="PKTLoss", gradient_terms=pkt_terms),
    "kernel_alignment_loss": Sample(feature_pair, {"centered": (False, True)}, module="KernelAlignmentLoss"),
    "similarity_preserving_loss": Sample(
        feature_pair, module="SimilarityPreservingLoss", gradient_terms=similarity_preserving_terms
    ),
    "rkd_distance_loss": Sample(feature_pair, PAIRS, module="RKDDistanceLoss"),
    "rkd_angle_loss": Sample(feature_pair, TRIPLETS, module="RKDAngleLoss", gradient_terms=rkd_terms),
    "rkd_loss": Sample(
        feature_pair,
        {"distance_weight": (25.0, 0.0), "angle_weight": (50.0, 0.0), **TRIPLETS},
        module="RKDLoss",
        gradient_terms=rkd_terms,
    ),
    "rkd_sequence_angle_loss": Sample(sequence_pair, {"mask": (None, token_mask)}, module="RKDSequenceAngleLoss"),
    "crd_loss": Sample(
        labelled_features,
        {"normalize": (False, True)},
        module="InBatchCRDLoss",
        gradient_terms=crd_terms,
        value_terms=crd_value_terms,
    ),
    "similarity_graph": Sample(
        single_features,
        {"metric": ("cosine", "dot", "euclidean"), "include_self": (False, True)},
        leading=((6,), (4,)),
        fixed={"k": 2},
        module="TopKSimilarityGraph",
        gradient_terms=similarity_terms,
    ),
    "graph_distillation_loss": Sample(
        feature_pair,
        {"metric": ("cosine", "dot", "euclidean"), "k": (3, 20)},
        module="GraphDistillationLoss",
        gradient_terms=similarity_terms,
    ),
    "hardest_negatives": Sample(
        single_labelled,
        {"metric": ("cosine", "dot", "euclidean")},
        leading=((6,),),
        fixed={"k": 2},
        module="HardestNegatives",
        gradient_terms=similarity_terms,
    ),
}

NAMES = tuple(SAMPLES)
