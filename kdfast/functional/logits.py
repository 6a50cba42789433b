"""Losses on logits (..., V): argument checks, choice of backend, reduction."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast import backends, checks
from kdfast.ops import kl, topk_kl
from kdfast.reference import logits as reference


def kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    *,
    direction: str = "forward",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    scale_by_temperature: bool = True,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Kullback-Leibler divergence of softened logits, the loss of Hinton et al. 2015.

    With :math:`p = \mathrm{softmax}(z / T)` for student and teacher, each row gives

    .. math::
        \text{forward: } T^2 \sum_v p^t_v (\log p^t_v - \log p^s_v), \qquad
        \text{reverse: } T^2 \sum_v p^s_v (\log p^s_v - \log p^t_v).

    A class the first distribution gives probability 0 adds 0 (a logit of -inf is legal on either side);
    mass where the second one has none gives +inf, as in PyTorch.

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher_logits: same shape, dtype and device.
        temperature: T > 0, in units of logits.
        direction: ``'forward'`` is KL(teacher || student), ``'reverse'`` is KL(student || teacher).
        reduction: ``'none'``: one value a row, shape (...); ``'sum'``; ``'batchmean'``: sum over the rows that count
            divided by their number; ``'mean'``: that divided by V as well. No row left: 0.
        mask: bool (...), the rows to count. The others are not read, and get loss 0 and gradient 0.
        row_weight: float (...), multiplies the row's loss. Does not change what the means divide by. No gradient.
        scale_by_temperature: multiply by T^2, which keeps the size of the gradient independent of T.
        inplace_backward: **this call**, not only its backward, overwrites ``student_logits`` with their gradient, which
            saves a tensor of their size: compute all else that needs the logits before it. What autograd records of
            them afterwards raises RuntimeError in backward (unless they are a leaf or a view, or under
            ``torch.compile``), as does a second backward. Takes contiguous logits, not float16.

    Returns:
        float32 for half types, else the dtype of the input: a scalar, or (...) for ``reduction='none'``.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: shapes or devices differ, no class, ``temperature`` not finite or not above 0, unknown option.

    Differs from :func:`torch.nn.functional.kl_div`: takes logits on both sides, argument order student, teacher;
    'batchmean' divides by all rows ((B, L, V) has B * L of them), 'none' keeps one value a row, not an element.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network",
    https://arxiv.org/abs/1503.02531; reverse KL: Gu et al. 2024, "MiniLLM", https://arxiv.org/abs/2306.08543.
    """
    checks.check_logits(student_logits, teacher_logits)
    checks.check_temperature(temperature)
    checks.check_option("direction", direction, ("forward", "reverse"))
    checks.check_reduction(reduction)
    checks.check_row_options(mask, row_weight, student_logits)
    checks.check_inplace_backward(inplace_backward, student_logits, teacher_logits)
    if not backends.has_kernel("kl", student_logits, inplace_backward=inplace_backward):
        return reference.kl_divergence(
            student_logits,
            teacher_logits,
            temperature,
            direction=direction,
            reduction=reduction,
            mask=mask,
            row_weight=row_weight,
            scale_by_temperature=scale_by_temperature,
        )
    options = kl.Options(
        temperature,
        kl.KINDS[direction],
        scale=temperature**2 if scale_by_temperature else 1.0,
        reduction=kl.REDUCTIONS[reduction],
    )
    return kl.kl(
        student_logits, teacher_logits, options, mask=mask, row_weight=row_weight, inplace_backward=inplace_backward
    )


def js_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    beta: float = 0.5,
    temperature: float = 1.0,
    *,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
    inplace_backward: bool = False,
) -> Tensor:
    r"""Generalised Jensen-Shannon divergence of softened logits, the loss of GKD (Agarwal et al. 2024).

    With t and s the softmaxes of teacher and student at temperature T, each row gives

    .. math::
        \beta\, \mathrm{KL}(t \,\|\, m) + (1 - \beta)\, \mathrm{KL}(s \,\|\, m), \qquad m = \beta t + (1 - \beta) s,

    for 0 < beta < 1. This is always finite, at most log 2, whatever classes (logits of -inf) either side lacks.
    beta = 0 is defined as KL(t || s) and beta = 1 as KL(s || t); those are +inf where the second one lacks a class.

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher_logits: same shape, dtype and device.
        beta: in [0, 1], the teacher's share of the mixture.
        temperature: T > 0, in units of logits. The loss is not multiplied by T^2.
        reduction: ``'none'``: one value a row, shape (...); ``'sum'``; ``'batchmean'``: sum over the rows that count
            divided by their number; ``'mean'``: that divided by V as well. No row left: 0.
        mask: bool (...), the rows to count. The others are not read, and get loss 0 and gradient 0.
        row_weight: float (...), multiplies the row's loss. Does not change what the means divide by. No gradient.
        inplace_backward: **this call**, not only its backward, overwrites ``student_logits`` with their gradient, which
            saves a tensor of their size: compute all else that needs the logits before it. What autograd records of
            them afterwards raises RuntimeError in backward (unless they are a leaf or a view, or under
            ``torch.compile``), as does a second backward. Takes contiguous logits, not float16.

    Returns:
        float32 for half types, else the dtype of the input: a scalar, or (...) for ``reduction='none'``.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: shapes or devices differ, no class, ``temperature`` not finite or not above 0, ``beta`` outside
            [0, 1], unknown option.

    Differs from the original definition at the ends: there beta = 0 and 1 give 0. The two KLs are the limits of
    JS / (beta (1 - beta)) and what TRL's ``GKDTrainer`` computes too.

    Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
    https://arxiv.org/abs/2306.13649.
    """
    checks.check_logits(student_logits, teacher_logits)
    checks.check_fraction("beta", beta)
    checks.check_temperature(temperature)
    checks.check_reduction(reduction)
    checks.check_row_options(mask, row_weight, student_logits)
    checks.check_inplace_backward(inplace_backward, student_logits, teacher_logits)
    if not backends.has_kernel("kl", student_logits, inplace_backward=inplace_backward):
        return reference.js_divergence(
            student_logits, teacher_logits, beta, temperature, reduction=reduction, mask=mask, row_weight=row_weight
        )
    kind = kl.KINDS[_kind_of_js(beta)]
    options = kl.Options(temperature, kind, scale=1.0, beta=beta, reduction=kl.REDUCTIONS[reduction])
    return kl.kl(
        student_logits, teacher_logits, options, mask=mask, row_weight=row_weight, inplace_backward=inplace_backward
    )


def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 4.0,
    alpha: float = 0.7,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    inplace_backward: bool = False,
) -> Tensor:
    r"""The distillation loss of Hinton et al. 2015: divergence from the teacher plus cross-entropy with the labels.

    .. math::
        \alpha\, T^2\, \mathrm{KL}(p^t_T \,\|\, p^s_T) + (1 - \alpha)\, \mathrm{CE}(z^s, y),
        \qquad p_T = \mathrm{softmax}(z / T).

    **alpha weighs the divergence, 1 - alpha the labels**: alpha = 1 looks at the teacher alone, alpha = 0 at the
    labels alone. A term of weight 0 is left out, also where it would be infinite.

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher_logits: same shape, dtype and device.
        labels: int64 (...), class indices in [0, V) or ``ignore_index``. None: the teacher's argmax in each row.
        temperature: T > 0 of the divergence, in units of logits. The cross-entropy is at T = 1.
        alpha: in [0, 1], the weight of the divergence.
        ignore_index: a row with this label is not read and counts in neither term. Without labels no row is ignored.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        reduction: ``'none'``: one value a row, shape (...); ``'sum'``; ``'batchmean'``: sum divided by the number of
            rows that count; no row left: 0. ``'mean'`` is refused: it would divide the two terms differently.
        inplace_backward: **this call**, not only its backward, overwrites ``student_logits`` with their gradient, which
            saves a tensor of their size: compute all else that needs the logits before it. What autograd records of
            them afterwards raises RuntimeError in backward (unless they are a leaf or a view, or under
            ``torch.compile``), as does a second backward. Takes contiguous logits, not float16.

    Returns:
        float32 for half types, else the dtype of the input: a scalar, or (...) for ``reduction='none'``.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, or the dtypes of the logits differ.
        ValueError: shapes or devices differ, no class, a label out of range (found on the CPU only; on a GPU its row is
            NaN), ``temperature`` not finite or not above 0, ``alpha`` or ``label_smoothing`` outside [0, 1], unknown
            option, ``reduction='mean'``.

    Differs from torchdistill's ``KDLoss``, whose alpha weighs the cross-entropy: ``KDLoss(alpha=a)`` is
    ``kd_loss(alpha=1 - a)``. There, rows with an ignored label still count in the divergence.

    Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network",
    https://arxiv.org/abs/1503.02531.
    """
    checks.check_logits(student_logits, teacher_logits)
    checks.check_ignore_index(ignore_index)
    if labels is not None:
        checks.check_labels(
            labels,
            student_logits.shape[:-1],
            student_logits,
            num_classes=student_logits.shape[-1],
            ignore_index=ignore_index,
        )
    checks.check_temperature(temperature)
    checks.check_fraction("alpha", alpha)
    checks.check_fraction("label_smoothing", label_smoothing)
    checks.check_mixed_reduction(reduction)
    checks.check_inplace_backward(inplace_backward, student_logits, teacher_logits)
    if alpha == 0:  # the teacher says what the labels are or nothing: what it holds, NaN included, must not count
        if labels is None:
            labels, ignore_index = teacher_logits.argmax(dim=-1), -100
        teacher_logits = student_logits
    if not backends.has_kernel("kl", student_logits, inplace_backward=inplace_backward):
        return reference.kd_loss(
            student_logits,
            teacher_logits,
            labels,
            temperature=temperature,
            alpha=alpha,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )
    options = kl.Options(
        temperature,
        kl.KINDS["forward"],
        scale=alpha * temperature**2,
        ce_weight=1 - alpha,
        label_smoothing=label_smoothing,
        ignore_index=ignore_index,
        reduction=kl.REDUCTIONS[reduction],
    )
    return kl.kl(student_logits, teacher_logits, options, labels=labels, inplace_backward=inplace_backward)


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    r"""Decoupled knowledge distillation (Zhao et al. 2022): the target class and the other classes weighed apart.

    With :math:`p = \mathrm{softmax}(z / T)`, target y, :math:`b = (p_y, 1 - p_y)` and
    :math:`q = \mathrm{softmax}(z_v / T, v \ne y)`, the mean over rows of

    .. math::
        T^2 (\alpha\, \mathrm{KL}(b^t \,\|\, b^s) + \beta\, \mathrm{KL}(q^t \,\|\, q^s)).

    Args:
        student_logits: (..., V) with V >= 2, float16, bfloat16, float32 or float64. The only argument that gets a
            gradient. A logit of -inf is legal; where all other classes of the teacher have it, the second term is 0.
        teacher_logits: same shape, dtype and device.
        labels: int64 (...), class indices in [0, V).
        alpha: >= 0, weight of the first term (target against the rest).
        beta: >= 0, weight of the second term (among the rest). With two classes that term is 0.
        temperature: T > 0, in units of logits.

    Returns:
        A scalar, float32 for half types, else the dtype of the input. No rows: 0.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, or the dtypes of the logits differ.
        ValueError: shapes or devices differ, fewer than 2 classes, a label out of range (found on the CPU only; on a
            GPU its row is NaN), ``temperature`` not finite or not above 0, ``alpha`` or ``beta`` negative or not
            finite.

    Differs from the authors' implementation in how it is computed, not in what: there the target's logit is lowered by
    1000 and logarithms of the probabilities are taken, which breaks down for large gaps; here the target is removed
    from the softmax and log(1 - p_y) is a sum over the other classes. There is no warm-up of the weight.

    Source: Zhao et al. 2022, "Decoupled Knowledge Distillation", https://arxiv.org/abs/2203.08679.
    """
    checks.check_logits(student_logits, teacher_logits)
    checks.check_has_other_classes(student_logits)
    checks.check_labels(labels, student_logits.shape[:-1], student_logits, num_classes=student_logits.shape[-1])
    checks.check_non_negative("alpha", alpha)
    checks.check_non_negative("beta", beta)
    checks.check_temperature(temperature)
    if not backends.has_kernel("kl", student_logits):
        return reference.dkd_loss(
            student_logits, teacher_logits, labels, alpha=alpha, beta=beta, temperature=temperature
        )
    options = kl.Options(temperature, kl.KINDS["dkd"], scale=temperature**2, alpha=alpha, beta=beta)
    return kl.kl(student_logits, teacher_logits, options, labels=labels)


def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""DIST (Huang et al. 2022): correlation instead of divergence, along the rows and along the columns of the batch.

    With P the (B, V) softmaxes at temperature T and r the Pearson correlation
    :math:`\langle \bar a, \bar b \rangle / (|\bar a| |\bar b| + 10^{-8})` of centred vectors,

    .. math::
        T^2 \bigl(\beta (1 - \tfrac1B \sum_i r(P^s_{i:}, P^t_{i:}))
        + \gamma (1 - \tfrac1V \sum_v r(P^s_{:v}, P^t_{:v}))\bigr).

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
            All leading dimensions together are the batch.
        teacher_logits: same shape, dtype and device.
        beta: >= 0, weight of the rows (relation between the classes of one sample).
        gamma: >= 0, weight of the columns (relation between the samples in one class). A batch of one row has constant
            columns, whose correlation is 0.
        temperature: T > 0, in units of logits.

    Returns:
        A scalar, float32 for half types, else the dtype of the input. No rows: 0.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: shapes or devices differ, no class, ``temperature`` not finite or not above 0, ``beta`` or ``gamma``
            negative or not finite.

    Differs from the authors' implementation where the student's row or column is constant: its gradient is 0 here,
    where theirs is up to 1e8 (the first step of a zero-initialised classifier).

    Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", https://arxiv.org/abs/2205.10536.
    """
    checks.check_logits(student_logits, teacher_logits)
    checks.check_non_negative("beta", beta)
    checks.check_non_negative("gamma", gamma)
    checks.check_temperature(temperature)
    return reference.dist_loss(student_logits, teacher_logits, beta=beta, gamma=gamma, temperature=temperature)


def standardized_kl_divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 2.0,
    *,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    r"""KL(teacher || student) of z-scored logits (Sun et al. 2024), which leaves the size of the logits out.

    Each row x of logits becomes :math:`z = (x - \mathrm{mean}(x)) / (10^{-7} + \mathrm{std}(x))`, with the unbiased
    standard deviation over the classes; then, with :math:`p = \mathrm{softmax}(z / T)`, a row gives

    .. math::
        T^2 \sum_v p^t_v (\log p^t_v - \log p^s_v).

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
            Logits must be finite: a row with -inf has no mean, and gives NaN.
        teacher_logits: same shape, dtype and device.
        temperature: T > 0, in units of standard deviations.
        reduction: ``'none'``: one value a row, shape (...); ``'sum'``; ``'batchmean'``: sum over the rows that count
            divided by their number; ``'mean'``: that divided by V as well. No row left: 0.
        mask: bool (...), the rows to count. The others are not read, and get loss 0 and gradient 0.
        row_weight: float (...), multiplies the row's loss. Does not change what the means divide by. No gradient.

    Returns:
        float32 for half types, else the dtype of the input: a scalar, or (...) for ``reduction='none'``.
        With one class: 0.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: shapes or devices differ, no class, ``temperature`` not finite or not above 0, unknown option.

    Differs from the authors' implementation where the student's logits are constant: their z-scores are 0 and the
    gradient is 0 here, where theirs is 1e7 times that of kl (the first step of a zero-initialised classifier).

    Source: Sun et al. 2024, "Logit Standardization in Knowledge Distillation", https://arxiv.org/abs/2403.01427.
    """
    checks.check_logits(student_logits, teacher_logits)
    checks.check_temperature(temperature)
    checks.check_reduction(reduction)
    checks.check_row_options(mask, row_weight, student_logits)
    if not backends.has_kernel("kl", student_logits):
        return reference.standardized_kl_divergence(
            student_logits, teacher_logits, temperature, reduction=reduction, mask=mask, row_weight=row_weight
        )
    options = kl.Options(
        temperature, kl.KINDS["standardized"], scale=temperature**2, reduction=kl.REDUCTIONS[reduction]
    )
    return kl.kl(student_logits, teacher_logits, options, mask=mask, row_weight=row_weight)


def topk_kl_divergence(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    *,
    values: str = "logits",
    temperature: float = 1.0,
    tail: str = "drop",
    reduction: str = "batchmean",
    mask: Tensor | None = None,
) -> Tensor:
    r"""KL(teacher || student) where only k classes a row of the teacher were stored.

    Row i lists the classes K_i. The teacher's :math:`p^t` is :math:`\mathrm{softmax}(\text{values} / T)` among them for
    ``values='logits'`` and :math:`\exp(\text{values})` for ``values='logprobs'``. With
    :math:`p^s = \mathrm{softmax}(z^s / T)` over all V classes, a row gives

    .. math::
        T^2 \sum_{v \in K_i} p^t_v (\log p^t_v - \log p^s_v),

    and ``tail`` says what becomes of the classes that were not stored:

    - ``'drop'``: nothing. With ``'logprobs'`` the sum is then not a divergence: the two sides do not share a total,
      and the loss **may be negative**. Its gradient still pulls the student towards the listed probabilities.
    - ``'bucket'``: they are one more class, which holds :math:`1 - \sum_{K_i} p` on either side. A divergence again.
      ``'logprobs'`` only: logits do not say how much mass the rest has. Where the student has no mass left for the
      rest, a teacher's rest below k * eps of the stored dtype is taken for rounding, and is 0.
    - ``'renormalize'``: they do not exist: both sides are softmaxes among the listed classes. With ``'logprobs'`` this
      is the one setting that takes a temperature.

    Args:
        student_logits: (..., V), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher_values: (..., k) with 1 <= k <= V, any floating dtype: logits, or log-probabilities at T = 1. An entry
            of -inf is padding, whatever its index.
        teacher_indices: int32 or int64 (..., k), classes in [0, V), none twice in a row. An entry of -100 is padding,
            whatever its value. A row of padding alone gives 0 and gradient 0, and counts unless ``mask`` drops it.
        values: ``'logits'`` or ``'logprobs'``: what ``teacher_values`` holds. Log-probabilities taken for logits are no
            error, but lose what they say of the rest: a stored teacher knows (``reader.values``).
        temperature: T > 0, in units of logits; 1 for ``'logprobs'`` unless ``tail='renormalize'``.
        tail: ``'drop'``, ``'bucket'`` or ``'renormalize'``.
        reduction: ``'none'``: one value a row, shape (...); ``'sum'``; ``'batchmean'``: sum over the rows that count
            divided by their number; ``'mean'``: that divided by V as well. No row left: 0.
        mask: bool (...), the rows to count. The others are not read, and get loss 0 and gradient 0.

    Returns:
        float32 if ``student_logits`` is of a half type, else its dtype: a scalar, or (...) for ``reduction='none'``.

    Raises:
        TypeError: an argument is not a tensor of the right dtype.
        ValueError: shapes or devices do not fit, k out of range, an index out of range or twice in a row,
            ``'logprobs'`` above 0 by more than rounding (all three found on the CPU only; elsewhere it would wait for
            the device), ``temperature`` not finite, not above 0 or not usable with ``values`` and ``tail``, unknown
            option.

    Source: sparse teachers and what dropping the tail does: Anshumann et al. 2025, "Sparse Logit Sampling:
    Accelerating Knowledge Distillation in LLMs", https://arxiv.org/abs/2503.16870.
    """
    checks.check_topk_options(values, temperature, tail)
    checks.check_reduction(reduction)
    checks.check_sparse_teacher(
        student_logits, teacher_values, teacher_indices, mask, reference.PADDING_INDEX, logprobs=values == "logprobs"
    )
    if not backends.has_kernel("topk_kl", student_logits):
        return reference.topk_kl_divergence(
            student_logits,
            teacher_values,
            teacher_indices,
            values=values,
            temperature=temperature,
            tail=tail,
            reduction=reduction,
            mask=mask,
        )
    options = topk_kl.Options(temperature, topk_kl.TAILS[tail], values == "logprobs", kl.REDUCTIONS[reduction])
    return topk_kl.topk_kl(student_logits, teacher_values, teacher_indices, options, mask=mask)


def linear_kl_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    labels: Tensor | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    divergence: str = "forward",
    beta: float = 0.5,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "batchmean",
    mask: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    r"""Divergence of the logits that two last layers would form, without asking the caller to form them.

    **All logits are formed**, by PyTorch's products, and go to the kernel of :func:`kl_divergence`: this saves the
    caller two lines, not memory.

    With :math:`z = h W^\top + b` for student and teacher, D one of :func:`kl_divergence` (with its T^2, forward or
    reverse) and :func:`js_divergence` (without), a row gives D(z^s, z^t); with ``labels`` it gives

    .. math::
        \alpha\, D(z^s, z^t) + (1 - \alpha)\, \mathrm{CE}(z^s, y).

    Args:
        student_hidden: (..., H), float16, bfloat16, float32 or float64. Gets a gradient.
        student_weight: (V, H), same dtype and device. Gets a gradient.
        teacher_hidden: (..., H_t): same leading shape, dtype and device; H_t may differ from H.
        teacher_weight: (V, H_t), same dtype and device.
        student_bias: (V,), or None. Gets a gradient.
        teacher_bias: (V,), or None.
        labels: int64 (...), class indices in [0, V) or ``ignore_index``, or None: no cross-entropy.
        alpha: in [0, 1], the weight of the divergence; below 1 it needs ``labels``.
        temperature: T > 0 of the divergence, in units of logits. The cross-entropy is at T = 1.
        divergence: ``'forward'``: KL(teacher || student); ``'reverse'``: KL(student || teacher); ``'js'``.
        beta: in [0, 1], the teacher's share of the mixture of ``'js'``; unused otherwise.
        ignore_index: a row with this label is not read and counts in neither term.
        label_smoothing: in [0, 1], as in :func:`torch.nn.functional.cross_entropy`.
        reduction: ``'none'``: one value a row, shape (...); ``'sum'``; ``'batchmean'``: sum over the rows that count
            divided by their number; no row left: 0. ``'mean'`` is refused: it would divide the two terms differently.
        mask: bool (...), the rows to count. The others are not read, and get loss 0 and gradient 0.
        row_weight: float (...), multiplies the row's loss, both terms of it. Does not change what 'batchmean' divides
            by. No gradient.

    Returns:
        float32 for half types, else the dtype of the input: a scalar, or (...) for ``reduction='none'``. The products
        are formed in the dtype of the input (half logits are rounded to it), all else in the dtype returned.

    Raises:
        TypeError: an argument is not a tensor of the right dtype, or the dtypes differ (under autocast they may).
        ValueError: shapes or devices do not fit, the vocabularies differ, a label out of range (found on the CPU only),
            ``temperature`` not finite or not above 0, ``alpha``, ``beta`` or ``label_smoothing`` outside [0, 1],
            ``alpha`` below 1 without labels, unknown option, ``reduction='mean'``.

    Differs from Liger Kernel's fused linear distillation losses: a smaller student vocabulary is refused, not padded
    with logits of 0, and alpha weighs the divergence alone (there: a weight for either term).

    Source: Hinton et al. 2015, https://arxiv.org/abs/1503.02531; the fusion of last layer and loss: Wijmans et al.
    2024, "Cut Your Losses in Large-Vocabulary Language Models", https://arxiv.org/abs/2411.09009.
    """
    checks.check_projection("student", student_hidden, student_weight, student_bias)
    checks.check_projection("teacher", teacher_hidden, teacher_weight, teacher_bias)
    checks.check_projection_pair(student_hidden, student_weight, teacher_hidden, teacher_weight)
    checks.check_fraction("alpha", alpha)
    checks.check_temperature(temperature)
    checks.check_option("divergence", divergence, ("forward", "reverse", "js"))
    checks.check_fraction("beta", beta)
    checks.check_fraction("label_smoothing", label_smoothing)
    checks.check_mixed_reduction(reduction)
    checks.check_ignore_index(ignore_index)
    rows = student_hidden.shape[:-1]
    if labels is not None:
        num_classes = student_weight.shape[0]
        checks.check_labels(labels, rows, student_hidden, num_classes=num_classes, ignore_index=ignore_index)
    else:
        checks.check_alpha_without_labels(alpha)
    checks.check_row_options(mask, row_weight, student_hidden)
    if not backends.has_kernel("kl", student_hidden):
        return reference.linear_kl_divergence(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            labels=labels,
            alpha=alpha,
            temperature=temperature,
            divergence=divergence,
            beta=beta,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            mask=mask,
            row_weight=row_weight,
        )
    if labels is not None:
        mask = labels != ignore_index if mask is None else mask & (labels != ignore_index)
    student_logits = reference.last_layer(student_hidden, student_weight, student_bias, mask)
    with torch.no_grad():
        teacher_logits = reference.last_layer(teacher_hidden, teacher_weight, teacher_bias)
    kind = divergence if divergence != "js" else _kind_of_js(beta)
    scale = alpha if divergence == "js" else alpha * temperature**2
    options = kl.Options(temperature, kl.KINDS[kind], scale, beta=beta, reduction=kl.REDUCTIONS[reduction])
    if labels is None or alpha == 1:
        return kl.kl(student_logits, teacher_logits, options, mask=mask, row_weight=row_weight)
    both = options._replace(ce_weight=1 - alpha, label_smoothing=label_smoothing, ignore_index=ignore_index)
    if kind == "forward" and alpha > 0:  # the only kind that takes both on one read
        return kl.kl(student_logits, teacher_logits, both, labels=labels, mask=mask, row_weight=row_weight)
    # The student for a teacher: what the teacher holds, NaN included, must not count.
    alone = both._replace(kind=kl.KINDS["forward"], scale=0.0)
    cross_entropy = kl.kl(student_logits, student_logits, alone, labels=labels, mask=mask, row_weight=row_weight)
    if alpha == 0:
        return cross_entropy
    return kl.kl(student_logits, teacher_logits, options, mask=mask, row_weight=row_weight) + cross_entropy


def _kind_of_js(beta: float) -> str:
    """At its ends the mixture is one of both sides."""
    return "forward" if beta == 0 else "reverse" if beta == 1 else "js"
