"""The digits example, run small: its pieces fit together and its students learn."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch

for dependency in ("matplotlib", "rich", "sklearn"):
    pytest.importorskip(dependency, reason="the examples need it, kdfast does not")

EXAMPLE = Path(__file__).parents[1] / "examples" / "distill_digits.py"
HEADINGS = {
    "method",
    "accuracies",
    "accuracy_mean",
    "accuracy_std",
    "transfer_ratio",
    "cka_mean",
    "loss_ms",
}


@pytest.fixture(scope="module")
def digits():
    spec = importlib.util.spec_from_file_location("distill_digits", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_digits"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["distill_digits"]


@pytest.fixture(scope="module")
def images(digits):
    return digits.load_images(torch.device("cpu"))


@pytest.fixture(scope="module")
def taught(digits, images):
    return digits.train_teacher(images["train"], epochs=3)(images["train"].pixels)


def test_a_run_leaves_a_table_and_files(digits, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(digits, "TEACHER_EPOCHS", 2)
    threads = torch.get_num_threads()
    digits.main(["--seeds", "2", "--epochs", "1", "--output", str(tmp_path / "results")])
    torch.set_num_threads(threads)

    printed = capsys.readouterr().out
    assert [name for name in (*digits.METHODS, "teacher") if name not in printed] == []

    results = json.loads((tmp_path / "results" / "results.json").read_text())
    assert results["settings"]["seeds"] == 2 and results["settings"]["epochs"] == 1
    assert 0.5 < results["teacher_accuracy"] <= 1
    assert [row["method"] for row in results["methods"]] == list(digits.METHODS)
    for row in results["methods"]:
        assert set(row) == HEADINGS
        assert len(row["accuracies"]) == 2 and all(0 <= value <= 1 for value in row["accuracies"])
        assert 0 < row["cka_mean"] <= 1
        assert (row["loss_ms"] is None) == (row["method"] == digits.BASELINE)
    assert results["methods"][0]["transfer_ratio"] == 0
    assert (tmp_path / "results" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_every_method_lowers_its_loss(digits, images, taught):
    for name, method in digits.METHODS.items():
        _, _, losses = digits.train_student(method, images["train"], taught, seed=0, epochs=4)
        assert all(math.isfinite(loss) for loss in losses), name
        assert losses[-1] < losses[0], name


def test_a_seed_repeats_itself_and_is_the_same_start_for_every_method(digits, images, taught):
    def student(name, seed):
        weights = digits.train_student(digits.METHODS[name], images["train"], taught, seed, epochs=1)[0].state_dict()
        return torch.cat([weight.flatten() for weight in weights.values()])

    assert torch.equal(student("KD", 0), student("KD", 0))
    assert not torch.equal(student("KD", 0), student("KD", 1))
    # With a weight of 0 a method is the baseline: nothing but the loss tells two rows apart.
    silent = digits.Method(digits.kd, weight=0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(digits.METHODS, "silent", silent)
        torch.testing.assert_close(student("silent", 0), student(digits.BASELINE, 0))


def test_held_out_images_are_in_no_other_part(digits, images):
    seen = {name: {tuple(row) for row in part.pixels.flatten(1).tolist()} for name, part in images.items()}
    assert {name: len(part.labels) for name, part in images.items()} == {"train": 1000, "validation": 297, "test": 500}
    assert not seen["test"] & (seen["train"] | seen["validation"])
    assert not seen["train"] & seen["validation"]


def test_labelled_images_are_five_of_each_class(digits, images):
    labels = images["train"].labels
    rows = digits.labelled_rows(labels, torch.Generator().manual_seed(3))
    assert labels[rows].bincount().tolist() == [digits.LABELS_PER_CLASS] * digits.CLASSES
    assert rows.unique().numel() == rows.numel()


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--epochs", "0"]], ids=" ".join)
def test_a_run_of_nothing_is_refused(digits, arguments, capsys):
    with pytest.raises(SystemExit):
        digits.parse_arguments(arguments)
    assert "must be at least 1" in capsys.readouterr().err
