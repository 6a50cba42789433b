"""Contrastive representation distillation with a memory bank: a loss with state, and one class on every floor."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from kdfast import checks
from kdfast.reference.geometry import flatten_rows, gram, unit_rows


class AliasSampler(nn.Module):
    """Draws indices with probabilities in proportion to ``weights``, in constant time each (Walker's alias method).

    Every index gets an equal slot, of which it keeps the share ``threshold`` and gives the rest to its ``alias``.
    Weights without values, on 'meta', give a table of the right shape.
    """

    threshold: Tensor
    alias: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        n = weights.numel()
        shares = [] if weights.is_meta else (weights.double() / weights.double().sum() * n).tolist()
        threshold, alias = [1.0] * n, list(range(n))
        poor = [i for i, share in enumerate(shares) if share < 1]
        rich = [i for i, share in enumerate(shares) if share >= 1]
        while poor and rich:
            taker, giver = poor.pop(), rich[-1]
            threshold[taker], alias[taker] = shares[taker], giver
            shares[giver] -= 1 - shares[taker]
            if shares[giver] < 1:
                poor.append(rich.pop())
        self.register_buffer("threshold", torch.tensor(threshold, dtype=torch.float32))
        self.register_buffer("alias", torch.tensor(alias, dtype=torch.int64))

    def forward(self, *shape: int) -> Tensor:
        """int64 indices of ``shape``, from PyTorch's global generator."""
        device = self.alias.device
        slot = torch.randint(self.alias.numel(), shape, device=device)
        keep = torch.rand(shape, device=device) < self.threshold[slot]
        return torch.where(keep, slot, self.alias[slot])


class CRDLoss(nn.Module):
    r"""Contrastive representation distillation with a memory bank (Tian et al. 2020).

    Both sides are projected to ``feature_dim`` and L2-normalised: s and t. Each side keeps a memory m of one vector per
    training sample. The student is contrasted with the teacher's memories, the teacher with the student's: the
    sample's own is the positive, K others drawn from the noise distribution q are the negatives. With

    .. math:: h_{ij} = \sigma\!\left( \langle s_i, m_j \rangle / \tau - \log Z - \log (K q_j) \right)

    either direction gives

    .. math:: -\frac{1}{N} \sum_i \Big( \log h_{ii} + \sum_{j \text{ negative}} \log (1 - h_{ij}) \Big),

    and the loss is their sum. Z, one a direction, is the mean of :math:`\exp(\langle s_i, m_j \rangle / \tau) / q_j`
    over the first batch, kept from then on. After the loss is computed the memories of the batch move:
    ``m_i <- normalise(momentum * m_i + (1 - momentum) * s_i)``. In ``eval()`` mode neither Z nor memories change.

    The two projections are parameters of this loss and have to be given to the optimizer. The features given for the
    teacher get no gradient. Memories, Z and q are buffers, so ``state_dict()`` holds all that training needs. Built
    on ``torch.device('meta')`` it holds no values, and needs ``to_empty`` and such a dictionary.

    With ``torch.distributed`` initialised, memories start as rank 0's, every rank stores the batches of all ranks, and
    Z is the mean over them. The buffers are then the same everywhere, so ``DistributedDataParallel`` may broadcast them
    or not, and rank 0's checkpoint is everyone's. Every rank must call the loss in training, with the same N
    (``drop_last=True``), and no sample may be in two ranks' batches.

    Args:
        student_dim: width D_s of the student's features, flattened.
        teacher_dim: width D_t of the teacher's.
        num_samples: size of the training set, hence of the memories.
        feature_dim: width of the projections.
        num_negatives: K, negatives of a sample. Drawn with replacement; the sample itself may be among them.
        temperature: tau > 0.
        momentum: in [0, 1], the share of the old memory.
        sample_weight: float (num_samples,), above 0: q up to a factor. None: all samples alike.

    Forward:
        student: (N, …), flattened to (N, D_s), float16, bfloat16, float32 or float64; cast to the dtype of the
            projections.
        teacher: (N, …), flattened to (N, D_t), same N, dtype and device.
        indices: int64 (N,), the positions of the samples in the training set; each at most once in a batch.
        negatives: int64 (N, K) of any K >= 1, or None: drawn from PyTorch's global generator (``torch.manual_seed``).

    Returns:
        Scalar of the dtype of the projections, float32 if that is a half type.

    Raises:
        TypeError: an argument is not of the type named above.
        ValueError: a size below 1, ``temperature``, ``momentum`` or ``sample_weight`` out of range, shapes or devices
            that do not fit; on the CPU also indices outside the training set. A GPU asserts these itself.

    Differs from the authors' code, and torchdistill's after it: no 1e-7 inside the logarithms, which log-sigmoids do
    not need; any q; memories start uniform on the unit sphere, not in a cube; ``eval()`` mode; a row of NaN or inf
    makes the loss NaN but does not enter the memory.

    Source: Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation", https://arxiv.org/abs/1910.10699.
    """

    student_memory: Tensor
    teacher_memory: Tensor
    log_normalizer: Tensor
    log_noise: Tensor

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_samples: int,
        *,
        feature_dim: int = 128,
        num_negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        sample_weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        for name, size in (
            ("student_dim", student_dim),
            ("teacher_dim", teacher_dim),
            ("num_samples", num_samples),
            ("feature_dim", feature_dim),
            ("num_negatives", num_negatives),
        ):
            checks.check_count(name, size, 1)
        checks.check_temperature(temperature)
        checks.check_fraction("momentum", momentum)
        checks.check_sample_weight(sample_weight, num_samples)
        self.num_negatives, self.temperature, self.momentum = num_negatives, temperature, momentum
        self._alike = False  # whether all ranks have the same memories
        self.student_projection = nn.Linear(student_dim, feature_dim)
        self.teacher_projection = nn.Linear(teacher_dim, feature_dim)
        device = self.student_projection.weight.device  # the default one, which is where all state belongs
        weights = torch.ones(num_samples, device="cpu") if sample_weight is None else sample_weight.detach()
        weights = weights.to("meta" if device.type == "meta" else "cpu")  # the tables are made by loops over numbers
        self.sampler = AliasSampler(weights)
        self.register_buffer("log_noise", (weights.double() / weights.double().sum()).log().float().to(device))
        self.register_buffer("student_memory", unit_rows(torch.randn(num_samples, feature_dim)))
        self.register_buffer("teacher_memory", unit_rows(torch.randn(num_samples, feature_dim)))
        self.register_buffer("log_normalizer", torch.full((2,), math.nan))  # log Z; NaN until the first batch

    def forward(self, student: Tensor, teacher: Tensor, indices: Tensor, *, negatives: Tensor | None = None) -> Tensor:
        checks.check_projected("student", student, self.student_projection.weight)
        checks.check_projected("teacher", teacher, self.teacher_projection.weight)
        checks.check_contrast(student, teacher, indices, negatives, self.log_noise.numel())
        if self.training and not self._alike and _world_size() > 1:
            self._start_alike()
        if negatives is None:
            negatives = self.sampler(indices.shape[0], self.num_negatives)
        s = project(self.student_projection, student)
        t = project(self.teacher_projection, teacher.detach())
        chosen = torch.cat([indices.unsqueeze(1), negatives], dim=1)
        loss = self._contrast(s, self.teacher_memory, chosen, 0) + self._contrast(t, self.student_memory, chosen, 1)
        if self.training:
            rows = torch.cat([s.detach(), t.detach()], dim=1)
            if _world_size() > 1:
                rows, indices = _of_all_ranks(rows), _of_all_ranks(indices)
            s_rows, t_rows = rows.split(s.shape[1], dim=1)
            self._remember(self.student_memory, s_rows, indices)
            self._remember(self.teacher_memory, t_rows, indices)
        return loss

    def _contrast(self, anchors: Tensor, memory: Tensor, chosen: Tensor, side: int) -> Tensor:
        """The loss of one direction: column 0 of ``chosen`` (N, 1 + K) has the positives."""
        similarities = gram(anchors.unsqueeze(1), memory[chosen].to(anchors.dtype)).squeeze(1) / self.temperature
        scores = similarities - self.log_noise[chosen].to(anchors.dtype)
        log_z = self._normalizer(scores.detach(), side)
        logits = scores - log_z - math.log(chosen.shape[1] - 1)
        return -(F.logsigmoid(logits[:, 0]).sum() + F.logsigmoid(-logits[:, 1:]).sum()) / max(chosen.shape[0], 1)

    def _normalizer(self, scores: Tensor, side: int) -> Tensor:
        """log Z as it was kept, or from this batch if there is none yet: decided on the device, without a sync."""
        kept = self.log_normalizer[side]
        estimate = scores.logsumexp(dim=(0, 1)) - math.log(max(scores.numel(), 1))
        if self.training and _world_size() > 1:
            estimate = _of_all_ranks(estimate[None]).logsumexp(dim=0) - math.log(_world_size())
        log_z = torch.where(kept.isnan() & estimate.isfinite(), estimate.to(kept.dtype), kept)
        if self.training:
            self.log_normalizer[side] = log_z
        return log_z.to(scores.dtype)

    def _start_alike(self) -> None:
        for buffer in (self.student_memory, self.teacher_memory, self.log_normalizer):
            distributed.broadcast(buffer, src=0)
        self._alike = True

    @torch.no_grad()
    def _remember(self, memory: Tensor, rows: Tensor, indices: Tensor) -> None:
        old = memory[indices]
        moved = unit_rows(self.momentum * old.to(rows.dtype) + (1 - self.momentum) * rows).to(memory.dtype)
        memory.index_copy_(0, indices, torch.where(moved.isfinite().all(dim=1, keepdim=True), moved, old))

    def extra_repr(self) -> str:
        return (
            f"num_samples={self.log_noise.numel()}, num_negatives={self.num_negatives}, "
            f"temperature={self.temperature!r}, momentum={self.momentum!r}"
        )


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@torch.no_grad()
def _of_all_ranks(x: Tensor) -> Tensor:
    """The ``x`` of every rank, one after the other in their order."""
    parts = [torch.empty_like(x) for _ in range(_world_size())]
    distributed.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def project(projection: nn.Linear, features: Tensor) -> Tensor:
    """(N, …) to unit vectors (N, feature_dim), never in a half type."""
    return unit_rows(flatten_rows(projection(features.flatten(start_dim=1).to(projection.weight.dtype))))
