"""Losses on features (N, …) and feature maps (N, C, H, W): argument checks, choice of backend."""

from __future__ import annotations

from torch import Tensor

from kdfast import backends, checks
from kdfast.ops import features, relation
from kdfast.reference import features as reference


def feature_mse_loss(student: Tensor, teacher: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Mean squared difference of features, the hint loss of FitNets.

    .. math:: \frac{1}{|M|} \sum_{i \in M} (s_i - t_i)^2, \qquad M = \text{the elements that count.}

    Args:
        student: (N, …), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher: same shape, dtype and device. A student of another width needs an adapter first.
        mask: bool, of the features' shape (elements to count) or (N,) (rows to count). What is left out reaches
            neither value nor gradient, not even as NaN. Nothing kept: 0.

    Returns:
        Scalar, float32 for half types, else the dtype of the input.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, the dtypes differ, or ``mask`` is not bool.
        ValueError: shapes or devices differ, fewer than 2 dimensions, ``mask`` of another shape.

    Differs from FitNets, which takes half the sum over a sample: this is the mean over all elements, like
    :func:`torch.nn.functional.mse_loss`, and does not grow with the width.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", https://arxiv.org/abs/1412.6550.
    """
    checks.check_features(student, teacher, same_width=True)
    checks.check_feature_mask(mask, student)
    if not backends.has_kernel("features", student):
        return reference.feature_mse_loss(student, teacher, mask=mask)
    return features.feature_mse(student, teacher, mask)


def attention_transfer_loss(
    student_maps: Tensor, teacher_maps: Tensor, p: float = 2, *, normalize: bool = True
) -> Tensor:
    r"""Mean squared difference of spatial attention maps.

    The attention of a sample says where its activations are large:

    .. math::
        a_{hw} = \frac{1}{C} \sum_c |f_{chw}|^p, \qquad
        L = \frac{1}{N H W} \sum_{n,h,w}
            \left( \frac{a^s_{nhw}}{\|a^s_n\|_2} - \frac{a^t_{nhw}}{\|a^t_n\|_2} \right)^2.

    Where the maps differ in height or width, the larger ones are average-pooled down to the smaller size before the
    power is taken. The numbers of channels may differ.

    Args:
        student_maps: (N, C, H, W), float16, bfloat16, float32 or float64. The only argument that gets a gradient.
        teacher_maps: (N, C', H', W'), same dtype and device.
        p: > 0, the power of the activations; a larger one looks at the strongest activations only. For p < 1 the
            gradient grows without bound as an activation nears 0; one that is 0 gets gradient 0 for every p.
        normalize: divide each sample's attention by its L2 norm (at least 1e-12). An attention of 0 everywhere
            stays 0 and gets gradient 0. False compares the magnitudes too.

    Returns:
        Scalar, float32 for half types, else the dtype of the input.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: not 4 dimensions, numbers of samples or devices differ, a map without channels or pixels,
            ``p`` not finite or not above 0.

    Differs from the paper's equation (2), which sums the norms (not their squares) over a batch: this follows the
    authors' code, and equals ``ATLoss(mode='code')`` of torchdistill for maps of one size and p = 2. Torchdistill
    neither pools nor takes another power.

    Source: Zagoruyko, Komodakis 2017, "Paying More Attention to Attention: Improving the Performance of Convolutional
    Neural Networks via Attention Transfer", https://arxiv.org/abs/1612.03928.
    """
    checks.check_maps(student_maps, teacher_maps)
    checks.check_positive("p", p)
    if not backends.has_kernel("features", student_maps, limit=_beyond_attention_kernels(student_maps, teacher_maps)):
        return reference.attention_transfer_loss(student_maps, teacher_maps, p, normalize=normalize)
    return features.attention(student_maps, teacher_maps, p, normalize)


def _beyond_attention_kernels(*maps: Tensor) -> str:
    most, pixels = features.MAX_PIXELS, max(x.shape[2] * x.shape[3] for x in maps)
    too_many = pixels > most and not maps[0].is_cpu
    return f"its attention kernels take maps of up to {most} pixels on a GPU, these have {pixels}" if too_many else ""


def pkt_loss(student: Tensor, teacher: Tensor, *, eps: float = 1e-7) -> Tensor:
    r"""Probabilistic knowledge transfer: KL between the neighbour probabilities of the rows of a batch.

    .. math::
        c_{ij} = \frac{k_{ij}}{\sum_l k_{il}}, \quad k_{ij} = \frac{1}{2} \left( 1 + \frac{\langle x_i, x_j \rangle}
        {(\|x_i\| + \epsilon)(\|x_j\| + \epsilon)} \right), \qquad
        L = \frac{1}{N^2} \sum_{ij} c^t_{ij} \log \frac{c^t_{ij} + \epsilon}{c^s_{ij} + \epsilon}.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        eps: > 0, keeps norms and logarithms away from 0. A zero row has similarity 1/2 to all and gets gradient 0.

    Returns:
        Scalar, float32 for half types, else the dtype of the input. It is the mean KL of a row divided by N, so weigh
        it in proportion to the batch.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: numbers of rows or devices differ, fewer than 2 dimensions, ``eps`` not finite or not above 0.

    Differs from torchdistill's ``PKTLoss`` only at zero rows, where that one's gradient is NaN.

    Source: Passalis, Tefas 2018, "Learning Deep Representations with Probabilistic Knowledge Transfer",
    https://arxiv.org/abs/1803.10837.
    """
    checks.check_features(student, teacher)
    checks.check_positive("eps", eps)
    if not backends.has_kernel("relation", student):
        return reference.pkt_loss(student, teacher, eps=eps)
    return relation.pkt(student, teacher, eps)


def kernel_alignment_loss(student: Tensor, teacher: Tensor, *, centered: bool = False) -> Tensor:
    r"""One minus the cosine between the Gram matrices of student and teacher.

    .. math::
        K = X X^\top, \qquad L = 1 - \frac{\langle K_s, K_t \rangle_F}{\|K_s\|_F \, \|K_t\|_F} \in [0, 1].

    No positive factor and no rotation of either side changes it. A side of zeros, or with ``centered`` one whose rows
    are all equal, gives 1 with gradient 0.

    Args:
        student: (N, …), flattened to (N, D), float16, bfloat16, float32 or float64. Gets the only gradient.
        teacher: (N, …), same N, dtype and device; its width may differ.
        centered: subtract the mean row from either side first: a shift of the features changes nothing either, and
            the result is 1 - CKA (:func:`kdfast.metrics.cka`).

    Returns:
        Scalar, float32 for half types, else the dtype of the input.

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: numbers of rows or devices differ, fewer than 2 dimensions.

    Differs from the formula typed in directly: features of 1e-20 and of 1e20 work alike in float32, where their
    fourth powers, which the norms hold, would under- and overflow.

    Source: Cristianini et al. 2001, "On Kernel-Target Alignment" (NIPS 14); centred: Kornblith et al. 2019,
    "Similarity of Neural Network Representations Revisited", https://arxiv.org/abs/1905.00414.
    """
    checks.check_features(student, teacher)
    if not backends.has_kernel("relation", student):
        return reference.kernel_alignment_loss(student, teacher, centered=centered)
    return relation.kernel_alignment(student, teacher, centered)
