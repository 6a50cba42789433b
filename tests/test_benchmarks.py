"""The benchmarks' own machinery: what they refuse to measure, what they write down, how they compute and show ratios.

No test looks at how fast anything is.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

import kdfast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import features  # noqa: E402
import graph  # noqa: E402
import harness  # noqa: E402
import kl  # noqa: E402
import pairs  # noqa: E402
import readme_tables  # noqa: E402
import relation  # noqa: E402
import rkd  # noqa: E402
import rkd_plot  # noqa: E402
import tables  # noqa: E402

CPU = torch.device("cpu")
DATA_TYPES = (torch.float32, torch.bfloat16)


def small_case(dtype: torch.dtype = torch.float32, **changes) -> harness.Case:
    """Forward KL as benchmarks/kl.py builds it, without what needs a compiler."""
    case = kl.case("forward KL", *kl.LOSSES["forward KL"], (6, 50), harness.Options(CPU, dtype))
    kept = {name: run for name, run in case.candidates.items() if "compiled" not in name}
    return dataclasses.replace(case, **{"candidates": kept, **changes})


def with_candidate(case: harness.Case, loss) -> harness.Case:
    return dataclasses.replace(case, candidates={**case.candidates, "other": harness.step(loss, case.inputs)})


def wrong_value(student_logits, teacher_logits):
    return kdfast.reference.kl_divergence(student_logits, teacher_logits, kl.TEMPERATURE) + 0.01


def wrong_gradient(student_logits, teacher_logits):
    loss = kdfast.reference.kl_divergence(student_logits, teacher_logits, kl.TEMPERATURE)
    return loss + 0.01 * (student_logits - student_logits.detach()).sum()


def no_number(student_logits, teacher_logits):
    return kdfast.reference.kl_divergence(student_logits, teacher_logits, kl.TEMPERATURE) * torch.nan


@pytest.mark.parametrize("dtype", DATA_TYPES, ids=str)
def test_the_candidates_of_kl_agree_with_the_reference(dtype):
    assert harness.check(small_case(dtype)) == {}


@pytest.mark.parametrize("name", list(kl.LOSSES))
def test_every_loss_of_kl_agrees_with_its_reference(name):
    case = kl.case(name, *kl.LOSSES[name], (6, 50), harness.Options(CPU, torch.float32))
    kept = {label: run for label, run in case.candidates.items() if "compiled" not in label}
    assert {"kdfast", "eager reference"} <= kept.keys()
    assert harness.check(dataclasses.replace(case, candidates=kept)) == {}


@pytest.mark.parametrize("build", [graph.graph_case, graph.loss_case])
def test_the_candidates_of_graph_agree_with_the_truth(build):
    case = build((200, 16), harness.Options(CPU, torch.float32))
    slow = ("compiled", "KeOps")  # they need a compiler
    kept = {name: run for name, run in case.candidates.items() if name not in slow}
    assert {"kdfast", "eager"} <= kept.keys()
    assert harness.check(dataclasses.replace(case, candidates=kept)) == {}


def test_where_only_some_rows_are_checked_a_wrong_one_among_them_is_found():
    options = harness.Options(CPU, torch.float32)
    inputs = {"features": graph.draw((200, 16), 0, options)}
    rows = torch.tensor([3, 150, 199])
    truth = partial(graph.values_by_blocks, rows=rows)
    for wrong_row, expected in ((150, True), (151, False)):

        def loss(features, row=wrong_row):
            values = graph.eager_graph(features)[0]
            values[row, 4] -= 0.1
            return values

        candidates = {"kdfast": harness.step(graph.kdfast_values, inputs), "other": harness.step(loss, inputs)}
        case = graph.make_case("graph", (200, 16), inputs, truth, candidates, sampled=rows)
        case = dataclasses.replace(case, peers=frozenset({"other"}))
        assert (list(harness.check(case)) == ["other"]) == expected


def test_a_graph_without_the_matrix_says_what_the_matrix_would_take(monkeypatch):
    monkeypatch.setattr(graph, "MATRIX_ROWS", 100)
    monkeypatch.setattr(graph, "SAMPLED_ROWS", 7)
    case = graph.graph_case((300, 16), harness.Options(CPU, torch.float32))
    assert case.sampled.tolist() == [0, 49, 99, 149, 199, 249, 299]
    assert not {"eager", "compiled"} & case.candidates.keys()
    assert case.needs_bytes == {"eager": 4 * 300**2, "torch.compile": 4 * 300**2}
    kept = {name: run for name, run in case.candidates.items() if name != "KeOps"}
    record = harness.measure(dataclasses.replace(case, candidates=kept), budget=0)
    record = {**record, "needs_bytes": {"eager": 17179869184}}
    headers, rows = tables.summary(result_of({**record, "fastest": {"eager": "eager"}}))
    assert dict(zip(headers, rows[0], strict=True))["vs eager"] == "needs 17 GB"
    assert ["graph", "300x16", "eager", "needs 17 GB", ""] in tables.candidates(result_of(record))[1]


@pytest.mark.parametrize("name", ["crd", "pkt", "similarity_preserving"])
def test_the_truth_in_blocks_is_the_reference(name, monkeypatch):
    monkeypatch.setattr(pairs, "ROWS", 20)
    inputs = harness.fresh(relation.features((50, 6), harness.Options(CPU, torch.float32)), torch.float64)
    if name != "crd":
        del inputs["labels"]
    value, gradients = harness.step(partial(pairs.by_blocks, getattr(pairs, name)), inputs)()
    expected = harness.step(getattr(kdfast.reference, f"{name}_loss"), inputs)()
    torch.testing.assert_close(value, expected[0])
    torch.testing.assert_close(gradients, expected[1])


@pytest.mark.parametrize(
    ("loss", "what"), [(wrong_value, "value"), (wrong_gradient, "gradient of student_logits"), (no_number, "value")]
)
@pytest.mark.parametrize("dtype", DATA_TYPES, ids=str)
def test_a_wrong_candidate_stops_the_measurement(loss, what, dtype):
    with pytest.raises(harness.ParityError, match=f"nothing is measured, forward KL 6x50, other: {what}"):
        harness.measure(with_candidate(small_case(dtype), loss), budget=0)


def test_a_wrong_peer_is_left_out_and_its_error_written_down():
    case = dataclasses.replace(with_candidate(small_case(), wrong_value), peers=frozenset({"other"}))
    record = harness.measure(case, budget=0)
    assert "other" not in record["seconds"]
    assert record["refused"]["other"].startswith("value: error 0.01")
    assert "left out: value: error 0.01" in tables.markdown(*tables.candidates(result_of(record)))


def test_what_is_ours_and_not_proven_is_left_out_of_the_ratios_too():
    case = dataclasses.replace(
        with_candidate(small_case(), wrong_value), ours=("kdfast", "other"), peers=frozenset({"other"})
    )
    record = harness.measure(case, budget=0)
    assert record["speedup"].keys() == record["over_floor"].keys() == {"kdfast"}
    assert "other" in record["refused"]


def test_a_peer_that_fails_is_left_out_and_our_own_stops_the_measurement():
    def does_not_compile(student_logits, teacher_logits):
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"):
        harness.check(with_candidate(small_case(), does_not_compile))
    case = dataclasses.replace(with_candidate(small_case(), does_not_compile), peers=frozenset({"other"}))
    assert harness.check(case) == {"other": "RuntimeError: no such instruction"}


def test_every_peer_has_a_column_of_its_own():
    assert {label: kl.BASELINES[label] for label in kl.PEERS} == {label: (label,) for label in kl.PEERS}


def test_a_record_has_times_memory_and_ratios_of_every_candidate():
    case = small_case()
    record = json.loads(json.dumps(harness.measure(case, budget=0)))
    assert (record["name"], record["shape"], record["dtype"]) == ("forward KL", [6, 50], "float32")
    assert record["floor_bytes"] == 3 * 6 * 50 * 4
    assert record["seconds"].keys() == {*case.candidates, "memory floor", "Python floor"}
    assert record["peak_bytes"].keys() == case.candidates.keys()
    for taken in record["seconds"].values():
        assert 0 < taken["p20"] <= taken["p50"] <= taken["p80"]
        assert taken["samples"] == harness.MIN_ROUNDS
    for ours in case.ours:
        assert record["speedup"][ours].keys() == {"eager"}
        assert record["over_floor"][ours].keys() == {"memory floor", "Python floor"}


def test_the_environment_says_where_and_what_was_measured():
    env = harness.environment(CPU)
    for key in ("date", "processor", "threads"):
        assert env[key], key
    assert env["versions"]["torch"]
    assert env["cpu_level"] == kdfast.backends.cpu_level()
    assert {"commit", "dirty", "transparent_hugepage", "gpu", "driver", "cuda"} <= env.keys()
    assert harness.machine({**env, "gpu": "NVIDIA H200"}) == "nvidia-h200"
    assert harness.machine({**env, "threads": 4, "cpu_level": "avx2"}) == "cpu-4core-avx2"


@pytest.mark.parametrize(
    ("module", "name", "shape"),
    [
        *((relation, name, shape) for name in relation.LOSSES for shape in ((40, 30), (150, 4))),
        *((features, name, (3, 4, 6, 6)) for name in features.LOSSES),
    ],
    ids=lambda value: value.__name__ if hasattr(value, "__name__") else str(value),
)
def test_every_candidate_of_relation_and_features_agrees_with_its_reference(module, name, shape):
    case = module.case(name, *module.LOSSES[name], shape, harness.Options(CPU, torch.float32))
    kept = {label: run for label, run in case.candidates.items() if "compiled" not in label}
    assert {"kdfast", "eager reference"} <= kept.keys()
    assert harness.check(dataclasses.replace(case, candidates=kept)) == {}
    for floor in case.floors.values():
        floor()


def test_ratios_are_against_the_fastest_way_to_write_each_baseline():
    case = small_case(ours=("kdfast",), floors={"memory floor": print, "Python floor": print})
    p50 = {
        "kdfast": 2.0,
        "eager reference": 20.0,
        "eager F.kl_div": 16.0,
        "compiled reference": 6.0,
        "compiled F.kl_div": 7.0,
        "memory floor": 1.0,
        "Python floor": 0.5,
    }
    ratios = harness.compare(p50, case)
    assert ratios["fastest"] == {"eager": "eager F.kl_div", "torch.compile": "compiled reference"}
    assert ratios["speedup"] == {"kdfast": {"eager": 8.0, "torch.compile": 3.0}}
    assert ratios["over_floor"] == {"kdfast": {"memory floor": 2.0, "Python floor": 4.0}}


def test_percentiles_of_known_samples():
    assert harness.summary([float(i) for i in range(11)]) == {"p20": 2.0, "p50": 5.0, "p80": 8.0, "samples": 11}


def test_all_runs_take_part_in_every_round():
    calls = dict.fromkeys("ab", 0)

    def count(name):
        calls[name] += 1

    runs = {name: lambda name=name: count(name) for name in calls}
    samples = harness.interleaved(runs, budget=0, device=CPU, size=0)
    assert [len(values) for values in samples.values()] == [harness.MIN_ROUNDS] * 2
    assert min(calls.values()) > harness.MIN_ROUNDS


def test_a_slow_run_takes_part_in_few_rounds(monkeypatch):
    monkeypatch.setattr(harness, "SLOW_SECONDS", 0.02)
    calls = []
    runs = {"fast": lambda: None, "slow": lambda: (calls.append(0), time.sleep(0.03))}
    samples = harness.interleaved(runs, budget=0, device=CPU, size=0)
    assert (len(samples["fast"]), len(samples["slow"])) == (harness.MIN_ROUNDS, harness.SLOW_ROUNDS)
    assert len(calls) == 1 + harness.SLOW_ROUNDS


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is counted on Linux")
def test_peak_memory_counts_what_a_call_holds_at_its_peak():
    def two_then_one():
        first = torch.ones(32 * 2**18)  # 32 MiB
        return first + 1

    def warm():
        return torch.add(kept, 1, out=kept)

    kept = torch.ones(32 * 2**18)
    for _ in range(2):  # what the first call freed must not hide the second's
        assert 60 * 2**20 < harness.peak_bytes(two_then_one, CPU) < 72 * 2**20
    assert harness.peak_bytes(warm, CPU) < 2**20


def test_quick_takes_few_shapes_and_a_choice_of_shapes_only_those():
    quick = kl.cases(harness.Options(CPU, torch.float32, quick=True))
    chosen = kl.cases(harness.Options(CPU, torch.float32, shapes=[(4, 5)]))
    full = kl.cases(harness.Options(CPU, torch.float32))
    assert (len(quick), len(chosen), len(full)) == (2, 1, len(kl.SHAPES) + len(kl.LOSSES) - 1)


def result_of(*records: dict) -> dict:
    env = {
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "dirty": False,
        "device": "cpu",
        "processor": "A processor",
        "threads": 2,
        "cpu_level": "avx2",
        "gpu": None,
        "versions": {"torch": "2.13.0"},
    }
    return {"op": "kl", "environment": env, "cases": [{"allocator": "default", **record} for record in records]}


def record_of(allocator: str, speedup: float) -> dict:
    return {
        "allocator": allocator,
        "name": "forward KL",
        "shape": [512, 32000],
        "dtype": "float32",
        "fastest": {"eager": "eager F.kl_div"},
        "speedup": {"kdfast": {"eager": speedup}, "kdfast, in place": {"eager": 2 * speedup}},
        "over_floor": {o: {"memory floor": 1.25, "Python floor": 90.0} for o in ("kdfast", "kdfast, in place")},
        "peak_bytes": {
            "kdfast": 64 * 2**20,
            "kdfast, in place": 9000,
            "eager F.kl_div": 256 * 2**20,
            "eager reference": 1,
        },
    }


EXPECTED = """\
| loss | shape | type | vs eager | time over floor | vs eager, huge pages | time over floor, huge pages \
| peak extra MiB: kdfast / eager |
| --- | --- | --- | --- | --- | --- | --- | --- |
| forward KL | 512x32000 | float32 | 9.0x | 1.25 (memory floor) | 7.5x | 1.25 (memory floor) | 64 / 256 |
| forward KL, in place | 512x32000 | float32 | 18.0x | 1.25 (memory floor) | 15.0x | 1.25 (memory floor) \
| < 1 / 256 |"""


def test_the_table_has_a_row_for_each_of_our_variants_and_both_allocators():
    result = result_of(record_of("default", 9.0), record_of("huge pages", 7.5))
    assert tables.markdown(*tables.summary(result)) == EXPECTED


def test_losses_on_all_pairs_show_their_time_and_their_share_of_the_matrix():
    record = {
        **record_of("default", 9.0),
        "seconds": {o: {"p50": 0.0125} for o in ("kdfast", "kdfast, in place")},
        "matrix_bytes": 2**30,
    }
    headers, rows = tables.summary(result_of(record))
    row = dict(zip(headers, rows[0], strict=True))
    assert (row["kdfast's time"], row["kdfast's memory / N x N matrix"]) == ("12.5 ms", "6.2 %")


def test_the_readme_is_rewritten_between_the_markers_alone_and_checked(tmp_path, capsys):
    readme, results = tmp_path / "README.md", tmp_path / "results"
    results.mkdir()
    readme.write_text("before\n<!-- benchmarks:kl -->\nold\n<!-- /benchmarks:kl -->\nafter\n")
    arguments = ["--readme", str(readme), "--results", str(results)]
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert "is not what the result files say" in capsys.readouterr().out
    assert readme_tables.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- benchmarks:kl -->\n**CPU**: not yet measured.\n")
    assert "**GPU**: not yet measured.\n" in text
    assert text.endswith("<!-- /benchmarks:kl -->\nafter\n")
    assert readme_tables.main([*arguments, "--check"]) == 0

    older = result_of(record_of("default", 3.0))
    older["environment"]["date"] = "2025-01-02T03:04:05+00:00"
    (results / "z-kl.json").write_text(json.dumps(older))
    newer = result_of(record_of("default", 9.0), record_of("huge pages", 7.5))
    (results / "cpu-2core-avx2-kl.json").write_text(json.dumps(newer))
    assert readme_tables.main([*arguments, "--check"]) == 1
    assert readme_tables.main(arguments) == 0
    text = readme.read_text()
    assert EXPECTED in text
    assert "A processor, 2 threads, avx2; torch 2.13.0; 2026-01-02, commit abc1234" in text
    assert "[cpu-2core-avx2-kl.json](benchmarks/results/cpu-2core-avx2-kl.json)" in text
    assert "**GPU**: not yet measured.\n" in text
    assert readme_tables.main([*arguments, "--check"]) == 0

    newer["environment"]["device"] = "cuda"
    (results / "a-gpu-kl-kernels.json").write_text(json.dumps(newer))
    assert readme_tables.main(arguments) == 0
    assert "**GPU**: not yet measured as a whole; its kernels alone: [docs/gpu.md]" in readme.read_text()


def test_the_readme_shows_the_newest_results():
    assert readme_tables.main(["--check"]) == 0


@pytest.mark.parametrize("shape", [(9, 40), (3, 8, 20)], ids=["rows", "sequences"])
def test_every_candidate_of_rkd_agrees_with_the_reference(shape):
    build = rkd.case if len(shape) == 2 else rkd.sequence_case
    case = build(shape, harness.Options(CPU, torch.float32))
    kept = {label: run for label, run in case.candidates.items() if "compiled" not in label}
    expected = {"kdfast", "eager reference"}
    assert kept.keys() == expected | ({"eager RepDistiller form", "torchdistill"} if len(shape) == 2 else set())
    assert harness.check(dataclasses.replace(case, candidates=kept)) == {}


def test_candidates_of_rkd_that_do_not_fit_are_left_out():
    assert rkd.fits((256, 512)) and not rkd.fits((1024, 512))
    case = rkd.case((1024, 8), harness.Options(CPU, torch.float32))  # N^3 alone
    assert case.candidates.keys() == {"kdfast"}


def test_the_plot_has_a_curve_for_every_candidate(tmp_path):
    records = []
    for n in (8, 16):
        case = rkd.case((n, 20), harness.Options(CPU, torch.float32))
        kept = {label: run for label, run in case.candidates.items() if "compiled" not in label}
        record = harness.measure(dataclasses.replace(case, candidates=kept), budget=0)
        records.append({"allocator": "default", **record, "peak_bytes": dict.fromkeys(kept, 2**20 * n)})
    result = {**result_of(records[0]), "cases": records}
    assert rkd_plot.curves(result, "peak_bytes")["kdfast"] == [(8, 8 * 2**20), (16, 16 * 2**20)]
    assert rkd_plot.curves(result, "seconds").keys() == kept.keys()
    rkd_plot.draw(result, tmp_path / "rkd.png")
    assert (tmp_path / "rkd.png").stat().st_size > 10_000
