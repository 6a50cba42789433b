"""Every Triton kernel of every op: run by the interpreter, compiled for every target, resources as recorded.

Ops are found by their files; nothing here names one.
"""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import resources
from kernels import OPS, SOURCES, Function, choice, default_builds, every_build, functions, outcomes
from triton_support import TARGETS, Record, compile_all, needs_triton, run_alone, run_in_interpreter

from kdfast import backends

pytestmark = needs_triton
HERE = Path(__file__).parent
every_op = pytest.mark.parametrize("op", OPS)
# 32 warps have 64 registers a thread. That is enough on an H100, where so many were measured to be best; here it is 2
# and 10 instructions short.
SPILLS = {"sm_100 bf16 V=128256 reverse", "sm_100 bf16 V=128256 js"}


@cache
def everything_interpreted() -> Record:
    """What all interpreter files together made run."""
    launches: dict[str, list[Any]] = {}
    seen: dict[str, set[tuple[int, bool]]] = {}
    for name in (*OPS, "public"):
        record = run_in_interpreter(f"interpreter_{name}.py")
        for kernel, constants in record.launches.items():
            launches.setdefault(kernel, []).extend(constants)
        for source, pairs in record.outcomes.items():
            seen.setdefault(source, set()).update(pairs)
    return Record(launches, seen)


def choices(launches: Any) -> set[tuple[str, Any]]:
    """(kernel, what decides its branches) of launches or builds: pairs of kernel and constants."""
    return {(kernel, choice(kernel, constants)) for kernel, constants in launches}


def test_the_table_of_backends_and_the_sources_name_the_same_ops():
    assert set(OPS) == {op for op, kernels in backends.KERNELS.items() if backends.TRITON in kernels}


@every_op
def test_every_op_has_its_files(op):
    for name in (f"test_{op}_triton.py", f"interpreter_{op}.py", f"resources/{op}.txt"):
        assert (HERE / name).exists(), name


@every_op
def test_every_function_under_jit_is_launched_or_called(op):
    text = "".join(path.read_text() for path in SOURCES.values())
    for name, function in functions(op).items():
        assert function.launched or text.count(f"{name}(") > 1, f"{name} of {op} is dead"


def test_every_function_has_a_name_of_its_own():
    """Launches are recorded by the kernel's name, as profilers and compute-sanitizer show it."""
    names = [name for op in OPS for name, function in functions(op).items() if function.launched]
    assert len(set(names)) == len(names)


@every_op
def test_the_interpreter_runs_every_kernel_and_takes_every_branch_both_ways(op):
    record = everything_interpreted()
    kernels = {name for name, function in functions(op).items() if function.launched}
    assert kernels and kernels <= record.launches.keys()
    seen = record.outcomes.get(str(SOURCES[op]), set())
    missed = [text for outcome, text in outcomes(op).items() if outcome not in seen]
    assert not missed, "\n".join(missed)


@every_op
def test_what_is_interpreted_and_what_is_compiled_are_the_same_combinations(op):
    """Of the compile-time arguments that decide a branch, so that neither proof leaves out what the other has."""
    mine = {name for name, function in functions(op).items() if function.launched}
    launches = everything_interpreted().launches
    interpreted = choices((kernel, constants) for kernel in mine for constants in launches.get(kernel, ()))
    for target in TARGETS:
        builds = [build for build in every_build(op) if build.target == target]
        assert choices((build.kernel, build.constants) for build in builds) == interpreted, target


@every_op
def test_public_functions_launch_no_other_combination(op):
    """What options of public functions lead to is interpreted with the kernel's own, small tiles as well."""
    mine = {name for name, function in functions(op).items() if function.launched}
    public, own = (run_in_interpreter(f"interpreter_{name}.py").launches for name in ("public", op))
    reached = choices((kernel, constants) for kernel in mine for constants in public.get(kernel, ()))
    assert reached
    assert reached <= choices((kernel, constants) for kernel in mine for constants in own.get(kernel, ()))


def test_another_batch_size_compiles_nothing():
    run_alone("launches_public.py")


@every_op
def test_spills_are_not_more_than_recorded(op):
    builds = default_builds(op)
    compared(op, resources.record_of(builds, compile_all(builds)))


@pytest.mark.slow
@every_op
def test_no_configuration_spills_more_than_recorded(op):
    builds = every_build(op)
    compared(op, resources.record_of(builds, compile_all(builds)))


def compared(op: str, new: resources.Record) -> None:
    worse, changed = resources.compare(resources.read(op), new)
    if changed:
        warnings.warn("resources differ from the record (`make resources`):\n" + "\n".join(changed), stacklevel=2)
    assert not worse, "\n".join(worse)


@every_op
def test_the_record_has_a_line_for_each_build_and_no_spill_but_those_with_a_reason(op):
    """No configuration that may be chosen spills, but for those of SPILLS."""
    record = resources.read(op)
    recorded = {f"{target} {name}" for name, targets in record.items() for target in targets}
    assert recorded == {build.name for build in every_build(op)}
    assert {build.name for build in default_builds(op)} <= recorded
    spilling = {
        f"{target} {name}" for name, targets in record.items() for target, (_, spills, _) in targets.items() if spills
    }
    assert spilling == SPILLS & recorded


def test_more_spills_and_what_is_not_recorded_are_worse_and_other_differences_are_shown():
    old = {"a": {"sm_80": (90, 0, 512), "sm_90": (100, 2, 512)}, "b": {"sm_80": (32, 0, 0)}}
    new = {"a": {"sm_80": (80, 1, 512), "sm_90": (100, 1, 768)}, "b": {"sm_80": (32, 0, 0), "sm_90": (32, 0, 0)}}
    worse, changed = resources.compare(old, new)
    assert worse == ["sm_80 a: registers 90 -> 80, spills 0 -> 1", "sm_90 b: not in the record"]
    assert changed == ["sm_90 a: spills 2 -> 1, shared 512 -> 768"]
    assert resources.compare(old, old) == ([], [])


def test_a_record_reads_back_as_it_was_written():
    record = {"bf16 V=128 forward": {"sm_80": (90, 0, 65536), "gfx942": (255, 12, 0)}, "count": {"sm_90": (32, 0, 32)}}
    assert resources.from_text(resources.to_text(record)) == record


def test_the_gate_sees_spills():
    """The build of every op that needs most registers once more, with half of them."""
    starved = []
    for op in OPS:
        record = resources.read(op)
        needs = [
            (record[resources.label(made)]["sm_90"][0], made) for made in default_builds(op) if made.target == "sm_90"
        ]
        registers, build = max(needs, key=lambda pair: pair[0])
        options = {**build.options, "maxnreg": registers // 16 * 8}
        starved.append(build._replace(name=f"sm_90 {op} starved", options=options))
    assert {name for name, made in compile_all(starved).items() if made.spills == 0} == set()


SOURCE = """
@triton.jit
def _kernel(x_ptr, KIND: tl.constexpr, FLAG: tl.constexpr, BLOCK: tl.constexpr, NVIDIA: tl.constexpr):
    if NVIDIA:
        x = tl.inline_asm_elementwise("")
    else:
        x = 1
    _helper(x, KIND)
    y = 1 if FLAG else 2

@triton.jit
def _helper(x, K: tl.constexpr):
    for i in range(3):
        if K == 2:
            x += 1

def launch():
    _kernel[(1,)](x, KIND=1)
"""


def test_the_sources_are_read_for_what_branches(tmp_path, monkeypatch):
    path = tmp_path / "triton_kernels.py"
    path.write_text(SOURCE)
    monkeypatch.setitem(SOURCES, "invented", path)
    monkeypatch.setattr("kernels.OPS", (*OPS, "invented"))
    functions.cache_clear()
    found: dict[str, Function] = functions("invented")
    assert {name: function.launched for name, function in found.items()} == {"_kernel": True, "_helper": False}
    assert set(outcomes("invented")) == {(4, False), (9, True), (9, False), (13, True), (14, True), (14, False)}
    constants = {"KIND": 2, "FLAG": True, "BLOCK": 64, "NVIDIA": True}
    assert choice("_kernel", constants) == (("FLAG", True), ("KIND", 2))


def test_the_interpreter_reports_launches_and_outcomes(tmp_path):
    """A record of nothing would make the tests above red; one that invents would not."""
    record = run_in_interpreter("interpreter_kl.py", "-k", "test_dkd_of_two")
    (kinds,) = [{constants["KIND"] for constants in record.launches["_kl_kernel"]}]
    assert kinds == {3}
    seen = record.outcomes[str(SOURCES["kl"])]
    missed = [text for outcome, text in outcomes("kl").items() if outcome not in seen]
    assert any("if KIND == JS: is True" in text for text in missed)
    assert not any("if KIND == DKD: is True" in text for text in missed)
