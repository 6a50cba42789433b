"""Calls that reach every line of the tables from which launchers choose: tiles, warps and compile-time arguments.

tests/ops/launches_public.py shows, without a GPU, that none is left out; an op that is not listed is red there.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from samples import SAMPLES, Inputs, element_mask, normal, row_mask, stored_teacher


class Call(NamedTuple):
    """One call of a public function; options are as given, whatever the sample draws."""

    function: str
    leading: tuple[int, ...]
    width: int
    options: dict[str, Any]
    inputs: Callable[[torch.Generator, tuple[int, ...], int], Inputs] | None = None  # else the sample's

    def arguments(self, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
        generator = torch.Generator().manual_seed(seed)
        sample = SAMPLES[self.function]
        inputs = (self.inputs or sample.inputs)(generator, self.leading, self.width)
        return inputs, {**sample.fixed, **self.options}

    def __str__(self) -> str:
        shown = {name: f"of {tuple(x.shape)}" if isinstance(x, Tensor) else x for name, x in self.options.items()}
        options = ", ".join(f"{name}={value}" for name, value in shown.items())
        return f"{self.function} {'x'.join(map(str, (*self.leading, self.width)))} {options}"


def kl() -> list[Call]:
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("kl_divergence", {"temperature": 3.0, "direction": "forward"}),
        ("kl_divergence", {"temperature": 3.0, "direction": "reverse"}),
        ("js_divergence", {"temperature": 3.0, "beta": 0.3}),
        ("dkd_loss", {"temperature": 3.0}),
        ("standardized_kl_divergence", {"temperature": 3.0}),
        ("kd_loss", {"temperature": 3.0, "label_smoothing": 0.1}),
        ("kd_loss", {"temperature": 4.0, "label_smoothing": 0.0}),
    ]
    widths = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16000, 128256)
    calls = [Call(name, (5,), width, options) for width in widths for name, options in kinds]
    for width, temperature, smoothing in product((8192, 128256), (1.0, 2.0, 3.0, 4.0), (0.0, 0.1)):
        calls.append(Call("kd_loss", (5,), width, {"temperature": temperature, "label_smoothing": smoothing}))
    return calls


def topk_kl() -> list[Call]:
    def inputs(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        return stored_teacher(generator, leading, width, k=64)

    kinds: list[dict[str, Any]] = [
        {"values": "logits", "tail": "drop"},
        {"values": "logprobs", "tail": "drop"},
        {"values": "logprobs", "tail": "bucket"},
        {"values": "logprobs", "tail": "renormalize"},
    ]
    widths = (1000, 8192, 32000, 128256)
    return [Call("topk_kl_divergence", (5,), width, options, inputs) for width in widths for options in kinds]


def features() -> list[Call]:
    def maps(height: int, width: int, student: int, teacher: int) -> Callable[..., Inputs]:
        """Of so many pixels, one side's larger and pooled down."""

        def inputs(generator: torch.Generator, leading: tuple[int, ...], channels: int) -> Inputs:
            return {
                "student_maps": normal(generator, *leading, channels, student * height, student * width),
                "teacher_maps": normal(generator, *leading, 2 * channels, teacher * height, teacher * width),
            }

        return inputs

    grids = ((4, 4), (5, 5), (7, 7), (14, 14), (20, 20), (56, 56))
    kinds: list[tuple[dict[str, Any], int, int, int]] = [
        ({"p": 2, "normalize": True}, 64, 1, 2),
        ({"p": 1, "normalize": False}, 40, 2, 1),
        ({"p": 3, "normalize": True}, 40, 1, 1),
    ]
    calls = [
        Call("attention_transfer_loss", (3,), channels, options, maps(*grid, student, teacher))
        for grid, (options, channels, student, teacher) in product(grids, kinds)
    ]
    generator = torch.Generator().manual_seed(0)
    for width, mask in product((64, 33), (None, row_mask, element_mask)):
        options = {"mask": None if mask is None else mask(generator, (300,), width)}
        calls.append(Call("feature_mse_loss", (300,), width, options))
    return calls


def relation() -> list[Call]:
    """Several panels, whose last columns are no multiple of 16; the teacher's panels, products of features instead, and
    no teacher at all. Whole rows wider than a block, and products of features.
    """
    return [
        Call("pkt_loss", (2701,), 64, {}),
        Call("crd_loss", (2701,), 64, {"normalize": True, "temperature": 0.5}),
        Call("crd_loss", (2701,), 4, {"normalize": True, "temperature": 0.5}),
        Call("crd_loss", (100,), 64, {"alignment_weight": 0.0}),
        Call("pkt_loss", (100,), 300, {}),
        *(
            Call(name, (n,), width, options)
            for n, width in ((100, 64), (1100, 48), (2701, 48))  # the sanitizers take the first
            for name, options in (
                ("similarity_preserving_loss", {}),
                ("kernel_alignment_loss", {"centered": False}),
                ("kernel_alignment_loss", {"centered": True}),
            )
        ),
    ]


def rkd() -> list[Call]:
    """Several tiles of pairs; rows that do not count or weigh more; sums."""
    generator = torch.Generator().manual_seed(0)
    rows = {"mask": row_mask(generator, (150,), 40), "row_weight": torch.rand(150, generator=generator)}
    names = ("rkd_loss", "rkd_distance_loss", "rkd_angle_loss")
    options = ({}, rows, {**rows, "reduction": "sum"})
    return [Call(name, (150,), 40, chosen) for name, chosen in product(names, options)]


def rkd_sequence() -> list[Call]:
    """A teacher two blocks wide beside a student of one; a mask of the padding."""
    mask = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) < 0.8
    return [
        Call("rkd_sequence_angle_loss", (3,), width, {"mask": chosen})
        for width, chosen in product((64, 100, 255, 511, 768), (None, mask))
    ]


def scale() -> list[Call]:
    """More elements than PyTorch multiplies: fewer blocks than programs, with a rest."""
    return [Call("kl_divergence", (rows,), width, {"reduction": "sum"}) for rows, width in ((300, 1000), (40, 8189))]


def signs(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Tensor:
    """Rows of 1 and -1: where the width is a power of 4, similarities are exact in every dtype, and many are equal.

    So one list of neighbours is right, and every way to sum finds it.
    """
    return torch.randint(2, (*leading, width), generator=generator).double() * 2 - 1


def graph() -> list[Call]:
    def features(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        return {"features": signs(generator, leading, width)}

    def equal(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        return {"features": signs(generator, (1,), width).expand(*leading, width)}

    def memory(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        return {"features": signs(generator, leading, width), "keys": signs(generator, (1300,), width)}

    def labelled(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        labels = torch.randint(3, leading, generator=generator)
        return {"features": signs(generator, leading, width), "labels": labels}

    def pair(generator: torch.Generator, leading: tuple[int, ...], width: int) -> Inputs:
        student = torch.randn(*leading, width, generator=generator, dtype=torch.float64)
        return {"student": student, "teacher": signs(generator, leading, width)}

    calls = []
    rows = (1100,)  # several tiles either way
    for metric in ("cosine", "dot", "euclidean"):
        common: dict[str, Any] = {"metric": metric}
        for k, width in ((20, 64), (64, 16), (128, 16)):  # the sanitizers take the first
            for itself in (False, True):
                options = {**common, "k": k, "include_self": itself}
                calls.append(Call("similarity_graph", rows, width, options, features))
            calls.append(Call("graph_distillation_loss", rows, width, {**common, "k": k}, pair))
            calls.append(Call("hardest_negatives", rows, width, {**common, "k": k}, labelled))
        for itself in (False, True):
            options = {**common, "k": 20, "include_self": itself, "precision": "tf32"}
            calls.append(Call("similarity_graph", rows, 16, options, features))
        calls.append(Call("similarity_graph", rows, 64, {**common, "k": 20}, memory))
        calls.append(Call("similarity_graph", rows, 64, {**common, "k": 7}, equal))  # more than a buffer holds
    return calls


CALLS: dict[str, Callable[[], list[Call]]] = {
    "features": features,
    "graph": graph,
    "kl": kl,
    "relation": relation,
    "rkd": rkd,
    "rkd_sequence": rkd_sequence,
    "scale": scale,
    "topk_kl": topk_kl,
}
DTYPES = (torch.bfloat16, torch.float32)
