"""Similarity graphs and the loss on them: kdfast, eager PyTorch, torch.compile, faiss and KeOps; time and memory by N.

``python benchmarks/graph.py`` measures everything (CPU: about four minutes on two cores) and saves it in
``benchmarks/results``; ``--device cuda`` does the same on a GPU, in bfloat16. 'graph' is forward alone, as faiss and
KeOps have no gradient; 'graph loss' is forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast
from harness import Case, Loss, Options, Step, main, step

try:
    import faiss
except ImportError:
    faiss = None
try:
    from pykeops.torch import LazyTensor
except Exception:  # it looks for compilers when imported, and fails in many ways where there are none
    LazyTensor = None

K = 20
TEMPERATURE = 0.5
SHAPES = [(1024, 128), (4096, 512), (8192, 128), (65536, 128)]
LOSS_SHAPES = [(1024, 128), (8192, 128)]
GPU_SHAPES = [(16384, 512)]
FLOAT32_SHAPES = [(8192, 128), (16384, 512)]  # on a GPU too, where the others are bfloat16
QUICK_SHAPES = SHAPES[:1]
MATRIX_ROWS = 16384  # more rows than this have no N x N matrix here, and no floor: 65536 would take 17 GB
KEOPS_ROWS = 1024  # at D = 128 it takes a hundred times longer, beyond that more
BLOCK = 2048  # rows of the product that the truth and the floor hold at a time
SAMPLED_ROWS = 1024  # beyond MATRIX_ROWS the values of so many are checked
BUDGET = 3.0  # seconds for each case

BASELINES = {"eager": ("eager",), "torch.compile": ("compiled",), "faiss": ("faiss",), "KeOps": ("KeOps",)}


def eager_graph(features: Tensor) -> tuple[Tensor, Tensor]:
    """What people write."""
    unit = F.normalize(widened(features), dim=1)
    return (unit @ unit.T).fill_diagonal_(-torch.inf).topk(K, dim=1)


def widened(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def graph_by_blocks(features: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The graph of ``rows`` (None: all) without the matrix: the truth, in float64, at any N."""
    unit = F.normalize(widened(features), dim=1)
    found = []
    for block in (torch.arange(len(unit), device=unit.device) if rows is None else rows).split(BLOCK):
        similarities = unit[block] @ unit.T
        similarities.scatter_(1, block.unsqueeze(1), -torch.inf)
        found.append(similarities.topk(K, dim=1))
    values, indices = zip(*found, strict=True)
    return torch.cat(values), torch.cat(indices)


def faiss_values(features: Tensor) -> Tensor:
    """faiss finds each row itself first."""
    unit = F.normalize(features, dim=1).numpy()
    return torch.from_numpy(faiss.knn(unit, unit, K + 1, metric=faiss.METRIC_INNER_PRODUCT)[0])[:, 1:]


def keops_values(features: Tensor) -> Tensor:
    unit = F.normalize(features.float(), dim=1)
    similarities = (LazyTensor(unit[:, None, :]) * LazyTensor(unit[None, :, :])).sum(-1)
    return -(-similarities).Kmin(K + 1, dim=1)[:, 1:]


def kdfast_values(features: Tensor) -> Tensor:
    return kdfast.similarity_graph(features, K).values


def forced(backend: str, features: Tensor) -> Tensor:
    """By the kernels of ``backend``, whichever are the default."""
    with kdfast.backends.use(backend):
        return kdfast_values(features)


def own_product_values(features: Tensor) -> Tensor:
    """By the launcher that is no backend before it is measured."""
    from kdfast.ops.graph import METRICS, product  # needs triton

    return product.graph(features, None, None, K, METRICS["cosine"], False, True)[0]


def values_by_blocks(features: Tensor, rows: Tensor | None = None) -> Tensor:
    return graph_by_blocks(features, rows)[0]


def eager_loss(student: Tensor, teacher: Tensor) -> Tensor:
    values, indices = eager_graph(teacher)
    unit = F.normalize(widened(student), dim=1)
    return edge_loss((unit @ unit.T).gather(1, indices), values)


def loss_at_edges(student: Tensor, teacher: Tensor) -> Tensor:
    """The same without the matrix: the truth."""
    values, indices = graph_by_blocks(teacher)
    unit = F.normalize(widened(student), dim=1)
    return edge_loss((unit.unsqueeze(1) * unit[indices]).sum(dim=-1), values)


def edge_loss(at_edges: Tensor, values: Tensor) -> Tensor:
    log_p_student, log_p_teacher = (F.log_softmax(x / TEMPERATURE, dim=1) for x in (at_edges, values))
    return F.kl_div(log_p_student, log_p_teacher, reduction="batchmean", log_target=True)


def draw(shape: tuple[int, int], seed: int, options: Options) -> Tensor:
    generator = torch.Generator(options.device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=options.device).to(options.dtype)


def floors(features: Tensor) -> dict[str, Callable[[], object]]:
    """The vendor's whole product, in blocks of rows: kdfast computes half of it on the CPU, and may be below."""
    unit = F.normalize(features.detach(), dim=1)
    out = torch.empty(min(BLOCK, len(unit)), len(unit), dtype=unit.dtype, device=unit.device)

    def product() -> None:
        for block in unit.split(BLOCK):
            torch.mm(block, unit.T, out=out[: len(block)])

    return {"x @ x.T": product}


def compiled(loss: Loss, inputs: dict[str, Tensor]) -> Step:
    return step(torch.compile(lambda **tensors: loss(**tensors), fullgraph=True, dynamic=False), inputs)


def graph_case(shape: tuple[int, int], options: Options) -> Case:
    inputs = {"features": draw(shape, 0, options)}
    candidates = {"kdfast": step(kdfast_values, inputs)}
    if kdfast.backends.can_run(kdfast.backends.CUDA, "graph", options.device.type)[0]:
        for backend in (kdfast.backends.TRITON, kdfast.backends.CUDA):
            candidates[f"kdfast, {backend}"] = step(partial(forced, backend), inputs)
        if options.dtype in (torch.float16, torch.bfloat16):
            candidates["kdfast, product"] = step(own_product_values, inputs)
    if shape[0] <= MATRIX_ROWS:
        candidates["eager"] = step(lambda features: eager_graph(features)[0], inputs)
        candidates["compiled"] = compiled(lambda features: eager_graph(features)[0], inputs)
    if faiss is not None and options.device.type == "cpu" and options.dtype == torch.float32:
        faiss.omp_set_num_threads(torch.get_num_threads())
        candidates["faiss"] = step(faiss_values, inputs)
    if LazyTensor is not None and shape[0] <= KEOPS_ROWS:
        candidates["KeOps"] = step(keops_values, inputs)
    n, device = shape[0], options.device
    rows = None if n <= MATRIX_ROWS else torch.linspace(0, n - 1, SAMPLED_ROWS, device=device).long()
    return make_case("graph", shape, inputs, partial(values_by_blocks, rows=rows), candidates, sampled=rows)


def loss_case(shape: tuple[int, int], options: Options) -> Case:
    inputs = {"student": draw(shape, 0, options).requires_grad_(), "teacher": draw(shape, 1, options)}
    fast = partial(kdfast.graph_distillation_loss, k=K, temperature=TEMPERATURE)
    candidates = {"kdfast": step(fast, inputs), "eager": step(eager_loss, inputs)}
    candidates["compiled"] = compiled(eager_loss, inputs)
    return make_case("graph loss", shape, inputs, loss_at_edges, candidates)


def make_case(
    name: str,
    shape: tuple[int, int],
    inputs: dict[str, Tensor],
    reference: Loss,
    candidates: dict[str, Step],
    sampled: Tensor | None = None,
) -> Case:
    features = next(iter(inputs.values()))
    matrix = shape[0] ** 2 * widened(features[:0]).element_size()
    matrix_fits = shape[0] <= MATRIX_ROWS
    return Case(
        name=name,
        shape=shape,
        inputs=inputs,
        reference=reference,
        candidates=candidates,
        baselines=BASELINES,
        floors=floors(features) if matrix_fits else {},
        ours=tuple(label for label in candidates if label.startswith("kdfast")),
        floor_bytes=sum(tensor.nbytes for tensor in inputs.values()) + 12 * K * shape[0],
        peers=frozenset({"faiss", "KeOps", "kdfast, product"}),  # no GPU has run the last yet
        sampled=sampled,
        matrix_bytes=matrix,
        needs_bytes={} if matrix_fits else {"eager": matrix, "torch.compile": matrix},
    )


def cases(options: Options) -> list[Callable[[], Case]]:
    cuda = options.device.type == "cuda"
    shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES + (GPU_SHAPES if cuda else []))
    chosen = [partial(graph_case, shape, options) for shape in shapes]
    if cuda and not options.shapes:  # the same kernel with other products
        chosen += [partial(graph_case, shape, replace(options, dtype=torch.float32)) for shape in FLOAT32_SHAPES]
    return chosen + [partial(loss_case, shape, options) for shape in shapes if shape in LOSS_SHAPES]


if __name__ == "__main__":
    main(__file__, cases, BUDGET)
