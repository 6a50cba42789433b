"""The cluster kernel of kl without a GPU: its own source on threads of the CPU, which meet at its barriers."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdfast import reference
from kdfast.ops.autograd import REDUCTIONS
from kdfast.ops.kl import KINDS
from support import LAYOUTS, assert_within_rule

ROOT = Path(__file__).resolve().parents[2]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
every_direction = pytest.mark.parametrize("direction", ["forward", "reverse"])

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulation") / "kl_cluster.so"
    include = [f"-I{ROOT / 'csrc'}", f"-I{Path(torch.__file__).parent / 'include'}"]
    flags = ["-std=c++20", "-O1", "-fno-strict-aliasing", "-shared", "-fPIC", "-pthread", "-w"]
    source = str(Path(__file__).with_name("cuda_emulation.cpp"))
    subprocess.run(["c++", *flags, *include, source, "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).kl_cluster_on_cpu
    function.restype = ctypes.c_int64

    def call(*arguments: object) -> None:
        assert function(*arguments) == 0, "rows were read that do not count or do not exist"

    return call


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def kl(
    emulated,
    student: Tensor,
    teacher: Tensor,
    *,
    direction: str = "forward",
    temperature: float = 2.0,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    blocks: int = 4,
    clusters: int = 2,
    needs_grad: bool = True,
    inplace: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Loss of each row, and the gradient of their sum."""
    rows, classes = student.shape
    grad = (student if inplace else torch.empty_like(student)) if needs_grad else None
    loss = torch.full((rows,), math.nan)
    numbers = [1 / (math.log(2) * temperature), temperature**2, temperature, 1.0]
    mask = None if mask is None else mask.view(torch.uint8)
    emulated(
        *map(pointer, (student, teacher, grad, loss, mask, row_weight, None)),
        ctypes.c_int64(student.stride(0)),
        ctypes.c_int64(teacher.stride(0)),
        ctypes.c_int32(classes),
        *map(ctypes.c_float, numbers),
        ctypes.c_int64(rows),
        blocks,
        clusters,
        TYPES[student.dtype],
        int(direction == "reverse"),
    )
    return loss, grad


def by_reference(
    student: Tensor, teacher: Tensor, *, temperature: float = 2.0, **options: object
) -> tuple[Tensor, Tensor]:
    leaf = student.detach().clone().requires_grad_()
    loss = reference.kl_divergence(leaf, teacher, temperature, reduction="none", **options)
    loss.sum().backward()
    return loss.detach(), leaf.grad


def check(emulated, student: Tensor, teacher: Tensor, *, blocks: int = 4, clusters: int = 2, **options: object) -> None:
    fast = kl(emulated, student, teacher, blocks=blocks, clusters=clusters, **options)
    truth = by_reference(student.double(), teacher.double(), **options)
    plain = by_reference(student, teacher, **options)
    of = partial(assert_within_rule, dtype=student.dtype, length=student.numel())
    of("value", fast[0], plain[0], truth[0], floor=4.0)
    of("gradient", fast[1], plain[1], truth[1], stored=student.dtype)


def pair(rows: int, classes: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(classes)
    student, teacher = (torch.randn(rows, classes, generator=generator) * scale for _ in range(2))
    return student.to(dtype), teacher.to(dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@every_direction
def test_it_agrees_with_the_reference(emulated, direction, dtype):
    # Per block of 64 threads: less than one copy a thread, an uneven number, several in each of the four groups.
    for classes in (64, 1000, 12000):
        check(emulated, *pair(2, classes, dtype), direction=direction)


@pytest.mark.parametrize("blocks", [1, 2, 3, 8])
def test_any_number_of_blocks_with_a_last_one_that_has_less_or_nothing(emulated, blocks):
    for classes in (8, 40, 2000):
        check(emulated, *pair(1, classes), blocks=blocks, clusters=1)


COUNTING = {
    "all": None,
    "in between": [1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1],
    "not the first nor the last": [0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 0],
    "one": [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0],
    "none": [0] * 11,
}


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("clusters", [1, 3, 11])
@pytest.mark.parametrize("counting", COUNTING)
def test_a_cluster_takes_row_after_row(emulated, counting, clusters, needs_grad):
    # Up to two copies a thread in each of the four groups. Each row has maxima of another size.
    student, teacher = pair(11, 3600, scale=1.0)
    student, teacher = (x * torch.arange(1, 12)[:, None] for x in (student, teacher))
    mask = None if COUNTING[counting] is None else torch.tensor(COUNTING[counting], dtype=torch.bool)
    counts = torch.ones(11, dtype=torch.bool) if mask is None else mask
    expected = [kl(emulated, student[[i]], teacher[[i]], blocks=2, clusters=1) for i in range(11)]
    shared = {"blocks": 2, "clusters": clusters, "mask": mask, "needs_grad": needs_grad}
    for inplace in (False, True) if needs_grad else (False,):
        loss, grad = kl(emulated, student.clone(), teacher, inplace=inplace, **shared)
        assert torch.equal(loss, torch.cat([row for row, _ in expected]) * counts)
        assert grad is None or torch.equal(grad, torch.cat([row for _, row in expected]) * counts[:, None])


def test_a_teacher_of_one_row_for_all(emulated):
    student, teacher = pair(5, 400)
    expected = kl(emulated, student, teacher[:1].repeat(5, 1))
    shared = kl(emulated, student, teacher[:1].expand(5, -1))
    assert all(torch.equal(*both) for both in zip(shared, expected, strict=True))


@every_direction
def test_logits_that_grow_along_the_row(emulated, direction):
    """Sums keep the maxima of earlier logits for a while: by little, by much, from -inf, down again."""
    steps = torch.tensor([0.0, 3.0, 7.0, 7.5, 40.0, 39.0, 300.0, -math.inf]).repeat_interleave(500)
    student, teacher = pair(3, 4000)
    student[0], teacher[0] = student[0] + steps, teacher[0] + steps
    student[1], teacher[1] = student[1] + steps.flip(0), teacher[1] + steps.flip(0)
    steps[-500:] = 0
    (teacher if direction == "reverse" else student)[2] += steps
    check(emulated, student, teacher, direction=direction, blocks=1, clusters=1)


@every_direction
def test_classes_without_mass_add_nothing(emulated, direction):
    student, teacher = pair(3, 800)
    student[0, :300], teacher[0, :300] = -math.inf, -math.inf  # more than a block's slice
    student[1, 5], teacher[1, 5] = -math.inf, -math.inf
    teacher[2, 300:] = student[2, 300:] if direction == "reverse" else -math.inf
    check(emulated, student, teacher, direction=direction)


@every_direction
def test_extreme_logits_and_a_low_temperature(emulated, direction):
    student, teacher = pair(2, 400, scale=1e4)
    loss, grad = kl(emulated, student, teacher, direction=direction, temperature=0.05)
    truth, _ = by_reference(student.double(), teacher.double(), direction=direction, temperature=0.05)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    assert grad.isfinite().all()


def test_a_nan_stays_in_its_row(emulated):
    student, teacher = pair(3, 400)
    teacher[1, 399] = math.nan
    loss, grad = kl(emulated, student, teacher)
    assert loss.isnan().tolist() == [False, True, False]
    assert grad[1].isnan().any() and not grad[[0, 2]].isnan().any()


def test_rows_that_do_not_count_are_not_read_and_weights_count(emulated):
    student, teacher = pair(4, 400)
    mask = torch.tensor([True, False, True, True])
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0], dtype=torch.float64)
    expected = kl(emulated, student, teacher)
    student[1], teacher[1] = math.nan, math.nan
    loss, grad = kl(emulated, student, teacher, mask=mask, row_weight=weight)
    factor = weight.float() * mask
    torch.testing.assert_close(loss, expected[0] * factor)
    torch.testing.assert_close(grad, expected[1] * factor[:, None])
    assert (grad[1] == 0).all()


def test_equal_rows_are_exactly_0_and_runs_repeat_their_bits(emulated):
    student, teacher = pair(2, 4000, torch.bfloat16)
    loss, grad = kl(emulated, student, student.clone())
    assert (loss == 0).all() and (grad == 0).all()
    first, second = (kl(emulated, student, teacher) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_rows_may_be_apart_and_the_gradient_may_overwrite_the_student(emulated):
    student, teacher = pair(3, 400)
    apart = torch.full((3, 512), math.nan)
    apart[:, :400] = teacher
    expected = kl(emulated, student, teacher)
    assert all(torch.equal(*both) for both in zip(kl(emulated, student, apart[:, :400]), expected, strict=True))
    alone, none = kl(emulated, student, teacher, needs_grad=False)
    assert none is None and torch.equal(alone, expected[0])
    loss, grad = kl(emulated, student, teacher, inplace=True)
    assert grad is student and torch.equal(grad, expected[1]) and torch.equal(loss, expected[0])


SCHEMA = (
    "kl_cluster(Tensor student, Tensor teacher, Tensor(a!)? grad, Tensor(b!) losses, Tensor? mask, Tensor? row_weight, "
    "Tensor? count_factor, float temperature, bool reverse, float scale, float weight) -> ()"
)


@pytest.fixture
def launcher(emulated, monkeypatch):
    """kdfast/ops/kl/cluster.py over the emulated kernel, as the extension of a CUDA build registers it."""
    pytest.importorskip("triton")
    from kdfast.ops.kl import cluster

    assert SCHEMA.replace(" ", "") in re.sub(r'"\s*"|\s', "", (ROOT / "csrc" / "cuda" / "kl.cu").read_text())
    if hasattr(torch.ops.kdfast, "kl_cluster"):
        pytest.skip("this extension has the kernel itself")

    def run(student, teacher, grad, losses, mask, row_weight, count_factor, temperature, reverse, scale, weight):
        for x in (student, teacher, grad):
            assert x is None or (
                x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
            )
        numbers = map(ctypes.c_float, (1 / (math.log(2) * temperature), scale, scale / temperature, weight))
        strides = [ctypes.c_int64(x.stride(0)) for x in (student, teacher)]
        pointers = map(pointer, (student, teacher, grad, losses, mask, row_weight, count_factor))
        emulated(
            *pointers,
            *strides,
            ctypes.c_int32(student.shape[1]),
            *numbers,
            ctypes.c_int64(len(student)),
            4,
            2,
            TYPES[student.dtype],
            int(reverse),
        )

    library = torch.library.Library("kdfast", "FRAGMENT")
    library.define(SCHEMA)
    library.impl("kl_cluster", run, "CPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    yield cluster
    library._destroy()
    torch.ops.kdfast.__dict__.pop("kl_cluster", None)


def launched(cluster, student: Tensor, teacher: Tensor, direction: str, reduction: str, **changed: object):
    arguments = {
        "labels": None, "mask": None, "row_weight": None, "temperature": 2.0, "kind": KINDS[direction], "scale": 4.0,
        "alpha": 1.0, "beta": 0.5, "ce_weight": 0.0, "label_smoothing": 0.0, "ignore_index": -100,
        "reduction": REDUCTIONS[reduction],
    }  # fmt: skip
    return cluster.kl(student, teacher, **{**arguments, **changed}, needs_grad=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@every_direction
def test_the_launcher_takes_any_layout_and_reduction(launcher, direction, reduction, layout):
    student, teacher = (x.view(2, 2, 160) for x in pair(4, 160))
    weight = torch.tensor([[0.5, 1.0], [2.0, 3.0]], dtype=torch.float64)
    loss, grad = launched(
        launcher, LAYOUTS[layout](student), LAYOUTS[layout](teacher), direction, reduction, row_weight=weight
    )
    leaf = student.clone().requires_grad_()
    options = {"direction": direction, "reduction": reduction, "row_weight": weight}
    expected = reference.kl_divergence(leaf, teacher, 2.0, **options)
    expected.sum().backward()
    torch.testing.assert_close(loss, expected.detach(), check_dtype=False)
    torch.testing.assert_close(grad, leaf.grad)
    assert launched(launcher, student[:0], teacher[:0], direction, reduction)[1].shape == (0, 2, 160)


def test_the_launcher_refuses_what_the_kernel_cannot(launcher, monkeypatch):
    student, teacher = pair(2, 160)
    cannot = partial(pytest.raises, RuntimeError)
    with cannot(match="forward and reverse KL, without labels"):
        launched(launcher, student, teacher, "js", "sum")
    with cannot(match="forward and reverse KL, without labels"):
        launched(launcher, student, teacher, "forward", "sum", ce_weight=0.1)
    with cannot(match="16 bytes, these have 159 classes"):
        launched(launcher, student[:, :-1], teacher[:, :-1], "forward", "sum")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with cannot(match=r"compute capability 9\.0"):
        launched(launcher, student, teacher, "forward", "sum")


def test_it_takes_from_triton_what_it_was_measured_to_be_faster_at(monkeypatch):
    pytest.importorskip("triton")
    from kdfast import backends
    from kdfast.ops.kl import cluster

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "can_run", lambda *arguments: (True, ""))
    long = torch.empty(2, 128256, dtype=torch.bfloat16)

    def wins(student: Tensor, teacher: Tensor = long, *, labels=None, kind: str = "forward", ce_weight: float = 0.0):
        faster = cluster.is_faster(student, teacher, labels, KINDS[kind], ce_weight)
        return backends.prefers_cuda("kl", student, faster)

    assert wins(long) and wins(long, kind="reverse") and wins(long.float()) and wins(long.view(2, 1, -1))
    assert wins(long, teacher=long[:1].expand(2, -1))
    assert wins(long[:, :32000]) and not wins(long[:, :31992]) and not wins(long[:, :32000].float())
    assert not wins(torch.empty(2, 262144))  # does not fit
    assert not wins(long[:, :-1]) and not wins(long.T.contiguous().T) and not wins(long, teacher=long[:, 1:])
    assert not wins(long, kind="js") and not wins(long, ce_weight=0.1) and not wins(long, labels=torch.zeros(2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert not wins(long)  # not measured there
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "can_run", lambda *arguments: (False, "not built"))
    assert not wins(long)
