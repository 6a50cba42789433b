"""Losses on the relations between the rows of a batch: argument checks, choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import backends, checks
from kdfast.ops import graph, relation, rkd, rkd_sequence
from kdfast.reference import relations as reference
from kdfast.reference.crd import CRDLoss
from kdfast.reference.relations import SimilarityGraph

__all__ = [
    "CRDLoss",
    "SimilarityGraph",
    "crd_loss",
    "graph_distillation_loss",
    "hardest_negatives",
    "rkd_angle_loss",
    "rkd_distance_loss",
    "rkd_loss",
    "rkd_sequence_angle_loss",
    "similarity_graph",
    "similarity_preserving_loss",
]

METRICS = ("cosine", "dot", "euclidean")
PRECISIONS = ("ieee", "tf32")


def similarity_preserving_loss(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Squared difference of the row-normalised Gram matrices of student and teacher.

    .. math::
        G = X X^\top, \qquad L = \frac{1}{N^2} \sum_{ij}
            \left( \frac{G^s_{ij}}{\|G^s_i\|_2} - \frac{G^t_{ij}}{\|G^t_i\|_2} \right)^2.

    No positive factor and no rotation of either side changes it.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. It is the mean squared difference of a row
        divided by N, so weigh it in proportion to the batch. No rows: 0.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: numbers of rows or devices differ, fewer than 2 dimensions.

    A zero row of G (a zero row of X) stays 0, and its normalisation passes gradient 0; norms are at least 1e-12.

    Differs from torchdistill's ``SPKDLoss``, which divides the rows by their L1 norm; the paper takes L2.

    Source: Tung, Mori 2019, "Similarity-Preserving Knowledge Distillation", https://arxiv.org/abs/1907.09682.
    """
    checks.check_features(student, teacher)
    if not backends.has_kernel("relation", student):
        return reference.similarity_preserving_loss(student, teacher)
    return relation.similarity_preserving(student, teacher)


def rkd_distance_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Relational knowledge distillation of distances: Huber loss of the distances between rows over their mean.

    .. math::
        \psi_{ij} = \frac{\|x_i - x_j\|_2}{\frac{1}{N(N-1)} \sum_{k \ne l} \|x_k - x_l\|_2}, \qquad
        L = \frac{1}{N^2} \sum_{ij} w_i w_j\, h(\psi^s_{ij} - \psi^t_{ij}),

    with :math:`h(d) = d^2/2` for :math:`|d| < 1` and :math:`|d| - 1/2` beyond, and w = 1 unless given.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        mask: bool (N,), the rows to count: N is their number then. The others are not read and get gradient 0.
        row_weight: float (N,), w: a pair counts :math:`w_i w_j` times. Does not change what the means
            divide by. No gradient.
        reduction: ``'mean'``, or ``'sum'`` over all ordered pairs. ``'none'`` is refused.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. One row or none: 0.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, or the dtypes differ.
        ValueError: numbers of rows, shapes or devices differ, fewer than 2 dimensions, unknown option.

    Coincident rows are at distance 0, and their pair passes gradient 0. If all rows coincide, all distances stay 0.

    Differs from the authors' code and torchdistill's ``RKDLoss`` only for near and coincident rows. Those take squared
    distances from inner products, where the digits of near rows cancel, and clamp them to at least 1e-12, so that
    coincident rows are at distance 1e-6 or at whatever rounding left; rows that all coincide are then at equal relative
    distances of 1. A single row gives NaN there.

    Source: Park et al. 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068.
    """
    checks.check_features(student, teacher)
    _check_rows(student, mask, row_weight, reduction)
    if not backends.has_kernel("rkd", student):
        return reference.rkd_distance_loss(student, teacher, mask=mask, row_weight=row_weight, reduction=reduction)
    return rkd.rkd(student, teacher, rkd.Options(1.0, 0.0, reduction == "mean"), mask=mask, row_weight=row_weight)


def rkd_angle_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    triplets: str | int = "all",
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Relational knowledge distillation of angles: Huber loss of the cosines of the angles in all triplets of rows.

    .. math::
        \cos_{ijk} = \left\langle \frac{x_i - x_j}{\|x_i - x_j\|_2}, \frac{x_k - x_j}{\|x_k - x_j\|_2} \right\rangle,
        \qquad L = \frac{1}{N^3} \sum_{ijk} w_i w_j w_k\, h(\cos^s_{ijk} - \cos^t_{ijk}),

    with :math:`h(d) = d^2/2` for :math:`|d| < 1` and :math:`|d| - 1/2` beyond, and w = 1 unless given.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        triplets: ``'all'``, or a number M of apexes j to draw at random without replacement (N or more: all): the mean
            (or N / M times the sum) over the triplets at those. Unbiased, and N / M times cheaper, for N in the tens of
            thousands.
        generator: what the apexes are drawn from, on the device of ``student``; None: PyTorch's default, the only one
            that ``torch.compile`` can trace.
        mask: bool (N,), the rows to count: N is their number then. The others are not read and get gradient 0.
        row_weight: float (N,), w: a triplet counts :math:`w_i w_j w_k` times. Does not change what the means
            divide by. No gradient.
        reduction: ``'mean'``, or ``'sum'`` over all ordered triplets. ``'none'`` is refused.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. No rows: 0.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, the dtypes differ, or ``triplets`` is neither.
        ValueError: numbers of rows, shapes or devices differ, fewer than 2 dimensions, ``triplets`` below 1, unknown
            option.

    Neither N^3 cosines nor N^2 differences are held: on the CPU and with Triton the cosines are made of squared
    distances, in O(N^2 D + N^3) operations and O(N^2) memory, on the CPU that much for each thread.

    Two coincident rows have no direction between them: its cosines are 0 and pass gradient 0.

    Differs from the authors' code and torchdistill's ``RKDLoss`` only in the gradient of coincident rows: theirs is
    multiplied by 1e12, the inverse of the smallest norm that PyTorch's ``normalize`` divides by.

    Source: Park et al. 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068.
    """
    checks.check_features(student, teacher)
    checks.check_triplets(triplets, generator)
    _check_rows(student, mask, row_weight, reduction)
    if not backends.has_kernel("rkd", student):
        return reference.rkd_angle_loss(
            student,
            teacher,
            triplets=triplets,
            generator=generator,
            mask=mask,
            row_weight=row_weight,
            reduction=reduction,
        )
    apexes = reference.sampled_apexes(student, triplets, generator, mask)
    options = rkd.Options(0.0, 1.0, reduction == "mean")
    return rkd.rkd(student, teacher, options, mask=mask, row_weight=row_weight, apexes=apexes)


def rkd_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    distance_weight: float = 25.0,
    angle_weight: float = 50.0,
    triplets: str | int = "all",
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Relational knowledge distillation: the weighted sum of :func:`rkd_distance_loss` and :func:`rkd_angle_loss`.

    .. math:: L = \lambda_D L_{\text{distance}} + \lambda_A L_{\text{angle}}.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        distance_weight: >= 0, :math:`\lambda_D`. A term of weight 0 is left out.
        angle_weight: >= 0, :math:`\lambda_A`.
        triplets: ``'all'``, or a number M of apexes j to draw at random without replacement (N or more: all): the mean
            (or N / M times the sum) over the triplets at those. Unbiased, and N / M times cheaper, for N in the tens of
            thousands.
        generator: what the apexes are drawn from, on the device of ``student``; None: PyTorch's default, the only one
            that ``torch.compile`` can trace.
        mask: bool (N,), the rows to count: N is their number then. The others are not read and get gradient 0.
        row_weight: float (N,), w: a pair counts :math:`w_i w_j` times, a triplet :math:`w_i w_j w_k` times. Does not
            change what the means divide by. No gradient.
        reduction: ``'mean'``, or ``'sum'`` over all ordered pairs and triplets. ``'none'`` is refused.

    Returns:
        Scalar, float32 for half types, else the dtype of the input.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, the dtypes differ, a weight is not a number, or
            ``triplets`` is neither of what it may be.
        ValueError: numbers of rows, shapes or devices differ, fewer than 2 dimensions, a weight negative or not finite,
            ``triplets`` below 1, unknown option.

    Differs from the authors' code and torchdistill's ``RKDLoss`` only for near and coincident rows; the two terms say
    how.

    Source: Park et al. 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068.
    """
    checks.check_features(student, teacher)
    checks.check_non_negative("distance_weight", distance_weight)
    checks.check_non_negative("angle_weight", angle_weight)
    checks.check_triplets(triplets, generator)
    _check_rows(student, mask, row_weight, reduction)
    if not backends.has_kernel("rkd", student):
        return reference.rkd_loss(
            student,
            teacher,
            distance_weight=distance_weight,
            angle_weight=angle_weight,
            triplets=triplets,
            generator=generator,
            mask=mask,
            row_weight=row_weight,
            reduction=reduction,
        )
    apexes = reference.sampled_apexes(student, triplets, generator, mask)
    options = rkd.Options(float(distance_weight), float(angle_weight), reduction == "mean")
    return rkd.rkd(student, teacher, options, mask=mask, row_weight=row_weight, apexes=apexes)


def _check_rows(student: Tensor, mask: Tensor | None, row_weight: Tensor | None, reduction: str) -> None:
    checks.check_mask(mask, student.shape[:1], student)
    checks.check_row_weight(row_weight, student.shape[:1], student)
    checks.check_relation_reduction(reduction)


def rkd_sequence_angle_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of the angles that a sequence of features turns through.

    .. math::
        \theta_{nt} = \angle (x_{n,t+1} - x_{nt},\; x_{n,t+2} - x_{nt}), \qquad
        L = \frac{1}{N (L - 2)} \sum_{n} \sum_{t=0}^{L-3} (\theta^s_{nt} - \theta^t_{nt})^2, \quad
        \theta \in [0, \pi] \text{ in radians.}

    Args:
        student: (N, L, D) with L >= 3, float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher: (N, L, D'), same N, L, dtype and device.
        mask: bool (N, L), False at padding. An angle counts if all three of its positions do; the mean is over those,
            and 0 if there is none. Padding reaches neither value nor gradient, not even as NaN.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. No sequences: 0.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, the dtypes differ, or ``mask`` is not bool.
        ValueError: not 3 dimensions, N, L or devices differ, L < 3, ``mask`` of another shape.

    A step of length 0 has no direction: its angle is :math:`\pi/2` and passes gradient 0.

    Differs from an arccosine of the cosine only in accuracy: that one has infinite gradients for straight runs, and in
    float32 no digits below 3e-4 radians.

    Source: the angles of Park et al. 2019, "Relational Knowledge Distillation", https://arxiv.org/abs/1904.05068,
    taken along a sequence instead of over all triplets.
    """
    checks.check_sequences(student, teacher, min_length=3)
    checks.check_mask(mask, student.shape[:2], student)
    if not backends.has_kernel("rkd_sequence", student):
        return reference.rkd_sequence_angle_loss(student, teacher, mask=mask)
    return rkd_sequence.rkd_sequence(student, teacher, mask=mask)


def crd_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: float = 0.1,
    alignment_weight: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    r"""Contrast of the pairs of a batch by label, plus the squared difference to the teacher's similarities.

    With :math:`s_{ij} = \langle x_i, x_j \rangle / \tau` of the student, t of the teacher, and
    :math:`y_{ij} = 1` for rows of one label (i = j included), -1 for rows of two,

    .. math::
        L = \frac{1}{N^2} \sum_{ij} \log (1 + e^{-y_{ij} s_{ij}})
            + \frac{\lambda}{N^2} \sum_{ij} (s_{ij} - t_{ij})^2.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        labels: int64 (N,), any values.
        temperature: :math:`\tau > 0`, in units of inner products.
        alignment_weight: :math:`\lambda \ge 0`.
        normalize: divide rows by their L2 norm (at least 1e-12) first, so that s and t are cosines over
            :math:`\tau`. A zero row stays 0 and gets gradient 0. **Without it** both terms grow with the size of the
            features, the second with its fourth power: set it for features that are not of unit length already.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. No rows: 0.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, the dtypes differ, or an option is not a number.
        ValueError: numbers of rows or devices differ, fewer than 2 dimensions, ``labels`` of another shape,
            ``temperature`` not finite or not above 0, ``alignment_weight`` negative or not finite.

    Differs from code that takes the logarithm of a sigmoid, which is -inf below -89 in float32 (an inner product of
    -8.9 at the default temperature); this is finite at any size. The paper's loss, :class:`CRDLoss`, is another one and
    knows no labels (the module of this one is :class:`kdfast.losses.InBatchCRDLoss`):
    its positive pair is a sample and itself, its negatives come from a memory of all samples.

    Source: after Tian, Krishnan, Isola 2020, "Contrastive Representation Distillation",
    https://arxiv.org/abs/1910.10699; sigmoids of pairs in a batch: Zhai et al. 2023, "Sigmoid Loss for Language Image
    Pre-Training", https://arxiv.org/abs/2303.15343.
    """
    checks.check_features(student, teacher)
    checks.check_labels(labels, student.shape[:1], student)
    checks.check_temperature(temperature)
    checks.check_non_negative("alignment_weight", alignment_weight)
    if not backends.has_kernel("relation", student):
        return reference.crd_loss(
            student, teacher, labels, temperature=temperature, alignment_weight=alignment_weight, normalize=normalize
        )
    return relation.crd(student, teacher, labels, temperature, alignment_weight, normalize)


def similarity_graph(
    features: Tensor,
    k: int = 20,
    *,
    metric: str = "cosine",
    include_self: bool = False,
    keys: Tensor | None = None,
    precision: str = "ieee",
) -> SimilarityGraph:
    r"""The k nearest neighbours of each row: edges of a graph, with weights that carry gradients.

    The weight of edge (i, j) is :math:`\langle x_i, x_j \rangle / (\|x_i\| \|x_j\|)` for ``'cosine'``,
    :math:`\langle x_i, x_j \rangle` for ``'dot'`` and :math:`\|x_i - x_j\|` for ``'euclidean'``. Row i lists the k
    largest (``'euclidean'``: smallest), best first; ties go to the smaller index. A row of NaN comes last.

    The (N, M) matrix is never stored. Up to k = 128 a kernel runs where there is one, beyond that the plain reference,
    which stores it. Equal rows have equal similarities, bit for bit; similarities closer to each other than rounding
    may change places, as they may between any two ways to sum a product.

    Args:
        features: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets a gradient.
        k: neighbours a row, in [1, N - 1]; in [1, N] with ``include_self``, in [1, M] with ``keys``.
        metric: ``'cosine'``, ``'dot'`` or ``'euclidean'``. A zero row has cosine 0 to all and gets gradient 0;
            coincident rows have distance 0, which passes gradient 0.
        include_self: let row i be a neighbour of itself.
        keys: (M, …), shaped like ``features`` but for M, same dtype and device: look for neighbours among these rows
            instead. They get a gradient too.
        precision: ``'ieee'``, or ``'tf32'`` to allow a GPU to round float32 features to 11 bits when it looks for
            neighbours, which is faster and may exchange near ones. CPU tensors are never rounded.

    Returns:
        :class:`SimilarityGraph`, a named tuple of ``values`` (N, k), float32 for half types, else the dtype of the
        input, and ``indices`` int64 (N, k), rows of ``features`` or of ``keys``.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, the dtypes differ, or ``k`` is not an int.
        ValueError: fewer than 2 dimensions, shapes of rows or devices differ, ``k`` out of range, ``include_self`` with
            ``keys``, unknown metric or precision.

    Differs from :func:`torch.topk` on the matrix of similarities, which leaves open which of equal values it takes.

    Source: graphs of neighbours as the knowledge to distil: Lassance et al. 2020, "Deep Geometric Knowledge
    Distillation with Graphs", https://arxiv.org/abs/1911.03080.
    """
    checks.check_rows("features", features)
    checks.check_option("metric", metric, METRICS)
    checks.check_option("precision", precision, PRECISIONS)
    if keys is not None:
        checks.check_keys(keys, features, include_self)
        checks.check_k(k, keys.shape[0], "M")
    elif include_self:
        checks.check_k(k, features.shape[0], "N")
    else:
        checks.check_k(k, features.shape[0] - 1, "N - 1")
    if not backends.has_kernel("graph", features, limit=_beyond_graph_kernels(k)):
        return reference.similarity_graph(
            features, k, metric=metric, include_self=include_self, keys=keys, precision=precision
        )
    rows, others = features.flatten(1), None if keys is None else keys.flatten(1)
    return SimilarityGraph(*graph.graph(rows, others, None, k, metric, include_self=include_self, precision=precision))


def _beyond_graph_kernels(k: int) -> str:
    return "" if k <= graph.MAX_K else f"its graph kernels keep up to {graph.MAX_K} neighbours a row, k is {k}"


def graph_distillation_loss(
    student: Tensor, teacher: Tensor, *, k: int = 20, metric: str = "cosine", temperature: float = 0.5
) -> Tensor:
    r"""KL between how the teacher and the student weigh the teacher's nearest neighbours of a row.

    With :math:`E_i` the k nearest neighbours of row i among the other rows of the teacher, and s, t the similarities
    of :func:`similarity_graph` (distances negated),

    .. math::
        L = \frac{1}{N} \sum_i \mathrm{KL}\Big( \mathrm{softmax}_{j \in E_i}(t_{ij} / \tau) \,\Big\|\,
            \mathrm{softmax}_{j \in E_i}(s_{ij} / \tau) \Big).

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        k: >= 1, neighbours a row. min(k, N - 1) are used, so that a short last batch works.
        metric: ``'cosine'``, ``'dot'`` or ``'euclidean'``.
        temperature: :math:`\tau > 0`, in units of similarities.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. One row or none: 0. With one neighbour both
        softmaxes are 1 and the loss is 0: two rows, or k = 1, teach nothing.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, the dtypes differ, or ``k`` is not an int.
        ValueError: numbers of rows or devices differ, fewer than 2 dimensions, ``k`` below 1, unknown metric,
            ``temperature`` not finite or not above 0.

    Differs from CompRess, which compares a row to a queue of earlier samples and to all of it; here the batch is the
    queue and the far samples are left out.

    Source: after Koohpayegani, Tejankar, Pirsiavash 2020, "CompRess: Self-Supervised Learning by Compressing
    Representations", https://arxiv.org/abs/2010.14713, and Lassance et al. 2020, https://arxiv.org/abs/1911.03080.
    """
    checks.check_features(student, teacher)
    checks.check_count("k", k, 1)
    checks.check_option("metric", metric, METRICS)
    checks.check_temperature(temperature)
    k = min(k, student.shape[0] - 1)
    if k < 1 or not backends.has_kernel("graph", student, limit=_beyond_graph_kernels(k)):
        return reference.graph_distillation_loss(student, teacher, k=k, metric=metric, temperature=temperature)
    values, indices = graph.graph(teacher.detach().flatten(1), None, None, k, metric)
    return graph.graph_kl(student.flatten(1), values, indices, metric, temperature)


def hardest_negatives(features: Tensor, labels: Tensor, k: int, *, metric: str = "cosine") -> SimilarityGraph:
    r"""The k rows of another label that are most similar to each row.

    Args:
        features: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets a gradient.
        labels: int64 (N,), any values.
        k: negatives a row, in [1, N].
        metric: ``'cosine'``, ``'dot'`` or ``'euclidean'``, as in :func:`similarity_graph`.

    Returns:
        :class:`SimilarityGraph`, a named tuple of ``values`` (N, k), float32 for half types, else the dtype of the
        input, and ``indices`` int64 (N, k), hardest first, ties to the smaller index. A row with fewer than k
        negatives is filled up with index -1 and value -inf (``'euclidean'``: +inf), which pass gradient 0.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, or ``k`` is not an int.
        ValueError: fewer than 2 dimensions, ``labels`` of another shape or device, ``k`` out of range, unknown metric.

    Source: hard negatives within a batch: Schroff, Kalenichenko, Philbin 2015, "FaceNet: A Unified Embedding for Face
    Recognition and Clustering", https://arxiv.org/abs/1503.03832.
    """
    checks.check_rows("features", features)
    checks.check_labels(labels, features.shape[:1], features, like_name="features")
    checks.check_k(k, features.shape[0], "N")
    checks.check_option("metric", metric, METRICS)
    if not backends.has_kernel("graph", features, limit=_beyond_graph_kernels(k)):
        return reference.hardest_negatives(features, labels, k, metric=metric)
    return SimilarityGraph(*graph.graph(features.flatten(1), None, labels, k, metric))
