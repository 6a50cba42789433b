"""Stored teachers: the k largest logits or log-probabilities of every row, written once and read by any student.

A store is a folder of safetensors shards and an ``index.json``, which is written last: a folder without one is a write
that did not end, and the reader says so. Row i is the i-th row appended.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from kdfast import checks
from kdfast.reference.logits import widen

try:
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file
except ImportError as error:
    raise ImportError("kdfast.store needs safetensors: pip install 'kdfast[store]'") from error

FORMAT, VERSION = "kdfast.store", 1
INDEX = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
VALUES = ("logprobs", "logits")


class TeacherWriter:
    r"""Keeps the k largest values of each row of a teacher's logits, and which classes they belong to.

    ``values='logprobs'`` stores :math:`\log \mathrm{softmax}(z / T)`, normalised over all V classes before anything is
    dropped; ``values='logits'`` stores z as it is, and leaves the temperature to the loss. It is a context manager::

        with kdfast.store.TeacherWriter("teacher", k=32) as writer:
            for batch in batches:
                writer.append(teacher(batch))

    Leaving the block by an exception writes no index, and neither does a process that dies.

    Args:
        path: the folder to write, which must not exist or be empty.
        k: classes to keep a row, 1 <= k <= V. A row takes 6 k bytes.
        values: ``'logprobs'`` or ``'logits'``.
        temperature: T > 0 of the stored log-probabilities; 1 for ``'logits'``.
        dtype: of the stored values. ``torch.float16`` has 11 significant bits and reaches 65504; ``torch.bfloat16`` has
            8 and the range of float32. Arithmetic is done in float32 (float64 for float64 logits) and rounded once.
        rows_per_shard: rows of a file, and the most rows held in memory besides one batch.

    Raises:
        TypeError: ``k`` or ``rows_per_shard`` is not an int, ``temperature`` not a number.
        ValueError: an option or number out of range, or a temperature other than 1 with ``values='logits'``.
        FileExistsError: ``path`` is not an empty folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        k: int,
        values: str = "logprobs",
        temperature: float = 1.0,
        dtype: torch.dtype = torch.float16,
        rows_per_shard: int = 2**18,
    ) -> None:
        checks.check_count("k", k, 1)
        checks.check_option("values", values, VALUES)
        checks.check_temperature(temperature)
        checks.check_option("dtype", dtype, tuple(DTYPES.values()))
        checks.check_count("rows_per_shard", rows_per_shard, 1)
        if values == "logits" and temperature != 1:
            raise ValueError(
                f"temperature must be 1 for values='logits', got {temperature}: logits are stored as they are, "
                "give the temperature to the loss"
            )
        self.path = Path(path)
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise FileExistsError(f"path must be a new or an empty folder, got {self.path}: remove what is there first")
        self.path.mkdir(parents=True, exist_ok=True)
        self.k, self.values, self.temperature, self.dtype = k, values, float(temperature), dtype
        self.vocabulary: int | None = None  # known from the first append on
        self._rows_per_shard = rows_per_shard
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._waiting_rows = 0
        self._shards: list[dict[str, int]] = []
        self._closed = False

    @torch.no_grad()
    def append(self, teacher_logits: Tensor) -> None:
        """Store the rows of ``teacher_logits`` (…, V), of any floating dtype and on any device, in their order.

        To leave rows out (padding), select before: ``append(logits[mask])``.

        Raises:
            TypeError: not a tensor of a floating dtype.
            ValueError: V differs from what was appended before or is less than k; a value to store is NaN, +inf or
                beyond the range of ``dtype``; the writer is closed.
        """
        self._check_open()
        checks.check_tensor("teacher_logits", teacher_logits)
        if teacher_logits.dim() == 0:
            raise ValueError("teacher_logits must have shape (..., V), got a tensor without dimensions")
        vocabulary = teacher_logits.shape[-1]
        if self.vocabulary not in (None, vocabulary):
            raise ValueError(f"teacher_logits has {vocabulary} classes, but the rows before had {self.vocabulary}")
        checks.check_k(self.k, vocabulary, "V")
        logits = teacher_logits.reshape(-1, vocabulary)
        exact, indices = logits.topk(self.k, dim=-1)
        if self.values == "logprobs":
            exact = (widen(logits) / self.temperature).log_softmax(dim=-1).gather(-1, indices)
        rounded = exact.to(self.dtype)
        # A class without any mass, -inf, is as good as not stored; what only rounds to infinity is not.
        unfit = ~rounded.isfinite() & (exact != -torch.inf)
        if bool(unfit.any()):
            raise ValueError(
                f"the {self.values} to store must fit {self.dtype}, whose largest is {torch.finfo(self.dtype).max:g}, "
                f"got {exact[unfit][0].item()}"
            )
        self.vocabulary = vocabulary
        self._waiting.append((rounded.cpu(), indices.to("cpu", torch.int32)))
        self._waiting_rows += len(rounded)
        if self._waiting_rows >= self._rows_per_shard:
            self._write_waiting(self._waiting_rows // self._rows_per_shard * self._rows_per_shard)

    def close(self) -> None:
        """Write the rows still in memory, then the index. Called at the end of a ``with`` block.

        Raises:
            ValueError: nothing was ever appended.
        """
        if self._closed:
            return
        if self.vocabulary is None:
            raise ValueError(f"nothing was appended to the store {self.path}: its vocabulary is not known")
        self._write_waiting(self._waiting_rows)
        index = {**self._metadata(), "rows": sum(shard["rows"] for shard in self._shards), "shards": self._shards}
        unfinished = self.path / (INDEX + ".tmp")
        with unfinished.open("w") as file:
            json.dump(index, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path / INDEX)
        self._closed = True

    def __enter__(self) -> TeacherWriter:
        self._check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"the store {self.path} is closed: it cannot be added to")

    def _metadata(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "version": VERSION,
            "vocabulary": self.vocabulary,
            "k": self.k,
            "temperature": self.temperature,
            "values": self.values,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def _write_waiting(self, count: int) -> None:
        """Move the first ``count`` rows from memory to shards."""
        metadata = {name: str(value) for name, value in self._metadata().items()}
        values, indices = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        for start in range(0, count, self._rows_per_shard):
            rows = slice(start, min(start + self._rows_per_shard, count))
            path = shard_path(self.path, len(self._shards))
            save_file({"values": values[rows].clone(), "indices": indices[rows].clone()}, path, metadata=metadata)
            self._shards.append({"rows": rows.stop - rows.start, "bytes": path.stat().st_size})
        self._waiting = [(values[count:].clone(), indices[count:].clone())]  # a view would keep all rows alive
        self._waiting_rows -= count


class TeacherReader:
    """A stored teacher, memory-mapped: ``reader[rows]`` is a pair (values, indices) of these rows.

    ``rows`` is an int, which gives shape (k,), or a slice or a 1-D tensor of int64 or int32, which give (n, k).
    Negative rows count from the end. The pair is a copy on the CPU, of the stored dtype and int32, as
    :func:`kdfast.topk_kl_divergence` takes it. Only the rows asked for are read. It is a map-style data set for
    ``torch.utils.data.DataLoader``, also with workers.

    Args:
        path: the folder that :class:`TeacherWriter` wrote.

    Attributes:
        vocabulary: V, the number of classes of the teacher.
        k: classes stored a row.
        values: ``'logprobs'`` or ``'logits'``.
        temperature: T that the log-probabilities were softened with.
        dtype: of the values.

    Raises:
        FileNotFoundError: no index: nothing was written there, or the write did not end.
        ValueError: not a store, a version this reader does not know, or an index or shards that are not as they were
            written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            index = json.loads((self.path / INDEX).read_text())
        except (FileNotFoundError, NotADirectoryError):
            kind = "its write did not end" if shard_path(self.path, 0).exists() else "it is no stored teacher"
            raise FileNotFoundError(f"{self.path} has no {INDEX}: {kind}") from None
        except ValueError as error:
            raise ValueError(f"{self.path / INDEX} is not JSON: {error}") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            raise ValueError(f"{self.path / INDEX} is not the index of a stored teacher")
        if index.get("version") != VERSION:
            raise ValueError(f"{self.path} has version {index.get('version')}, this kdfast reads version {VERSION}")
        _check_index(self.path / INDEX, index)
        self.vocabulary: int = index["vocabulary"]
        self.k: int = index["k"]
        self.values: str = index["values"]
        self.temperature: float = index["temperature"]
        self.dtype: torch.dtype = DTYPES[index["dtype"]]
        for number, shard in enumerate(index["shards"]):
            file = shard_path(self.path, number)
            size = file.stat().st_size if file.exists() else 0
            if size != shard["bytes"]:
                raise ValueError(f"{file} is damaged: it has {size} bytes and was written with {shard['bytes']}")
        self._rows: list[int] = [shard["rows"] for shard in index["shards"]]
        self._ends = torch.tensor(self._rows, dtype=torch.int64, device="cpu").cumsum(0)
        self._mapped: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return sum(self._rows)

    def __getitem__(self, rows: int | slice | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(rows, slice):
            wanted = range(len(self))[rows]
            return self._read(wanted.start + wanted.step * torch.arange(len(wanted), device="cpu"))
        if isinstance(rows, Tensor):
            checks.check_tensor("rows", rows, (torch.int64, torch.int32))
            if rows.dim() != 1:
                raise ValueError(f"rows must have shape (n,), got {tuple(rows.shape)}")
            return self._read(rows.to("cpu", torch.int64))
        if isinstance(rows, bool) or not isinstance(rows, int):
            raise TypeError(f"rows must be an int, a slice or a 1-D tensor, got {type(rows).__name__}")
        values, indices = self._read(torch.tensor([rows], device="cpu"))
        return values[0], indices[0]

    def __reduce__(self) -> tuple[type[TeacherReader], tuple[Path]]:
        return TeacherReader, (self.path,)  # a worker maps the files itself; mapped tensors would be sent in full

    def _read(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of ``rows``, an int64 tensor (n,)."""
        count = len(self)
        outside = (rows < -count) | (rows >= count)
        if bool(outside.any()):
            raise IndexError(f"rows must lie in [{-count}, {count}), got {rows[outside][0].item()}")
        rows = rows.where(rows >= 0, rows + count)
        values = torch.empty(len(rows), self.k, dtype=self.dtype, device="cpu")
        indices = torch.empty(len(rows), self.k, dtype=torch.int32, device="cpu")
        shards = torch.bucketize(rows, self._ends, right=True)
        for number in shards.unique().tolist():
            here = (shards == number).nonzero().squeeze(-1)
            inside = rows[here] - (self._ends[number] - self._rows[number])
            shard_values, shard_indices = self._map(number)
            values[here], indices[here] = shard_values[inside], shard_indices[inside]
        return values, indices

    def _map(self, number: int) -> tuple[Tensor, Tensor]:
        """Values and indices of a shard; for PyTorch, safetensors hands out views of the mapped file."""
        if number not in self._mapped:
            path = shard_path(self.path, number)
            try:
                with safe_open(path, framework="pt") as file:
                    values, indices = file.get_tensor("values"), file.get_tensor("indices")
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            shape = (self._rows[number], self.k)
            if not (values.shape == indices.shape == shape and values.dtype == self.dtype):
                raise ValueError(
                    f"{path} does not belong to its {INDEX}: it holds {tuple(values.shape)} values of {values.dtype}, "
                    f"expected {shape} of {self.dtype}"
                )
            self._mapped[number] = (values, indices)
        return self._mapped[number]


def shard_path(path: Path, number: int) -> Path:
    """Named by position, so that an index cannot name files elsewhere."""
    return path / f"shard-{number:05d}.safetensors"


def _check_index(file: Path, index: dict[str, Any]) -> None:
    """``index``, read from ``file``, holds all that the reader takes from it."""
    try:
        checks.check_count("vocabulary", index["vocabulary"], 1)
        checks.check_k(index["k"], index["vocabulary"], "vocabulary")
        checks.check_option("values", index["values"], VALUES)
        checks.check_temperature(index["temperature"])
        checks.check_option("dtype", index["dtype"], tuple(DTYPES))
        shards = index["shards"]
        if not isinstance(shards, list) or not all(isinstance(shard, dict) for shard in shards):
            raise TypeError(f"shards must be a list of objects, got {shards!r:.60}")
        for shard in shards:
            checks.check_count("rows of a shard", shard["rows"], 1)
            checks.check_count("bytes of a shard", shard["bytes"], 1)
        if index["rows"] != sum(shard["rows"] for shard in shards):
            raise ValueError(f"rows must be the sum over its shards, got {index['rows']!r}")
    except KeyError as error:
        raise ValueError(f"{file} is damaged: it has no {error}") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
