"""Stored teachers: what comes back is what PyTorch's topk and log_softmax give, rounded once, whatever the shards."""

from __future__ import annotations

import builtins
import importlib.util
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import kdfast

pytest.importorskip("safetensors", reason="kdfast.store needs it, the rest of kdfast does not")

from kdfast import store

ROWS, VOCABULARY, K = 23, 40, 5


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def write(path: Path, *batches: Tensor, **options) -> store.TeacherReader:
    with store.TeacherWriter(path, **{"k": K, "rows_per_shard": 7} | options) as writer:
        for batch in batches:
            writer.append(batch)
    return store.TeacherReader(path)


@pytest.fixture
def reader(tmp_path) -> store.TeacherReader:
    """23 rows in four shards of 7, 7, 7 and 2."""
    return write(tmp_path / "teacher", logits(ROWS, VOCABULARY))


def expected(teacher: Tensor, dtype: torch.dtype = torch.float16, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    values, indices = (teacher / temperature).log_softmax(dim=-1).topk(K, dim=-1)
    return values.to(dtype), indices.int()


def assert_same_bits(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_log_probabilities_are_rounded_once_and_normalised_over_all_classes(tmp_path, dtype, temperature):
    teacher = logits(ROWS, VOCABULARY)
    reader = write(tmp_path / "teacher", teacher, dtype=dtype, temperature=temperature)
    assert_same_bits(reader[:], expected(teacher, dtype, temperature))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_are_stored_as_they_are(tmp_path, dtype):
    teacher = logits(ROWS, VOCABULARY)
    reader = write(tmp_path / "teacher", teacher, values="logits", dtype=dtype)
    values, indices = teacher.topk(K, dim=-1)
    assert_same_bits(reader[:], (values.to(dtype), indices.int()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_half_logits_are_widened_and_float64_logits_not_narrowed(tmp_path, dtype):
    teacher = logits(ROWS, VOCABULARY, dtype=dtype)
    values, indices = write(tmp_path / "teacher", teacher)[:]
    # Which of two equal half logits is taken is topk's affair; what is stored for it is not.
    truth = teacher.double().log_softmax(dim=-1).gather(-1, indices.long())
    assert torch.equal(teacher.gather(-1, indices.long()), teacher.topk(K, dim=-1).values)
    assert (values - truth).abs().max() <= 0.5 * torch.finfo(torch.float16).eps * truth.abs().max() * (1 + 1e-3)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([23], id="one batch"),
        pytest.param([7, 7, 7, 2], id="batches are shards"),
        pytest.param([3, 0, 11, 1, 8], id="batches across shards, one empty"),
        pytest.param([1] * 23, id="single rows"),
    ],
)
@pytest.mark.parametrize("rows_per_shard", [1, 7, 23, 100])
def test_batches_and_shards_leave_no_trace(tmp_path, sizes, rows_per_shard):
    teacher = logits(ROWS, VOCABULARY)
    reader = write(tmp_path / "teacher", *teacher.split(sizes), rows_per_shard=rows_per_shard)
    assert len(reader) == ROWS
    files = [f"shard-{number:05d}.safetensors" for number in range(math.ceil(ROWS / rows_per_shard))]
    assert sorted(path.name for path in reader.path.iterdir()) == ["index.json", *files]
    assert_same_bits(reader[:], expected(teacher))


def test_leading_dimensions_are_rows(tmp_path):
    teacher = logits(2, 3, VOCABULARY)
    strided = teacher.movedim(-1, 0).contiguous().movedim(0, -1)
    assert_same_bits(write(tmp_path / "three", teacher)[:], expected(teacher.flatten(0, 1)))
    assert_same_bits(write(tmp_path / "strided", strided)[:], expected(teacher.flatten(0, 1)))
    assert_same_bits(write(tmp_path / "one", teacher[0, 0])[0], expected(teacher[0, 0]))


@pytest.mark.parametrize(
    "rows",
    [
        slice(None),
        slice(5, 16),
        slice(7, 14),
        slice(-3, None),
        slice(20, 100),
        slice(None, None, 6),
        slice(None, None, -4),
        slice(9, 9),
        slice(9, 3),
    ],
    ids=str,
)
def test_a_slice_is_what_it_is_of_a_tensor(reader, rows):
    values, indices = expected(logits(ROWS, VOCABULARY))
    picked = torch.tensor(list(range(ROWS))[rows], dtype=torch.int64)
    assert_same_bits(reader[rows], (values[picked], indices[picked]))


@pytest.mark.parametrize(
    "rows",
    [[22, 0, 7, 6, 7, 13], [-1, 0, -23], [], list(range(22, -1, -1))],
    ids=["unordered and twice", "from the end", "none", "all backwards"],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_index_tensors_read_across_shards(reader, rows, dtype):
    values, indices = expected(logits(ROWS, VOCABULARY))
    rows = torch.tensor(rows, dtype=dtype)
    assert_same_bits(reader[rows], (values[rows], indices[rows]))


@pytest.mark.parametrize("row", [0, 6, 7, 22, -1, -23])
def test_an_int_gives_one_row(reader, row):
    values, indices = expected(logits(ROWS, VOCABULARY))
    assert_same_bits(reader[row], (values[row], indices[row]))


def test_iterating_ends(reader):
    assert len(list(reader)) == ROWS


def test_what_was_read_can_be_written(reader):
    values, indices = reader[3:5]
    values.zero_(), indices.zero_()
    assert_same_bits(reader[:], expected(logits(ROWS, VOCABULARY)))


def test_a_store_of_no_rows_is_a_store(tmp_path):
    reader = write(tmp_path / "teacher", logits(0, VOCABULARY))
    assert len(reader) == 0 and reader.vocabulary == VOCABULARY
    assert [part.shape for part in reader[:]] == [(0, K), (0, K)]


def test_masked_classes_come_back_as_padding(tmp_path):
    teacher = logits(4, VOCABULARY)
    teacher[:, 3:] = -torch.inf
    values, indices = write(tmp_path / "teacher", teacher)[:]
    assert (values == -torch.inf).sum(dim=-1).tolist() == [2, 2, 2, 2]
    student = logits(4, VOCABULARY, seed=1)
    loss = kdfast.topk_kl_divergence(student, values, indices, values="logprobs", tail="bucket")
    torch.testing.assert_close(loss, kdfast.kl_divergence(student, teacher), rtol=1e-3, atol=1e-3)


def test_metadata_comes_back(tmp_path):
    reader = write(tmp_path / "a", logits(3, VOCABULARY), temperature=3, dtype=torch.bfloat16)
    found = (reader.vocabulary, reader.k, reader.values, reader.temperature, reader.dtype)
    assert found == (VOCABULARY, K, "logprobs", 3.0, torch.bfloat16)
    assert write(tmp_path / "b", logits(3, VOCABULARY), values="logits").values == "logits"
    index = json.loads((tmp_path / "a" / "index.json").read_text())
    assert (index["rows"], index["version"]) == (3, 1)


def test_shards_describe_themselves(reader):
    """To any tool that reads safetensors."""
    with store.safe_open(store.shard_path(reader.path, 3), framework="pt") as shard:
        assert sorted(shard.keys()) == ["indices", "values"]
        assert shard.metadata() == {
            "format": "kdfast.store",
            "version": "1",
            "vocabulary": str(VOCABULARY),
            "k": str(K),
            "temperature": "1.0",
            "values": "logprobs",
            "dtype": "float16",
        }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tail", ["drop", "bucket", "renormalize"])
def test_the_loss_from_the_store_is_the_loss_from_memory(tmp_path, tail, dtype):
    teacher, student = logits(ROWS, VOCABULARY), logits(ROWS, VOCABULARY, seed=1).requires_grad_()
    reader = write(tmp_path / "teacher", teacher, dtype=dtype)
    results = []
    for values, indices in (reader[:], expected(teacher, dtype)):
        loss = kdfast.topk_kl_divergence(student, values, indices, values="logprobs", tail=tail)
        results.append((loss, *torch.autograd.grad(loss, student)))
    assert_same_bits(*results)


def test_a_softened_store_gives_the_softened_loss(tmp_path):
    """The student's logits are divided by the temperature of the store, and T^2 put back by hand."""
    teacher, student = logits(ROWS, VOCABULARY), logits(ROWS, VOCABULARY, seed=1)
    reader = write(tmp_path / "teacher", teacher, k=VOCABULARY, temperature=2.0)
    values, indices = reader[:]
    loss = reader.temperature**2 * kdfast.topk_kl_divergence(
        student / reader.temperature, values, indices, values=reader.values, tail="bucket"
    )
    # float16 keeps log-probabilities of size 10 to half of 2^-7, and T^2 = 4 of that reaches the loss.
    torch.testing.assert_close(loss, kdfast.kl_divergence(student, teacher, temperature=2.0), rtol=0, atol=2e-2)


def test_a_store_is_on_the_cpu_whatever_the_default_device(tmp_path):
    teacher = logits(ROWS, VOCABULARY)
    with torch.device("meta"):  # which can be used on a machine without a GPU, and fails where a value is asked for
        reader = write(tmp_path / "teacher", *teacher.split(10))
        read = [reader[:], reader[5:16:3], reader[-1], reader[torch.tensor([22, 0, 7], device="cpu")]]
    values, indices = expected(teacher)
    for got, rows in zip(read, (slice(None), slice(5, 16, 3), -1, [22, 0, 7]), strict=True):
        assert_same_bits(got, (values[rows], indices[rows]))


def test_only_rows_asked_for_are_read(reader):
    reader[8]
    assert list(reader._mapped) == [1]
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "shard-00001.safetensors" in maps.read_text()


def test_workers_get_the_path_and_not_the_rows(reader):
    reader[:]
    copy = pickle.loads(pickle.dumps(reader))
    assert copy._mapped == {}
    assert_same_bits(copy[:], reader[:])


def test_a_data_loader_takes_it(reader):
    batches = list(torch.utils.data.DataLoader(reader, batch_size=10))
    assert_same_bits(tuple(torch.cat(parts) for parts in zip(*batches, strict=True)), reader[:])


def test_memory_of_the_writer_is_bounded_by_a_shard(tmp_path):
    writer = store.TeacherWriter(tmp_path, k=K, rows_per_shard=7)
    for batch in logits(ROWS, VOCABULARY).split(2):
        writer.append(batch)
        held = sum(values.untyped_storage().nbytes() // (2 * K) for values, _ in writer._waiting)
        assert held < 7


def test_an_exception_leaves_no_store(tmp_path):
    with pytest.raises(KeyError), store.TeacherWriter(tmp_path, k=K, rows_per_shard=7) as writer:
        writer.append(logits(ROWS, VOCABULARY))
        raise KeyError
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"shard-0000{i}.safetensors" for i in range(3)]
    with pytest.raises(FileNotFoundError, match=r"has no index\.json: its write did not end"):
        store.TeacherReader(tmp_path)
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
        store.TeacherWriter(tmp_path, k=K)


def test_a_crash_while_the_index_is_written_leaves_no_store(tmp_path, monkeypatch):
    writer = store.TeacherWriter(tmp_path, k=K)
    writer.append(logits(ROWS, VOCABULARY))
    monkeypatch.setattr(store.os, "fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        writer.close()
    with pytest.raises(FileNotFoundError, match="its write did not end"):
        store.TeacherReader(tmp_path)


def test_closing_twice_is_closing_once(tmp_path):
    writer = store.TeacherWriter(tmp_path, k=K)
    writer.append(logits(3, VOCABULARY))
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="is closed"):
        writer.append(logits(3, VOCABULARY))
    assert len(store.TeacherReader(tmp_path)) == 3


def with_value(value: float) -> Tensor:
    teacher = logits(3, VOCABULARY)
    teacher[1, 4] = value
    return teacher


@pytest.mark.parametrize(
    ("call", "exception", "match"),
    [
        pytest.param(dict(k=0), ValueError, "k must be at least 1, got 0", id="k 0"),
        pytest.param(dict(k=2.0), TypeError, "k must be an int, got float", id="k float"),
        pytest.param(
            dict(values="probs"), ValueError, "values must be 'logprobs' or 'logits', got 'probs'", id="values"
        ),
        pytest.param(dict(temperature=0.0), ValueError, "temperature must be greater than 0, got 0", id="temperature"),
        pytest.param(
            dict(values="logits", temperature=2.0),
            ValueError,
            "temperature must be 1 for values='logits', got 2",
            id="softened logits",
        ),
        pytest.param(
            dict(dtype=torch.float32),
            ValueError,
            "dtype must be torch.float16 or torch.bfloat16, got torch.float32",
            id="dtype",
        ),
        pytest.param(dict(rows_per_shard=0), ValueError, "rows_per_shard must be at least 1, got 0", id="empty shards"),
        pytest.param(dict(k=41), ValueError, "k must be between 1 and V = 40, got 41", id="k above V"),
        pytest.param(dict(batch=[[1.0]]), TypeError, "teacher_logits must be a torch.Tensor, got list", id="no tensor"),
        pytest.param(
            dict(batch=torch.ones(2, VOCABULARY, dtype=torch.int64)),
            TypeError,
            "teacher_logits must have dtype .*, got torch.int64",
            id="integers",
        ),
        pytest.param(
            dict(batch=torch.tensor(1.0)), ValueError, r"teacher_logits must have shape \(\.\.\., V\)", id="scalar"
        ),
        pytest.param(dict(batch=with_value(math.nan)), ValueError, "must fit torch.float16.*got nan", id="NaN"),
        pytest.param(dict(batch=with_value(math.inf)), ValueError, "must fit torch.float16.*got nan", id="inf"),
        pytest.param(
            dict(batch=torch.full((1, VOCABULARY), -math.inf)),
            ValueError,
            "must fit .*got nan",
            id="a row without mass",
        ),
        pytest.param(
            dict(batch=with_value(7e4), values="logits"),
            ValueError,
            "the logits to store must fit torch.float16, whose largest is 65504, got 70000",
            id="beyond float16",
        ),
        pytest.param(
            dict(batch=with_value(math.inf), values="logits", dtype=torch.bfloat16),
            ValueError,
            "must fit torch.bfloat16.*got inf",
            id="inf logit",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path, call, exception, match):
    call = {"k": K, "batch": logits(3, VOCABULARY)} | call
    batch = call.pop("batch")
    with pytest.raises(exception, match=match):
        store.TeacherWriter(tmp_path / "teacher", **call).append(batch)


def test_batches_have_one_vocabulary(tmp_path):
    writer = store.TeacherWriter(tmp_path, k=K)
    writer.append(logits(3, VOCABULARY))
    with pytest.raises(ValueError, match="teacher_logits has 41 classes, but the rows before had 40"):
        writer.append(logits(3, VOCABULARY + 1))


def test_nothing_appended_is_no_store(tmp_path):
    with pytest.raises(ValueError, match="nothing was appended"), store.TeacherWriter(tmp_path, k=K):
        pass


def test_a_file_is_not_a_folder(tmp_path):
    file = tmp_path / "teacher"
    file.write_text("notes")
    with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
        store.TeacherWriter(file, k=K)
    with pytest.raises(FileNotFoundError, match="it is no stored teacher"):
        store.TeacherReader(file)
    assert file.read_text() == "notes"


@pytest.mark.parametrize(
    ("rows", "exception", "match"),
    [
        pytest.param(23, IndexError, r"rows must lie in \[-23, 23\), got 23", id="past the end"),
        pytest.param(-24, IndexError, r"rows must lie in \[-23, 23\), got -24", id="before the start"),
        pytest.param(torch.tensor([0, 23]), IndexError, r"rows must lie in \[-23, 23\), got 23", id="in a tensor"),
        pytest.param(torch.zeros(2, 2).long(), ValueError, r"rows must have shape \(n,\), got \(2, 2\)", id="2-D"),
        pytest.param(torch.zeros(23).bool(), TypeError, "rows must have dtype .*, got torch.bool", id="mask"),
        pytest.param([1, 2], TypeError, "rows must be an int, a slice or a 1-D tensor, got list", id="list"),
        pytest.param(1.0, TypeError, "rows must be an int, a slice or a 1-D tensor, got float", id="float"),
    ],
)
def test_rows_that_are_not_there_are_refused(reader, rows, exception, match):
    with pytest.raises(exception, match=match):
        reader[rows]


def edit_index(path: Path, **changes) -> None:
    index = path / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


def truncate(path: Path) -> None:
    shard = store.shard_path(path, 2)
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_header(path: Path) -> None:
    shard = store.shard_path(path, 2)
    shard.write_bytes(b"\xff" * 8 + shard.read_bytes()[8:])


@pytest.mark.parametrize(
    ("damage", "exception", "match"),
    [
        pytest.param(
            lambda path: edit_index(path, version=2),
            ValueError,
            "has version 2, this kdfast reads version 1",
            id="version",
        ),
        pytest.param(
            lambda path: edit_index(path, format="other"), ValueError, "not the index of a stored teacher", id="format"
        ),
        pytest.param(lambda path: edit_index(path, k=4), ValueError, r"does not belong to its index", id="another k"),
        pytest.param(
            lambda path: edit_index(path, dtype="bfloat16"),
            ValueError,
            r"does not belong to its index",
            id="another dtype",
        ),
        pytest.param(lambda path: (path / "index.json").write_text("{"), ValueError, "is not JSON", id="half an index"),
        pytest.param(
            lambda path: (path / "index.json").write_text("[]"), ValueError, "not the index of a stored", id="a list"
        ),
        pytest.param(truncate, ValueError, "00002.safetensors is damaged: it has .* bytes", id="truncated shard"),
        pytest.param(flip_header, ValueError, "00002.safetensors is damaged", id="broken header"),
        pytest.param(
            lambda path: store.shard_path(path, 3).unlink(), ValueError, "damaged: it has 0 bytes", id="missing shard"
        ),
    ],
)
def test_damage_is_said(reader, damage, exception, match):
    damage(reader.path)
    with pytest.raises(exception, match=match):
        store.TeacherReader(reader.path)[:]


@pytest.mark.parametrize("name", ["vocabulary", "k", "temperature", "values", "dtype", "rows", "shards"])
def test_an_index_that_lacks_something_is_damaged(reader, name):
    file = reader.path / "index.json"
    index = json.loads(file.read_text())
    del index[name]
    file.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json is damaged: it has no '{name}'"):
        store.TeacherReader(reader.path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        pytest.param(dict(vocabulary=None), "vocabulary must be an int, got NoneType", id="vocabulary null"),
        pytest.param(dict(vocabulary=0), "vocabulary must be at least 1, got 0", id="no vocabulary"),
        pytest.param(dict(k="5"), "k must be an int, got str", id="k a string"),
        pytest.param(dict(k=0), "k must be between 1 and vocabulary = 40, got 0", id="k 0"),
        pytest.param(dict(k=41), "k must be between 1 and vocabulary = 40, got 41", id="k above the vocabulary"),
        pytest.param(dict(values="probs"), "values must be 'logprobs' or 'logits', got 'probs'", id="values"),
        pytest.param(dict(values=["logits"]), "values must be 'logprobs' or 'logits', got", id="values a list"),
        pytest.param(dict(temperature="1"), "temperature must be a float, got str", id="temperature a string"),
        pytest.param(dict(temperature=math.nan), "temperature must be finite, got nan", id="temperature NaN"),
        pytest.param(dict(dtype="float32"), "dtype must be 'float16' or 'bfloat16', got 'float32'", id="dtype"),
        pytest.param(dict(dtype={}), "dtype must be 'float16' or 'bfloat16', got {}", id="dtype an object"),
        pytest.param(dict(shards=4), "shards must be a list of objects, got 4", id="shards a number"),
        pytest.param(dict(shards=[7, 7, 7, 2]), "shards must be a list of objects, got ", id="shards of numbers"),
        pytest.param(dict(shards=[{"rows": 23}]), "it has no 'bytes'", id="a shard without bytes"),
        pytest.param(
            dict(shards=[{"rows": 2.5, "bytes": 9}]), "rows of a shard must be an int, got float", id="half a row"
        ),
        pytest.param(dict(shards=[{"rows": -7, "bytes": 9}]), "rows of a shard must be at least 1", id="negative rows"),
        pytest.param(dict(shards=[]), "rows must be the sum over its shards, got 23", id="shards lost"),
        pytest.param(dict(rows="23"), "rows must be the sum over its shards, got '23'", id="rows a string"),
    ],
)
def test_a_damaged_index_is_said_at_once(reader, changes, match):
    edit_index(reader.path, **changes)
    with pytest.raises(ValueError, match=rf"index\.json is damaged: {match}"):
        store.TeacherReader(reader.path)


def test_no_store_at_all_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"has no index\.json: it is no stored teacher"):
            store.TeacherReader(path)


def test_kdfast_alone_does_not_import_safetensors():
    code = "import sys, kdfast; assert not any(name.startswith('safetensors') for name in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(kdfast.__file__).parents[1])


def test_a_missing_safetensors_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    spec = importlib.util.spec_from_file_location("kdfast_store_again", store.__file__)
    with pytest.raises(ImportError, match=r"pip install 'kdfast\[store\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[1] / "examples" / "offline_teacher.py"
    spec = importlib.util.spec_from_file_location("offline_teacher", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline_teacher"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["offline_teacher"]


def test_the_example_shows_what_a_store_is_good_for(example, capsys):
    threads = torch.get_num_threads()
    labels, online, stored, teacher = example.main(["--quick"])
    torch.set_num_threads(threads)
    assert teacher.perplexity < online.perplexity < stored.perplexity < labels.perplexity
    assert stored.target.bytes_per_row < online.target.bytes_per_row / 4
    printed = capsys.readouterr().out
    assert all(row.method in printed for row in (labels, online, stored, teacher))


def test_the_example_holds_paragraphs_out(example):
    text = example.load_text(share=0.1)
    assert len(text["student"].targets) < len(text["teacher"].targets) / 3
    assert text["test"].targets.max() < example.VOCABULARY

    def without_start(words):
        return {tuple(row) for row in words.contexts.tolist() if example.START not in row}

    # Turns of phrase recur from one paragraph to the next; paragraphs do not.
    held_out = without_start(text["test"])
    assert len(held_out & without_start(text["teacher"])) < 0.2 * len(held_out)
