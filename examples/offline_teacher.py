"""Run a teacher once, store its top classes, train students from the store: next-word models of Python's own help.

    python examples/offline_teacher.py            # about half a minute on one CPU core
    python examples/offline_teacher.py --quick    # some seconds: less text, one store

The text is that of ``help('topics')``, which comes with Python, so nothing is downloaded and the numbers differ a
little from one Python to the next. A paragraph in ten is held out. The teacher has read all other paragraphs; the
student, a fifth of them. It learns from that fifth

- by its words alone ('labels only'),
- by the teacher, which runs along at every step ('teacher online'),
- by the k best words of the teacher a position, which were stored before; the teacher is not there any more.

All students start from the same weights and see the same batches. The table gives the perplexity of the held-out words
(lower is better; of all epochs the best one, which favours 'labels only': it alone overfits), how much of the
teacher's probability its target holds, and what that takes on disk.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import re
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from pydoc_data.topics import topics
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kdfast
from kdfast.store import TeacherReader, TeacherWriter

if TYPE_CHECKING:
    from collections.abc import Callable

VOCABULARY = 1000  # the most frequent words; two classes are START and UNKNOWN
START, UNKNOWN = 0, 1
CONTEXT = 8
EVALUATION_BATCH = 4096


@dataclass
class Words:
    """Positions of a text: the words before each, (N, CONTEXT), and the word there, (N,)."""

    contexts: Tensor
    targets: Tensor


@dataclass
class Target:
    """What a student learns from: the teacher's probability that is in it, and the bytes on disk, for each position."""

    mass: float
    bytes_per_row: float


@dataclass
class Row:
    """A line of the table."""

    method: str
    perplexity: float
    seconds: float
    target: Target | None = None


class LanguageModel(nn.Module):
    """The next word from the last CONTEXT words: their embeddings side by side, one hidden layer."""

    def __init__(self, embedding: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding)
        self.hidden = nn.Linear(CONTEXT * embedding, width)
        self.classifier = nn.Linear(width, VOCABULARY)
        self.dropout = nn.Dropout(dropout)

    def forward(self, contexts: Tensor) -> Tensor:
        features = self.hidden(self.dropout(self.embedding(contexts).flatten(1))).relu()
        return self.classifier(self.dropout(features))


def load_text(share: float = 1.0) -> dict[str, Words]:
    """What the teacher reads, a fifth of it for the 'student', and a 'test' that shares no paragraph with either."""
    paragraphs = list(dict.fromkeys(text for topic in topics.values() for text in topic.split("\n\n")))
    split = [re.findall(r"\w+|[^\w\s]", text.lower()) for text in paragraphs[: int(share * len(paragraphs))]]
    train = [words for number, words in enumerate(split) if number % 10]
    counts = Counter(word for words in train for word in words)
    numbers = {word: number for number, (word, _) in enumerate(counts.most_common(VOCABULARY - 2), 2)}

    def windows(chosen: list[list[str]]) -> Words:
        contexts, targets = [], []
        for words in chosen:
            line = [START] * CONTEXT + [numbers.get(word, UNKNOWN) for word in words]
            for end in range(CONTEXT, len(line)):
                contexts.append(line[end - CONTEXT : end])
                targets.append(line[end])
        return Words(torch.tensor(contexts), torch.tensor(targets))

    return {"teacher": windows(train), "student": windows(train[::5]), "test": windows(split[::10])}


@torch.no_grad()
def perplexity(model: LanguageModel, words: Words) -> float:
    model.eval()
    logits = torch.cat([model(contexts) for contexts in words.contexts.split(EVALUATION_BATCH)])
    return math.exp(F.cross_entropy(logits, words.targets).item())


def train(
    model: LanguageModel,
    words: Words,
    test: Words,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
) -> tuple[list[float], float]:
    """Minimise ``loss(logits, rows)``: the test perplexity after each epoch, and the seconds of training."""
    generator = torch.Generator().manual_seed(0)
    steps = len(words.targets) // batch_size
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=epochs * steps)
    perplexities, seconds = [], 0.0
    for _ in range(epochs):
        start = time.perf_counter()
        model.train()
        for rows in torch.randperm(len(words.targets), generator=generator)[: steps * batch_size].view(steps, -1):
            optimiser.zero_grad()
            loss(model(words.contexts[rows]), rows).backward()
            optimiser.step()
            schedule.step()
        seconds += time.perf_counter() - start
        perplexities.append(perplexity(model, test))
    return perplexities, seconds


def train_teacher(text: dict[str, Words], epochs: int) -> LanguageModel:
    torch.manual_seed(0)
    teacher = LanguageModel(embedding=32, width=128, dropout=0.2)
    words = text["teacher"]

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits, words.targets[rows])

    train(teacher, words, text["test"], loss, epochs=epochs, batch_size=512, learning_rate=6e-3)
    return teacher.requires_grad_(False).eval()


def store_teacher(teacher: LanguageModel, words: Words, path: Path, k: int) -> Target:
    """Row i of the store is position i of the text."""
    with TeacherWriter(path, k=k) as writer:
        for contexts in words.contexts.split(EVALUATION_BATCH):
            writer.append(teacher(contexts))
    log_probabilities, _ = TeacherReader(path)[:]
    size = sum(file.stat().st_size for file in path.iterdir())
    return Target(log_probabilities.float().exp().sum(dim=1).mean().item(), size / len(words.targets))


def train_student(
    method: str,
    text: dict[str, Words],
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    target: Target | None = None,
) -> Row:
    torch.manual_seed(1)
    student = LanguageModel(embedding=24, width=48, dropout=0.0)
    perplexities, seconds = train(
        student, text["student"], text["test"], loss, epochs=epochs, batch_size=128, learning_rate=4e-3
    )
    return Row(method, min(perplexities), seconds, target)


def stored_loss(reader: TeacherReader) -> Callable[[Tensor, Tensor], Tensor]:
    """Reads the rows of the batch only, from the mapped file."""

    def loss(logits: Tensor, rows: Tensor) -> Tensor:
        values, indices = reader[rows]
        return kdfast.topk_kl_divergence(logits, values, indices, values="logprobs", tail="bucket")

    return loss


def compare(text: dict[str, Words], folder: Path, ks: list[int], teacher_epochs: int, epochs: int) -> list[Row]:
    words = text["student"]
    start = time.perf_counter()
    teacher = train_teacher(text, teacher_epochs)
    teacher_row = Row("teacher", perplexity(teacher, text["test"]), time.perf_counter() - start)
    whole = Target(1.0, VOCABULARY * torch.float16.itemsize)

    def labels(logits: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits, words.targets[rows])

    def online(logits: Tensor, rows: Tensor) -> Tensor:
        return kdfast.kl_divergence(logits, teacher(words.contexts[rows]))

    rows = [
        train_student("labels only", text, labels, epochs),
        train_student("teacher online", text, online, epochs, whole),
    ]
    targets = {k: store_teacher(teacher, words, folder / f"top{k}", k) for k in ks}
    for k, target in targets.items():
        loss = stored_loss(TeacherReader(folder / f"top{k}"))
        rows.append(train_student(f"store, k = {k}", text, loss, epochs, target))
    return [*rows, teacher_row]


def print_table(text: dict[str, Words], rows: list[Row]) -> None:
    count = len(text["student"].targets)
    print(f"{count} positions for the student, {len(text['teacher'].targets)} for the teacher, V = {VOCABULARY}")
    print(f"{'':16}{'perplexity':>11}{'train s':>9}{'mass %':>8}{'bytes a row':>13}{'MB':>7}")
    for row in rows:
        line = f"{row.method:16}{row.perplexity:11.1f}{row.seconds:9.1f}"
        if row.target is not None:
            size = row.target.bytes_per_row
            line += f"{100 * row.target.mass:8.0f}{size:13.0f}{size * count / 1e6:7.1f}"
        print(line)
    print("Sizes of 'teacher online': all its logits in float16, had they been stored.")


def main(arguments: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description="Train students from a stored teacher.")
    parser.add_argument("--quick", action="store_true", help="less text and one store: a first look")
    parser.add_argument("--output", type=Path, help="JSON file for the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # for models this small a second thread gains little, and loses much on a busy machine
    text = load_text(share=0.3 if options.quick else 1.0)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            rows = compare(text, Path(folder), ks=[64], teacher_epochs=5, epochs=10)
        else:
            rows = compare(text, Path(folder), ks=[8, 32, 64], teacher_epochs=5, epochs=6)
    print_table(text, rows)
    if options.output is not None:
        made = {"date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "python": platform.python_version(), "threads": 1}
        result = {**made, "torch": torch.__version__, "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return rows


if __name__ == "__main__":
    main()
