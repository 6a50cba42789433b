"""What is particular to the rkd kernels: data that cancels, instruction sets, threads, apexes, masks, the backward."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kdfast
from kdfast import backends
from kdfast.ops import rkd
from support import DTYPES, HALF, LAYOUTS, assert_parity

pytestmark = pytest.mark.skipif(backends.extension_problem() is not None, reason="the extension is not built")

FUNCTIONS = ("rkd_distance_loss", "rkd_angle_loss", "rkd_loss")
# Vectors are up to 16 floats, tiles 16 rows by 64 or 128 columns, apexes go in groups of 16: below, at and above each.
ROWS = (1, 2, 3, 4, 15, 16, 17, 33, 64, 65, 129, 145)
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(n: int, d: int = 7, seed: int = 0) -> dict[str, Tensor]:
    return {"student": features(n, d, seed=seed), "teacher": features(n, d + 2, seed=seed + 1)}


def mask_of(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) < 0.7


def weight_of(n: int, seed: int = 0) -> Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2


@each_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_every_instruction_set_keeps_the_rule(level, dtype, name):
    """Rows around vectors and tiles, in every layout, with mask and weights or without."""
    with backends.use_cpu_level(level):
        for seed, n in enumerate(ROWS):
            options = {}
            if seed % 2:
                options["mask"] = mask_of(n, seed)
            if seed % 3 == 1:
                options["row_weight"] = weight_of(n, seed)
            layout = list(LAYOUTS)[seed % len(LAYOUTS)]
            assert_parity(name, pair(n, 1 + 5 * seed, seed), options, dtype, layout=layout, seed=seed)


@pytest.mark.parametrize(("name", "power"), [("rkd_distance_loss", 2), ("rkd_angle_loss", 3)])
def test_the_sum_is_the_mean_times_the_number_of_pairs_or_triplets(name, power):
    n = 21
    for options in ({}, {"mask": mask_of(n)}, {"row_weight": weight_of(n)}):
        count = (int(options["mask"].sum()) if "mask" in options else n) ** power
        mean, total = (
            value_and_gradient(getattr(kdfast, name), *pair(n).values(), reduction=reduction, **options)
            for reduction in ("mean", "sum")
        )
        torch.testing.assert_close(mean[0] * count, total[0], rtol=1e-13, atol=0)
        torch.testing.assert_close(mean[1] * count, total[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@each_function
def test_the_reference_reduces_alike(name, reduction):
    n = 13
    options = {"mask": mask_of(n), "row_weight": weight_of(n), "reduction": reduction}
    value, truth = (getattr(module, name)(**pair(n), **options) for module in (kdfast, kdfast.reference))
    torch.testing.assert_close(value, truth, rtol=1e-13, atol=0)


def two_scales(n: int, d: int) -> Tensor:
    """Half the rows in one cluster, a quarter in another, 1000 times nearer to each other than the clusters are."""
    x = features(n, d, seed=3)
    x[: n // 2] *= 1e-3
    x[n // 2 : 3 * n // 4] = 1 + 1e-3 * x[n // 2 : 3 * n // 4]
    return x


# Data on which squared distances from inner products, or cosines from rounded squared distances, have no digits left.
HARD = {
    "a cluster of radius 1e-2 at 1e3": 1e3 + 1e-2 * features(48, 16),
    "a cluster of radius 1e-3 at 100": 100 + 1e-3 * features(48, 16),
    "two scales": two_scales(48, 16),
    "scales from 1e-3 to 1": features(48, 16) * torch.logspace(-3, 0, 48, dtype=torch.float64)[:, None],
    "duplicates": features(48, 16)[torch.arange(48) % 16],
    "duplicates far away": 1e3 + 1e-2 * features(48, 16)[torch.arange(48) % 16],
    "in the plane": features(48, 2),
    "on a line": features(48, 1),
    "one row": features(1, 5),
    "two rows": features(2, 5),
    "three rows": features(3, 5),
}
# Largest errors against float64, relative to the value and to the largest gradient: a few roundings of float32. Cosines
# in float64 have no wider type to be made in: there eps times the ratio of distances, 1e4 here, is what is kept.
MAX_ERROR = {torch.float32: (1e-6, 2e-6), torch.float64: (1e-14, 1e-12)}


def value_and_gradient(function, student: Tensor, teacher: Tensor, **options) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    value = function(leaf, teacher, **options)
    value.backward()
    return value.detach().double(), leaf.grad.double()


@pytest.mark.parametrize("dtype", MAX_ERROR, ids=str)
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_hard_data_is_as_accurate_as_any(level, name, case, dtype):
    student = HARD[case].to(dtype)
    teacher = features(len(student), 24, seed=1).to(dtype)
    truth = value_and_gradient(getattr(kdfast.reference, name), student.double(), teacher.double())
    with backends.use_cpu_level(level):
        fast = value_and_gradient(getattr(kdfast, name), student, teacher)
        swapped = value_and_gradient(getattr(kdfast, name), teacher, student)[0]  # hard teachers are as hard
    of_value, of_gradient = MAX_ERROR[dtype]
    assert abs(fast[0] - truth[0]) <= of_value * max(abs(truth[0]), 1e-6)
    expected = getattr(kdfast.reference, name)(teacher.double(), student.double())
    assert abs(swapped - expected) <= of_value * max(abs(expected), 1e-6)
    # On a line and between two rows directions do not turn: the gradient is 0, made of terms of 1 / distance.
    nearest = torch.pdist(student.double())
    nearest = float(nearest[nearest > 0].min()) if len(student) > 1 else 1.0
    flat = case in ("on a line", "two rows")
    scale = max(float(truth[1].abs().max()), 50 * 25 / nearest**2 / len(student) if flat else 1e-6)
    assert (fast[1] - truth[1]).abs().max() <= of_gradient * scale


def test_rows_far_apart_need_the_wide_cosines():
    """The data is as hard as it claims: cosines from float32 squared distances would miss the bound above by far."""
    x = HARD["two scales"].float()
    a = torch.cdist(x.double(), x.double()).square().float() / 2  # correctly rounded
    r = torch.where(a > 0, (2 * a).rsqrt(), 0)
    cosines = (a.unsqueeze(2) + a.unsqueeze(1) - a) * r.unsqueeze(2) * r.unsqueeze(1)
    exact = kdfast.reference.relations.triplet_cosines(x.double())
    assert (cosines.double() - exact).abs().max() > 1e-5


@each_function
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 9),
    exponents=st.tuples(st.integers(-3, 1), st.integers(-3, 3)),
    twins=st.booleans(),
    seed=st.integers(0, 2**31 - 1),
)
def test_any_scale_and_offset(name, n, d, exponents, twins, seed):
    """Clusters at random scales and offsets, with coincident rows or without, against the same rows in float64."""
    generator = torch.Generator().manual_seed(seed)
    spread = 10.0 ** (torch.rand(n, 1, generator=generator, dtype=torch.float64) * exponents[0])
    offset = 10.0 ** exponents[1] * torch.randint(0, 3, (n, 1), generator=generator)
    student = torch.randn(n, d + 1, generator=generator, dtype=torch.float64) * spread + offset
    if twins:
        student = student[torch.randint(n, (n,), generator=generator)]
    student, teacher = student.float(), torch.randn(n, d + 1, generator=generator)
    truth = value_and_gradient(getattr(kdfast.reference, name), student.double(), teacher.double())
    plain = value_and_gradient(getattr(kdfast.reference, name), student, teacher)
    fast = value_and_gradient(getattr(kdfast, name), student, teacher)
    # A row's gradient is the mean of N^2 terms of up to 1 / distance, which may cancel to exactly 0.
    apart = torch.pdist(student.double())
    terms = 1 / (n * float(apart[apart > 0].min())) if bool((apart > 0).any()) else 0.0
    for a, b, c, size in zip(fast, plain, truth, (0.0, terms), strict=True):
        own = (b - c).abs().max()
        rounding = torch.finfo(torch.float32).eps * size
        assert (a - c).abs().max() <= 4 * own + 1e-5 * max(float(c.abs().max()), 1e-3) + rounding


def test_identical_sides_lose_exactly_nothing():
    for name in FUNCTIONS:
        for x in (features(37, 9), two_scales(32, 5)):
            for dtype in (torch.float32, torch.float64):
                value, gradient = value_and_gradient(getattr(kdfast, name), x.to(dtype), x.to(dtype))
                assert value == 0 and (gradient == 0).all()


@pytest.mark.parametrize("x", [features(33, 20), two_scales(33, 20)], ids=["one scale", "two scales"])
def test_same_bits_on_every_run_and_nearly_so_with_other_threads(x):
    student, teacher = x.float(), features(33, 20, seed=9).float()
    threads, results = torch.get_num_threads(), {}
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results[count] = [value_and_gradient(kdfast.rkd_loss, student, teacher) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for runs in results.values():
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        torch.testing.assert_close(runs[0][0], results[1][0][0], rtol=1e-6, atol=0)
        largest = results[1][0][1].abs().max()
        assert (runs[0][1] - results[1][0][1]).abs().max() <= 1e-6 * largest


@each_function
def test_masked_rows_are_as_if_they_were_not_there(name):
    inputs = pair(40)
    mask = mask_of(40)
    kept = value_and_gradient(getattr(kdfast, name), *(x[mask] for x in inputs.values()))
    for x in inputs.values():
        x[~mask] = math.nan
    masked = value_and_gradient(getattr(kdfast, name), *inputs.values(), mask=mask)
    assert torch.equal(masked[0], kept[0])
    assert torch.equal(masked[1][mask], kept[1])
    assert (masked[1][~mask] == 0).all()


@each_function
def test_no_row_left_is_zero(name):
    inputs = {k: v.float() for k, v in pair(4).items()}
    for options in ({"mask": torch.zeros(4, dtype=torch.bool)}, {}):
        rows = 4 if options else 0
        for reduction in ("mean", "sum"):
            value, gradient = value_and_gradient(
                getattr(kdfast, name), *(x[:rows] for x in inputs.values()), reduction=reduction, **options
            )
            assert value == 0 and (gradient == 0).all() and gradient.shape == (rows, 7)


@each_function
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("level", backends.cpu_levels())
def test_a_nan_is_seen_by_every_row(level, side, name):
    """Every pair and triplet of a batch counts: there is no row a NaN could stay in."""
    inputs = {k: v.float() for k, v in pair(20).items()}
    inputs[side][3, 2] = math.nan
    with backends.use_cpu_level(level):
        value, gradient = value_and_gradient(getattr(kdfast, name), *inputs.values())
    assert value.isnan() and gradient.isnan().all()


@each_function
def test_a_width_of_zero_has_all_rows_in_one_place(name):
    value, gradient = value_and_gradient(getattr(kdfast, name), torch.zeros(5, 0), torch.zeros(5, 0))
    assert value == 0 and gradient.shape == (5, 0)


@pytest.mark.parametrize("name", ["rkd_angle_loss", "rkd_loss"])
@pytest.mark.parametrize("masked", [False, True])
def test_sampled_apexes_are_those_of_the_reference(name, masked):
    n = 30
    options = {"triplets": 11, **({"mask": mask_of(n), "row_weight": weight_of(n)} if masked else {})}
    for reduction in ("mean", "sum"):
        results = [
            value_and_gradient(
                getattr(module, name),
                *pair(n).values(),
                generator=torch.Generator().manual_seed(5),
                reduction=reduction,
                **options,
            )
            for module in (kdfast, kdfast.reference)
        ]
        torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "function", [kdfast.rkd_angle_loss, kdfast.reference.rkd_angle_loss], ids=["fast", "reference"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_sampled_apexes_are_unbiased(function, reduction):
    """Over all draws of 1 of 12 apexes the mean is that of all triplets; so it is for random draws of 5, nearly."""
    n = 12
    inputs = pair(n, 3)
    everything = function(**inputs, reduction=reduction)
    ones = {}
    for seed in range(200):
        value = function(**inputs, triplets=1, generator=torch.Generator().manual_seed(seed), reduction=reduction)
        ones[round(value.item(), 12)] = value
    assert len(ones) == n  # every apex is drawn, and each gives its own value
    torch.testing.assert_close(sum(ones.values()) / n, everything, rtol=1e-9, atol=0)
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([function(**inputs, triplets=5, generator=generator, reduction=reduction) for _ in range(400)])
    error = draws.std() / math.sqrt(len(draws))
    assert abs(draws.mean() - everything) < 4 * error


def test_masked_rows_are_drawn_only_if_too_few_others_are_left():
    n, mask = 20, torch.arange(20) < 6
    kept = pair(n)
    all_of_them = kdfast.rkd_angle_loss(**{k: v[mask] for k, v in kept.items()})
    drawn = kdfast.rkd_angle_loss(**kept, mask=mask, triplets=9)  # 6 apexes count
    torch.testing.assert_close(drawn, all_of_them, rtol=1e-12, atol=0)


def test_one_call_makes_both_terms():
    inputs = pair(50)
    both = value_and_gradient(kdfast.rkd_loss, *inputs.values())
    distance, angle = (
        value_and_gradient(f, *inputs.values()) for f in (kdfast.rkd_distance_loss, kdfast.rkd_angle_loss)
    )
    for joined, d, a in zip(both, distance, angle, strict=True):
        torch.testing.assert_close(joined, 25 * d + 50 * a, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_types_accumulate_in_float32(dtype):
    inputs = {k: v.to(dtype) for k, v in pair(60, 40).items()}
    value, gradient = value_and_gradient(kdfast.rkd_loss, *inputs.values())
    wide, wide_gradient = value_and_gradient(kdfast.rkd_loss, *(x.float() for x in inputs.values()))
    assert torch.equal(value, wide)
    assert torch.equal(gradient, wide_gradient.to(dtype).double())


def test_a_loss_scale_reaches_float16_gradients_before_they_are_rounded():
    inputs = {k: v.half() * 30 for k, v in pair(200, 40).items()}
    student = inputs["student"].requires_grad_()
    (kdfast.rkd_distance_loss(student, inputs["teacher"]) * 2.0**16).backward()
    assert (student.grad != 0).float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_norms_below_the_limit_are_as_normalize_has_them(dtype):
    """Differences shorter than 1e-12 are divided by 1e-12: cosines are small, also those of a row with itself."""
    inputs = {"student": features(6, 3) * 3e-13, "teacher": features(6, 4, seed=1)}
    lengths = torch.pdist(inputs["student"])
    assert (lengths < 1e-12).any() and (lengths > 1e-12).any()
    truth = value_and_gradient(kdfast.reference.rkd_angle_loss, *inputs.values())
    fast = value_and_gradient(kdfast.rkd_angle_loss, *(x.to(dtype) for x in inputs.values()))
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(fast[0], truth[0], rtol=20 * eps, atol=0)
    torch.testing.assert_close(fast[1], truth[1], rtol=0, atol=100 * eps * float(truth[1].abs().max()))


def test_double_backward_is_refused():
    student = features(4, 5).requires_grad_()
    loss = kdfast.rkd_loss(student, features(4, 5, seed=1))
    (grad,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        grad.sum().backward()


def test_without_a_gradient_none_is_made():
    inputs = {k: v.float() for k, v in pair(20).items()}
    arguments = (*inputs.values(), None, None, None, *rkd.Options(1.0, 1.0))
    loss, grad = torch.ops.kdfast.rkd(*arguments, False)
    assert grad.numel() == 0
    assert torch.equal(loss, torch.ops.kdfast.rkd(*arguments, True)[0])


def test_the_op_passes_opcheck():
    student, teacher = (v.float() for v in pair(6).values())
    for dtype in (torch.float32, torch.float16):
        for needs_grad in (True, False):
            arguments = (student.to(dtype), teacher.to(dtype), mask_of(6), weight_of(6), torch.tensor([1, 4]))
            torch.library.opcheck(torch.ops.kdfast.rkd.default, (*arguments, 25.0, 50.0, True, needs_grad))


@pytest.mark.parametrize("options", [{}, {"triplets": 5}, {"mask": mask_of(9), "row_weight": weight_of(9)}], ids=str)
def test_compiles_without_a_graph_break(options):
    inputs = {k: v.float() for k, v in pair(9).items()}

    def step(student, teacher):
        return kdfast.rkd_loss(student * 1.0, teacher, **options) * 3.0

    compiled = torch.compile(step, fullgraph=True)
    grads = []
    for function in (step, compiled):
        torch.manual_seed(0)
        student = inputs["student"].clone().requires_grad_()
        function(student, inputs["teacher"]).backward()
        grads.append(student.grad)
    if "triplets" in options:
        assert grads[1].isfinite().all()  # compiled random numbers are others
    else:
        torch.testing.assert_close(grads[0], grads[1])
