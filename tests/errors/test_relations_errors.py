"""Every kind of bad argument of the relation losses is refused, in words that name it, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from kdfast.functional.relations import (
    CRDLoss,
    crd_loss,
    graph_distillation_loss,
    hardest_negatives,
    rkd_angle_loss,
    rkd_distance_loss,
    rkd_loss,
    rkd_sequence_angle_loss,
    similarity_graph,
    similarity_preserving_loss,
)

x = torch.zeros(4, 3)
labels = torch.tensor([0, 1, 0, 1])
sequence = torch.zeros(2, 5, 3)
nan, inf = float("nan"), float("inf")


def crd_of_labels(student: object, teacher: object, **options: object) -> torch.Tensor:
    return crd_loss(student, teacher, labels, **options)


def negatives_of(features: object, **options: object) -> object:
    return hardest_negatives(features, labels, 2, **options)


graph_of = partial(similarity_graph, k=2)

# What the losses on pairs of (N, …) have in common.
PAIRS = [
    ("student not a tensor", lambda f: f([[1.0]], x), TypeError, "student must be a torch.Tensor, got list"),
    ("teacher not a tensor", lambda f: f(x, None), TypeError, "teacher must be a torch.Tensor, got NoneType"),
    ("integer student", lambda f: f(x.long(), x), TypeError, "student must have dtype .*, got torch.int64"),
    ("complex teacher", lambda f: f(x, x.cfloat()), TypeError, "teacher must have dtype .*, got torch.complex64"),
    ("two dtypes", lambda f: f(x, x.half()), TypeError, "same dtype, got torch.float32 and torch.float16"),
    ("two devices", lambda f: f(x, x.to("meta")), ValueError, "teacher is on meta but student is on cpu"),
    ("1-D student", lambda f: f(x[0], x), ValueError, r"student must have shape \(N, ...\) .*, got \(3,\)"),
    ("0-D teacher", lambda f: f(x, x[0, 0]), ValueError, r"teacher must have shape \(N, ...\) .*, got \(\)"),
    ("numbers of rows", lambda f: f(x, x[:2]), ValueError, "same number of rows, got 4 and 2"),
]
PAIR_FUNCTIONS = {
    "similarity": similarity_preserving_loss,
    "rkd distance": rkd_distance_loss,
    "rkd angle": rkd_angle_loss,
    "rkd": rkd_loss,
    "crd": crd_of_labels,
    "graph loss": graph_distillation_loss,
}

# What the functions of one set of features have in common.
SINGLES = [
    ("not a tensor", lambda f: f([[1.0]]), TypeError, "features must be a torch.Tensor, got list"),
    ("integers", lambda f: f(x.long()), TypeError, "features must have dtype .*, got torch.int64"),
    ("1-D", lambda f: f(x[:, 0]), ValueError, r"features must have shape \(N, ...\) .*, got \(4,\)"),
]
SINGLE_FUNCTIONS = {"graph": graph_of, "negatives": negatives_of}

METRIC = "metric must be 'cosine', 'dot' or 'euclidean', got "
METRICS = [
    ("metric unknown", "l2", ValueError, METRIC + "'l2'"),
    ("metric None", None, ValueError, METRIC + "None"),
]
METRIC_FUNCTIONS = {
    "graph": lambda metric: graph_of(x, metric=metric),
    "graph loss": lambda metric: graph_distillation_loss(x, x, metric=metric),
    "negatives": lambda metric: negatives_of(x, metric=metric),
}

TEMPERATURES = [
    ("temperature 0", 0.0, ValueError, "temperature must be greater than 0, got 0.0"),
    ("temperature below 0", -1.0, ValueError, "temperature must be greater than 0, got -1.0"),
    ("temperature NaN", nan, ValueError, "temperature must be finite, got nan"),
    ("temperature infinite", inf, ValueError, "temperature must be finite, got inf"),
    ("temperature a tensor", torch.tensor(1.0), TypeError, "temperature must be a float, got Tensor"),
]
TEMPERATURE_FUNCTIONS = {
    "crd": lambda temperature: crd_of_labels(x, x, temperature=temperature),
    "graph loss": lambda temperature: graph_distillation_loss(x, x, temperature=temperature),
    "memory": lambda temperature: CRDLoss(3, 3, 4, temperature=temperature),
}

WEIGHTS = [
    ("below 0", -1.0, ValueError, "must be at least 0, got -1.0"),
    ("NaN", nan, ValueError, "must be finite, got nan"),
    ("infinite", inf, ValueError, "must be finite, got inf"),
    ("a string", "1", TypeError, "must be a float, got str"),
]
WEIGHT_FUNCTIONS = {"distance_weight": rkd_loss, "angle_weight": rkd_loss, "alignment_weight": crd_of_labels}

RKD_FUNCTIONS = {"rkd distance": rkd_distance_loss, "rkd angle": rkd_angle_loss, "rkd": rkd_loss}
RKD_ROWS = [
    ("mask float", {"mask": torch.ones(4)}, TypeError, "mask must have dtype torch.bool, got torch.float32"),
    ("mask too short", {"mask": torch.ones(3).bool()}, ValueError, r"mask must have shape \(4,\), got \(3,\)"),
    (
        "weights of integers",
        {"row_weight": torch.ones(4).long()},
        TypeError,
        "row_weight must have dtype .*, got torch.i",
    ),
    ("weights 2-D", {"row_weight": torch.ones(4, 1)}, ValueError, r"row_weight must have shape \(4,\), got \(4, 1\)"),
    (
        "weights on another device",
        {"row_weight": torch.ones(4, device="meta")},
        ValueError,
        "row_weight is on meta but",
    ),
    (
        "reduction none",
        {"reduction": "none"},
        ValueError,
        r"must be 'sum' or 'mean', got 'none': .* N\^2 pairs or N\^3",
    ),
    (
        "reduction batchmean",
        {"reduction": "batchmean"},
        ValueError,
        "reduction must be 'sum' or 'mean', got 'batchmean'",
    ),
]
RKD_TRIPLETS = [
    ("triplets 0", {"triplets": 0}, ValueError, "triplets must be 'all' or at least 1, got 0"),
    ("triplets unknown", {"triplets": "some"}, ValueError, "triplets must be 'all', got 'some'"),
    ("triplets a float", {"triplets": 2.0}, TypeError, "triplets must be 'all' or an int, got float"),
    ("triplets a bool", {"triplets": True}, TypeError, "triplets must be 'all' or an int, got bool"),
    ("generator a seed", {"generator": 3}, TypeError, "generator must be a torch.Generator, got int"),
]

# k of: (function of k, smallest k that is too large, what its message says)
K_FUNCTIONS = {
    "graph": (lambda k: similarity_graph(x, k), 4, "k must be between 1 and N - 1 = 3, got 4"),
    "graph with self": (
        lambda k: similarity_graph(x, k, include_self=True),
        5,
        "k must be between 1 and N = 4, got 5",
    ),
    "graph with keys": (
        lambda k: similarity_graph(x, k, keys=torch.zeros(7, 3)),
        8,
        "k must be between 1 and M = 7, got 8",
    ),
    "negatives": (lambda k: hardest_negatives(x, labels, k), 5, "k must be between 1 and N = 4, got 5"),
}

LABELS = [
    ("labels not a tensor", [0, 1, 0, 1], TypeError, "labels must be a torch.Tensor, got list"),
    ("labels float", labels.float(), TypeError, "labels must have dtype torch.int64, got torch.float32"),
    ("labels int32", labels.int(), TypeError, "labels must have dtype torch.int64, got torch.int32"),
    ("labels too few", labels[:3], ValueError, r"labels must have shape \(4,\), got \(3,\)"),
    ("labels 2-D", labels[:, None], ValueError, r"labels must have shape \(4,\), got \(4, 1\)"),
    ("labels on another device", labels.to("meta"), ValueError, "labels is on meta but (the student|features) is on"),
]
LABEL_FUNCTIONS = {
    "crd": lambda labels: crd_loss(x, x, labels),
    "negatives": lambda labels: hardest_negatives(x, labels, 1),
}


def memory_call(**changes: object) -> object:
    arguments = {"student": torch.zeros(2, 3), "teacher": torch.zeros(2, 5), "indices": torch.tensor([0, 1])}
    negatives = changes.pop("negatives", None)
    return CRDLoss(3, 5, 4, num_negatives=2)(**{**arguments, **changes}, negatives=negatives)


ERRORS = [
    *[
        (f"{function}: {name}", partial(call, f), exception, match)
        for function, f in PAIR_FUNCTIONS.items()
        for name, call, exception, match in PAIRS
    ],
    *[
        (f"{function}: {name}", partial(call, f), exception, match)
        for function, f in SINGLE_FUNCTIONS.items()
        for name, call, exception, match in SINGLES
    ],
    *[
        (f"{function}: {name}", partial(f, value), exception, match)
        for functions, table in (
            (METRIC_FUNCTIONS, METRICS),
            (TEMPERATURE_FUNCTIONS, TEMPERATURES),
            (LABEL_FUNCTIONS, LABELS),
        )
        for function, f in functions.items()
        for name, value, exception, match in table
    ],
    *[
        (f"{argument} {name}", partial(f, x, x, **{argument: value}), exception, f"{argument} {match}")
        for argument, f in WEIGHT_FUNCTIONS.items()
        for name, value, exception, match in WEIGHTS
    ],
    *[
        row
        for function, (f, too_large, match) in K_FUNCTIONS.items()
        for row in (
            (f"{function}: k 0", partial(f, 0), ValueError, "k must be between 1 and .*, got 0"),
            (f"{function}: k too large", partial(f, too_large), ValueError, match),
            (f"{function}: k a float", partial(f, 2.0), TypeError, "k must be an int, got float"),
            (f"{function}: k a bool", partial(f, True), TypeError, "k must be an int, got bool"),
        )
    ],
    *[
        (f"{function}: {name}", partial(f, x, x, **options), exception, match)
        for function, f in RKD_FUNCTIONS.items()
        for name, options, exception, match in RKD_ROWS
    ],
    *[
        (f"{function}: {name}", partial(f, x, x, **options), exception, match)
        for function, f in list(RKD_FUNCTIONS.items())[1:]
        for name, options, exception, match in RKD_TRIPLETS
    ],
    ("graph: one row has no neighbour", lambda: similarity_graph(x[:1], 1), ValueError, "between 1 and N - 1 = 0, got"),
    ("graph: default k, small batch", lambda: similarity_graph(x), ValueError, "between 1 and N - 1 = 3, got 20"),
    ("negatives: no rows", lambda: hardest_negatives(x[:0], labels[:0], 1), ValueError, "between 1 and N = 0, got 1"),
    ("graph loss: k 0", lambda: graph_distillation_loss(x, x, k=0), ValueError, "k must be at least 1, got 0"),
    ("graph loss: k below 0", lambda: graph_distillation_loss(x, x, k=-3), ValueError, "k must be at least 1, got -3"),
    ("graph loss: k a float", lambda: graph_distillation_loss(x, x, k=2.0), TypeError, "k must be an int, got float"),
    ("graph loss: k a bool", lambda: graph_distillation_loss(x, x, k=True), TypeError, "k must be an int, got bool"),
    ("keys not a tensor", lambda: graph_of(x, keys=[[1.0]]), TypeError, "keys must be a torch.Tensor, got list"),
    ("keys 1-D", lambda: graph_of(x, keys=x[0]), ValueError, r"keys must have shape \(N, ...\) .*, got \(3,\)"),
    ("keys of another width", lambda: graph_of(x, keys=x[:, :2]), ValueError, r"keys must have rows .*\(3,\).*\(2,\)"),
    ("keys of another dtype", lambda: graph_of(x, keys=x.double()), TypeError, "features and keys .* same dtype, got"),
    ("keys on another device", lambda: graph_of(x, keys=x.to("meta")), ValueError, "keys is on meta but features is"),
    ("keys with include_self", lambda: graph_of(x, keys=x, include_self=True), ValueError, "include_self=True has no"),
    (
        "sequence: not a tensor",
        lambda: rkd_sequence_angle_loss(sequence, [0.0]),
        TypeError,
        "teacher must be a torch.Tensor, got list",
    ),
    (
        "sequence: integers",
        lambda: rkd_sequence_angle_loss(sequence.int(), sequence),
        TypeError,
        "student must have dtype .*, got torch.int32",
    ),
    (
        "sequence: dtypes",
        lambda: rkd_sequence_angle_loss(sequence, sequence.double()),
        TypeError,
        "same dtype, got torch.float32 and torch.float64",
    ),
    (
        "sequence: devices",
        lambda: rkd_sequence_angle_loss(sequence, sequence.to("meta")),
        ValueError,
        "teacher is on meta but student is on cpu",
    ),
    (
        "sequence: 2-D",
        lambda: rkd_sequence_angle_loss(sequence, sequence[0]),
        ValueError,
        r"teacher must have shape \(N, L, D\), got \(5, 3\)",
    ),
    (
        "sequence: lengths",
        lambda: rkd_sequence_angle_loss(sequence, sequence[:, :4]),
        ValueError,
        r"same N and L, got \(2, 5\) and \(2, 4\)",
    ),
    (
        "sequence: numbers",
        lambda: rkd_sequence_angle_loss(sequence[:1], sequence),
        ValueError,
        r"same N and L, got \(1, 5\) and \(2, 5\)",
    ),
    (
        "sequence: too short",
        lambda: rkd_sequence_angle_loss(sequence[:, :2], sequence[:, :2]),
        ValueError,
        "L >= 3, got 2",
    ),
    (
        "sequence: mask not a tensor",
        lambda: rkd_sequence_angle_loss(sequence, sequence, mask=[True]),
        TypeError,
        "mask must be a torch.Tensor, got list",
    ),
    (
        "sequence: mask not bool",
        lambda: rkd_sequence_angle_loss(sequence, sequence, mask=torch.ones(2, 5)),
        TypeError,
        "mask must have dtype torch.bool, got torch.float32",
    ),
    (
        "sequence: mask of the angles",
        lambda: rkd_sequence_angle_loss(sequence, sequence, mask=torch.ones(2, 3, dtype=torch.bool)),
        ValueError,
        r"mask must have shape \(2, 5\), got \(2, 3\)",
    ),
    (
        "sequence: mask on another device",
        lambda: rkd_sequence_angle_loss(sequence, sequence, mask=torch.ones(2, 5, dtype=torch.bool, device="meta")),
        ValueError,
        "mask is on meta",
    ),
    ("memory: student_dim 0", lambda: CRDLoss(0, 3, 4), ValueError, "student_dim must be at least 1, got 0"),
    ("memory: teacher_dim 0", lambda: CRDLoss(3, 0, 4), ValueError, "teacher_dim must be at least 1, got 0"),
    ("memory: num_samples 0", lambda: CRDLoss(3, 3, 0), ValueError, "num_samples must be at least 1, got 0"),
    ("memory: num_samples a float", lambda: CRDLoss(3, 3, 4.0), TypeError, "num_samples must be an int, got float"),
    ("memory: feature_dim 0", lambda: CRDLoss(3, 3, 4, feature_dim=0), ValueError, "feature_dim must be at least 1"),
    (
        "memory: num_negatives 0",
        lambda: CRDLoss(3, 3, 4, num_negatives=0),
        ValueError,
        "num_negatives must be at least 1, got 0",
    ),
    (
        "memory: momentum above 1",
        lambda: CRDLoss(3, 3, 4, momentum=1.5),
        ValueError,
        "momentum must be between 0 and 1, got 1.5",
    ),
    (
        "memory: momentum below 0",
        lambda: CRDLoss(3, 3, 4, momentum=-0.1),
        ValueError,
        "momentum must be between 0 and 1, got -0.1",
    ),
    (
        "memory: sample_weight of another shape",
        lambda: CRDLoss(3, 3, 4, sample_weight=torch.ones(3)),
        ValueError,
        r"sample_weight must have shape \(4,\), got \(3,\)",
    ),
    (
        "memory: sample_weight below 0",
        lambda: CRDLoss(3, 3, 4, sample_weight=torch.tensor([1.0, -1.0, 1.0, 1.0])),
        ValueError,
        "sample_weight must be finite and greater than 0, got -1.0",
    ),
    (
        "memory: sample_weight 0",
        lambda: CRDLoss(3, 3, 4, sample_weight=torch.tensor([1.0, 0.0, 1.0, 1.0])),
        ValueError,
        "sample_weight must be finite and greater than 0, got 0.0",
    ),
    (
        "memory: sample_weight of integers",
        lambda: CRDLoss(3, 3, 4, sample_weight=torch.ones(4, dtype=torch.int64)),
        TypeError,
        "sample_weight must have dtype .*, got torch.int64",
    ),
    (
        "memory: sample_weight NaN",
        lambda: CRDLoss(3, 3, 4, sample_weight=torch.tensor([1.0, nan, 1.0, 1.0])),
        ValueError,
        "sample_weight must be finite and greater than 0, got nan",
    ),
    (
        "memory: student not a tensor",
        lambda: memory_call(student=[[1.0]]),
        TypeError,
        "student must be a torch.Tensor, got list",
    ),
    (
        "memory: student of another width",
        lambda: memory_call(student=torch.zeros(2, 5)),
        ValueError,
        "student_dim = 3.*5",
    ),
    (
        "memory: teacher of another width",
        lambda: memory_call(teacher=torch.zeros(2, 3)),
        ValueError,
        "teacher_dim = 5.*3",
    ),
    ("memory: 1-D student", lambda: memory_call(student=torch.zeros(3)), ValueError, "student must have shape .*3"),
    (
        "memory: numbers of rows",
        lambda: memory_call(teacher=torch.zeros(3, 5)),
        ValueError,
        "number of rows, got 2 and 3",
    ),
    ("memory: too few indices", lambda: memory_call(indices=torch.tensor([0])), ValueError, r"indices must .*\(1,\)"),
    (
        "memory: float indices",
        lambda: memory_call(indices=torch.zeros(2)),
        TypeError,
        "indices must have dtype torch.int64, got torch.float32",
    ),
    (
        "memory: index outside the training set",
        lambda: memory_call(indices=torch.tensor([0, 4])),
        ValueError,
        r"indices must lie in \[0, 4\), got 4",
    ),
    (
        "memory: negatives of other rows",
        lambda: memory_call(negatives=torch.tensor([[2, 3]])),
        ValueError,
        r"negatives must have shape \(N, K\) with N = 2 and K >= 1, got \(1, 2\)",
    ),
    (
        "memory: no negatives",
        lambda: memory_call(negatives=torch.zeros(2, 0, dtype=torch.int64)),
        ValueError,
        r"negatives must have shape \(N, K\) with N = 2 and K >= 1, got \(2, 0\)",
    ),
    (
        "memory: features on another device",
        lambda: memory_call(student=torch.zeros(2, 3, device="meta")),
        ValueError,
        "student is on meta but student_projection is on cpu",
    ),
    (
        "memory: indices on another device",
        lambda: memory_call(indices=torch.zeros(2, dtype=torch.int64, device="meta")),
        ValueError,
        "indices is on meta",
    ),
    (
        "memory: float negatives",
        lambda: memory_call(negatives=torch.ones(2, 2)),
        TypeError,
        "negatives must have dtype torch.int64, got torch.float32",
    ),
    (
        "memory: negative outside the training set",
        lambda: memory_call(negatives=torch.tensor([[2, 3], [-1, 3]])),
        ValueError,
        r"negatives must lie in \[0, 4\), got -1",
    ),
]


@pytest.mark.parametrize(("call", "exception", "match"), [pytest.param(*row[1:], id=row[0]) for row in ERRORS])
def test_bad_arguments_are_refused(call: Callable[[], object], exception: type[Exception], match: str) -> None:
    with pytest.raises(exception, match=match):
        call()
