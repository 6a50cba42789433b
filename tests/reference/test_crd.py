"""The memory-bank CRD loss against loops over the paper's formula, torchdistill, and closed forms."""

from __future__ import annotations

import copy
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchdistill.losses.mid_level import CRDLoss as TorchdistillCRDLoss

import kdfast
from kdfast.reference.crd import AliasSampler, CRDLoss

N, K, SAMPLES = 4, 6, 10
STUDENT_DIM, TEACHER_DIM, WIDTH = 3, 5, 8


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed)).to(dtype)


def make(seed: int = 0, dtype: torch.dtype = torch.float64, **options: object) -> CRDLoss:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"feature_dim": WIDTH, "num_negatives": K, **options}
        return CRDLoss(STUDENT_DIM, TEACHER_DIM, SAMPLES, **options).to(dtype)


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> SimpleNamespace:
    return SimpleNamespace(
        student=features(N, STUDENT_DIM, seed=2 * seed + 1, dtype=dtype),
        teacher=features(N, TEACHER_DIM, seed=2 * seed + 2, dtype=dtype),
        indices=torch.randperm(SAMPLES, generator=generator(seed))[:N],
        negatives=torch.randint(SAMPLES, (N, K), generator=generator(seed + 1)),
    )


def call(loss: CRDLoss, b: SimpleNamespace) -> Tensor:
    return loss(b.student, b.teacher, b.indices, negatives=b.negatives)


class Loop:
    """The loss, its normalisers and its memories, one number after the other."""

    def __init__(self, loss: CRDLoss, noise: list[float]) -> None:
        self.weights = [
            (p.weight.detach().double().numpy(), p.bias.detach().double().numpy())
            for p in (loss.student_projection, loss.teacher_projection)
        ]
        self.memories = [m.double().numpy().copy() for m in (loss.student_memory, loss.teacher_memory)]
        self.temperature, self.momentum, self.noise = loss.temperature, loss.momentum, noise
        self.Z: list[float | None] = [None, None]

    def __call__(self, b: SimpleNamespace) -> float:
        embedded = []
        for x, (weight, bias) in zip((b.student, b.teacher), self.weights, strict=True):
            y = [weight @ row + bias for row in x.double().numpy()]
            embedded.append([row / math.sqrt(row @ row) for row in y])
        total = 0.0
        for side in (0, 1):  # the student against the teacher's memory, then the other way round
            memory = self.memories[1 - side]
            h = [
                [math.exp(embedded[side][i] @ memory[j] / self.temperature) / self.noise[j] for j in row]
                for i, row in enumerate([[int(p), *map(int, q)] for p, q in zip(b.indices, b.negatives, strict=True)])
            ]
            if self.Z[side] is None:
                self.Z[side] = float(np.mean(h))
            k = len(h[0]) - 1
            for row in h:
                odds = [value / self.Z[side] / k for value in row]
                total -= math.log(odds[0] / (odds[0] + 1)) + sum(math.log(1 / (o + 1)) for o in odds[1:])
        for memory, rows in zip(self.memories, embedded, strict=True):
            for i, row in zip(b.indices.tolist(), rows, strict=True):
                moved = self.momentum * memory[i] + (1 - self.momentum) * row
                memory[i] = moved / math.sqrt(moved @ moved)
        return total / len(b.student)


WEIGHTS = {"uniform": None, "weighted": torch.arange(1.0, SAMPLES + 1)}


@pytest.mark.parametrize("sample_weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize(("temperature", "momentum"), [(0.07, 0.5), (1.0, 0.9), (0.2, 0.0)])
def test_loss_normalisers_and_memories_agree_with_loops(
    sample_weight: Tensor | None, temperature: float, momentum: float
) -> None:
    loss = make(temperature=temperature, momentum=momentum, sample_weight=sample_weight)
    q = (torch.ones(SAMPLES) if sample_weight is None else sample_weight).double()
    truth = Loop(loss, (q / q.sum()).tolist())
    for seed in range(3):  # the second batch meets memories that moved and normalisers that did not
        # q is stored as float32 logarithms.
        assert call(loss, batch(seed)).item() == pytest.approx(truth(batch(seed)), rel=1e-6)
        torch.testing.assert_close(loss.student_memory, torch.from_numpy(truth.memories[0]))
        torch.testing.assert_close(loss.teacher_memory, torch.from_numpy(truth.memories[1]))
        assert loss.log_normalizer.exp().tolist() == pytest.approx(truth.Z, rel=1e-6)


def test_agrees_with_torchdistill_without_its_eps() -> None:
    loss = make()
    peer = TorchdistillCRDLoss("s", "empty", "t", WIDTH, SAMPLES, K, SAMPLES, 0.07, 0.5, eps=0.0).double()
    peer.prob = peer.probs
    peer.memory_v1.copy_(loss.student_memory)
    peer.memory_v2.copy_(loss.teacher_memory)

    def embed(projection: torch.nn.Linear, x: Tensor) -> dict[str, Tensor]:
        return {"output": torch.nn.functional.normalize(projection(x))}

    for seed in range(3):
        b = batch(seed)
        extra = {"pos_idx": b.indices, "contrast_idx": torch.cat([b.indices[:, None], b.negatives], dim=1)}
        theirs = peer(
            {"s": embed(loss.student_projection, b.student), "empty": {"input": extra}},
            {"t": embed(loss.teacher_projection, b.teacher)},
        )
        parameters = list(loss.parameters())
        their_gradients = torch.autograd.grad(theirs, parameters)
        ours = call(loss, b)
        # Both keep some numbers in float32: ours log q, theirs the temperature.
        torch.testing.assert_close(ours, theirs.squeeze(), rtol=1e-6, atol=0)
        for mine, other in zip(torch.autograd.grad(ours, parameters), their_gradients, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.student_memory, peer.memory_v1)
        torch.testing.assert_close(loss.teacher_memory, peer.memory_v2)


def test_memories_that_tell_nothing_give_the_loss_of_guessing() -> None:
    """All similarities equal: every h is 1 / (1 + K) whatever the temperature."""
    loss = make()
    loss.student_memory.copy_(loss.student_memory[:1].expand(SAMPLES, WIDTH).clone())
    loss.teacher_memory.zero_()
    b = batch()
    b.student, b.teacher = b.student[:1].expand(N, -1), b.teacher[:1].expand(N, -1)
    truth = 2 * (math.log(1 + K) - K * math.log(K / (1 + K)))
    assert call(loss, b).item() == pytest.approx(truth, rel=1e-6)


def test_training_finds_the_teacher_feature_of_each_sample() -> None:
    loss = make(temperature=0.2, num_negatives=9)
    teacher = features(SAMPLES, TEACHER_DIM, seed=1)
    student = features(SAMPLES, STUDENT_DIM, seed=2)
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.02)
    negatives = torch.tensor([[j for j in range(SAMPLES) if j != i] for i in range(SAMPLES)])
    values = []
    for _ in range(150):
        value = loss(student, teacher, torch.arange(SAMPLES), negatives=negatives)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0]
    similarities = loss.student_memory @ loss.teacher_memory.mT
    # By chance it would be one; three student features through a linear layer do not tell all ten apart.
    assert (similarities.argmax(dim=1) == torch.arange(SAMPLES)).sum() >= 7


def test_memories_start_on_the_unit_sphere_and_stay_there() -> None:
    loss = make()
    for seed in range(3):
        for memory in (loss.student_memory, loss.teacher_memory):
            assert memory.norm(dim=1).tolist() == pytest.approx([1.0] * SAMPLES, abs=1e-6)
        call(loss, batch(seed))


def test_only_the_memories_of_the_batch_move() -> None:
    loss, b = make(), batch()
    before = loss.student_memory.clone(), loss.teacher_memory.clone()
    call(loss, b)
    for old, new in zip(before, (loss.student_memory, loss.teacher_memory), strict=True):
        moved = (old != new).any(dim=1)
        assert sorted(b.indices.tolist()) == moved.nonzero().squeeze(1).tolist()


def test_the_loss_reads_the_memories_as_they_were() -> None:
    """Value and gradient do not know what the batch has written."""
    first, second = make(), make(momentum=1.0)
    gradients = []
    for loss in (first, second):
        value = call(loss, batch())
        gradients.append((value.detach(), *torch.autograd.grad(value, list(loss.parameters()))))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_eval_mode_changes_no_buffer() -> None:
    loss = make().eval()
    before = copy.deepcopy(loss.state_dict())
    first, again = call(loss, batch()), call(loss, batch())
    assert first.isfinite() and torch.equal(first, again)
    for name, value in loss.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0, equal_nan=True)


def test_state_dict_round_trip_continues_the_same_run() -> None:
    loss, other = make(sample_weight=WEIGHTS["weighted"]), make(seed=1)
    call(loss, batch(0))
    other.load_state_dict(loss.state_dict())
    for seed in (1, 2):
        runs = []
        for module in (loss, other):
            torch.manual_seed(seed)
            runs.append(module(batch(seed).student, batch(seed).teacher, batch(seed).indices))
        assert torch.equal(*runs)
    assert all(torch.equal(a, b) for a, b in zip(loss.buffers(), other.buffers(), strict=True))


@pytest.mark.parametrize(
    "sample_weight", [*WEIGHTS.values(), torch.ones(SAMPLES, device="meta")], ids=[*WEIGHTS, "meta"]
)
def test_state_is_made_on_the_default_device(sample_weight: Tensor | None) -> None:
    """On 'meta', which stands for a GPU too: what is left elsewhere shows."""
    with torch.device("meta"):
        loss = CRDLoss(
            STUDENT_DIM, TEACHER_DIM, SAMPLES, num_negatives=K, feature_dim=WIDTH, sample_weight=sample_weight
        )
    assert {name for name, value in loss.state_dict().items() if not value.is_meta} == set()
    full = make(sample_weight=WEIGHTS["weighted"])
    loss.to(torch.float64).to_empty(device="cpu").load_state_dict(full.state_dict())
    assert torch.equal(call(loss, batch()), call(full, batch()))


def test_one_seed_gives_one_loss_and_another_another() -> None:
    def run(seed: int) -> float:
        loss, b = make(), batch()
        torch.manual_seed(seed)
        return loss(b.student, b.teacher, b.indices).item()

    assert run(0) == run(0) != run(1)


def test_features_and_projections_have_gradients_but_not_the_teachers_features() -> None:
    loss, b = make(), batch()
    b.student.requires_grad_()
    b.teacher.requires_grad_()
    call(loss, b).backward()
    assert b.student.grad.ne(0).any() and b.teacher.grad is None
    assert all(p.grad.ne(0).any() for p in loss.parameters()) and len(list(loss.parameters())) == 4


def test_gradient_agrees_with_differences() -> None:
    loss, b = make(), batch()
    call(loss, batch(1))
    loss.eval()  # a memory that moves between two evaluations is no function
    parameters = tuple(loss.parameters())
    assert torch.autograd.gradcheck(
        lambda student, *_: loss(student, b.teacher, b.indices, negatives=b.negatives),
        (b.student.requires_grad_(), *parameters),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("temperature", [0.01, 0.07, 100.0])
@pytest.mark.parametrize("case", ["zero row", "all zero", "large", "tiny", "coincident"])
def test_value_gradient_and_memories_are_finite(case: str, temperature: float, dtype: torch.dtype) -> None:
    change = {
        "zero row": lambda x: x.index_fill(0, torch.tensor([1]), 0.0),
        "all zero": torch.zeros_like,
        "large": lambda x: x.sign() * 1e4,
        "tiny": lambda x: x * 1e-30,
        "coincident": lambda x: x[:1].expand_as(x),
    }[case]
    loss, b = make(temperature=temperature, dtype=dtype), batch(dtype=dtype)
    for p in (loss.student_projection, loss.teacher_projection):
        torch.nn.init.zeros_(p.bias)  # so that a zero row is a zero embedding
    b.student, b.teacher = change(b.student).clone().requires_grad_(), change(b.teacher)
    value = call(loss, b)
    value.backward()
    assert value.isfinite() and b.student.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in loss.parameters())
    assert loss.student_memory.isfinite().all() and loss.log_normalizer.isfinite().all()
    if case == "all zero":
        assert b.student.grad.eq(0).all()


@pytest.mark.parametrize("rubbish", [math.nan, math.inf])
def test_a_row_of_nan_shows_in_the_loss_but_not_in_the_memory(rubbish: float) -> None:
    loss, b = make(), batch()
    before = loss.student_memory.clone()
    b.student[2] = rubbish
    assert call(loss, b).isnan()
    assert loss.student_memory.isfinite().all() and torch.equal(loss.student_memory[b.indices[2]], before[b.indices[2]])
    assert call(loss, batch(1)).isfinite()  # not in the normalisers either


def test_no_rows_give_zero_and_leave_the_normalisers_open() -> None:
    loss, b = make(), batch()
    empty = SimpleNamespace(**{name: value[:0] for name, value in vars(b).items()})
    assert call(loss, empty) == 0 and loss.log_normalizer.isnan().all()
    assert call(loss, b).isfinite() and loss.log_normalizer.isfinite().all()


def test_maps_are_flattened() -> None:
    b = batch()
    flat = call(make(), b)
    b.student, b.teacher = b.student.view(N, STUDENT_DIM, 1, 1), b.teacher.view(N, 1, TEACHER_DIM)
    assert torch.equal(call(make(), b), flat)


@pytest.mark.parametrize("module", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_half_types_give_a_float32_loss_near_the_float64_one(inputs: torch.dtype, module: torch.dtype) -> None:
    loss, b = make(dtype=module), batch(dtype=inputs)
    truth = call(make(), batch())
    value = call(loss, b)
    assert value.dtype == torch.float32
    # Similarities over tau = 0.07 are up to 14, with the relative rounding of the narrowest type on the way.
    narrowest = max(torch.finfo(inputs).eps, torch.finfo(module).eps)
    assert value.item() == pytest.approx(truth.item(), rel=14 * narrowest)


def test_autocast_narrows_the_projections_alone() -> None:
    """Small integers go through the projections exactly in bfloat16 too; nothing after them may be rounded to it."""
    loss, b = make(dtype=torch.float32).eval(), batch(dtype=torch.float32)
    with torch.no_grad():
        for p in loss.parameters():
            p.copy_((10 * p).round())
    b.student, b.teacher = (3 * b.student).round(), (3 * b.teacher).round()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = call(loss, b)
    torch.testing.assert_close(value, call(loss, b))


def test_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    eager, traced = make(dtype=torch.float32), make(dtype=torch.float32)
    compiled = torch.compile(traced, backend="aot_eager", fullgraph=True)
    for seed in range(2):
        torch.testing.assert_close(call(compiled, batch(seed, torch.float32)), call(eager, batch(seed, torch.float32)))
    for a, b in zip(eager.buffers(), traced.buffers(), strict=True):
        torch.testing.assert_close(b, a)


STEPS = 3


def big_batch(step: int) -> SimpleNamespace:
    """2 N samples for two ranks, or for one process."""
    b = batch(step)
    b.student, b.teacher = features(2 * N, STUDENT_DIM, seed=step), features(2 * N, TEACHER_DIM, seed=step + 50)
    b.indices = torch.randperm(SAMPLES, generator=generator(step))[: 2 * N]
    b.negatives = torch.randint(SAMPLES, (2 * N, K), generator=generator(step + 1))
    return b


def run_rank(rank: int, directory: str, broadcast_buffers: bool) -> None:
    """Half of each batch, in a process of its own; leaves its losses, its gradients and its buffers in a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    loss = make(seed=rank)
    parallel = torch.nn.parallel.DistributedDataParallel(loss, broadcast_buffers=broadcast_buffers)
    values = []
    for step in range(STEPS):
        b = SimpleNamespace(**{name: value[rank * N :][:N] for name, value in vars(big_batch(step)).items()})
        loss.zero_grad()
        value = call(parallel, b)
        value.backward()
        values.append(value.detach())
    gradients = [p.grad for p in loss.parameters()]
    torch.save((values, gradients, dict(loss.named_buffers())), f"{directory}/{rank}.pt")
    torch.distributed.destroy_process_group()
    # Gloo's threads live on, and one that still drops its last tensor while the interpreter ends aborts the process.
    os._exit(0)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without torch.distributed")
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_ranks_train_as_one_process_on_both_batches(tmp_path, broadcast_buffers: bool) -> None:
    torch.multiprocessing.spawn(run_rank, (str(tmp_path), broadcast_buffers), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    single = make(seed=0)
    for step in range(STEPS):
        single.zero_grad()
        value = call(single, big_batch(step))
        value.backward()
        torch.testing.assert_close((ranks[0][0][step] + ranks[1][0][step]) / 2, value.detach())
    for _, gradients, buffers in ranks:
        for theirs, p in zip(gradients, single.parameters(), strict=True):
            torch.testing.assert_close(theirs, p.grad)
        for name, expected in single.named_buffers():
            torch.testing.assert_close(buffers[name], expected, msg=lambda m, name=name: f"{name}: {m}")


def test_there_is_one_class() -> None:
    assert kdfast.CRDLoss is kdfast.reference.CRDLoss is kdfast.losses.CRDLoss is CRDLoss


# AliasSampler


@pytest.mark.parametrize(
    "weights",
    [
        pytest.param([1.0] * 7, id="uniform"),
        pytest.param([1.0, 2.0, 3.0, 4.0], id="rising"),
        pytest.param([1000.0, 1.0, 1.0], id="one rich"),
        pytest.param([1e-6, 1.0, 5.0, 0.3, 2.0], id="one poor"),
        pytest.param([3.0], id="one sample"),
        pytest.param((torch.rand(501, generator=generator(0)) ** 4 + 1e-3).tolist(), id="many"),
    ],
)
def test_alias_tables_hold_the_distribution(weights: list[float]) -> None:
    """Slot i keeps its threshold and gives the rest to its alias: the sums are the probabilities, with no sampling."""
    sampler = AliasSampler(torch.tensor(weights))
    n = len(weights)
    probabilities = np.zeros(n)
    for slot, (threshold, alias) in enumerate(zip(sampler.threshold.tolist(), sampler.alias.tolist(), strict=True)):
        assert 0 <= threshold <= 1 and 0 <= alias < n
        probabilities[slot] += threshold / n
        probabilities[alias] += (1 - threshold) / n
    # Thresholds are float32.
    np.testing.assert_allclose(probabilities, np.array(weights) / sum(weights), rtol=1e-5, atol=1e-7)


def test_alias_sampler_draws_what_its_tables_say() -> None:
    weights, draws = torch.tensor([1.0, 2.0, 3.0, 14.0]), 40_000
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sample = AliasSampler(weights)(draws // 4, 4)
    assert sample.shape == (draws // 4, 4) and sample.dtype == torch.int64
    expected = weights / weights.sum() * draws
    chi_square = ((torch.bincount(sample.flatten(), minlength=4) - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # the 99.9th percentile for 3 degrees of freedom
