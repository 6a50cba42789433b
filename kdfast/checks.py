"""Argument checks of the public functions: one place, one style of message.

Every check names the argument, says what was given and what is allowed, and runs before any kernel.
``TypeError`` is for the wrong kind of thing (not a tensor, not a float), ``ValueError`` for the wrong value
(shape, device, range, unknown option). Both are what ``torch.nn.functional`` users expect to catch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
REDUCTIONS = ("none", "sum", "mean", "batchmean")
LARGEST_FLOAT = sys.float_info.max
LARGEST_LOGPROB = 0.5  # log-probabilities that were rounded to bfloat16 can be above 0, but not by this much


def check_tensor(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype] = FLOAT_DTYPES) -> None:
    """``tensor`` is a tensor of one of ``dtypes``."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have dtype {_one_of(dtypes)}, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors live on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device} but {other_name} is on {other.device}: move one of them")


def check_pair(student_name: str, student: Tensor, teacher_name: str, teacher: Tensor) -> None:
    """Student and teacher are floating-point tensors of one dtype on one device."""
    plain = type(student) is type(teacher) is Tensor and student.dtype is teacher.dtype in FLOAT_DTYPES
    dense = plain and student.layout is teacher.layout is torch.strided and not (student.is_nested or teacher.is_nested)
    if dense and ((student.is_cpu and teacher.is_cpu) or student.device == teacher.device):
        return  # at once: on short rows the checks take as long as the loss
    check_tensor(student_name, student)
    check_tensor(teacher_name, teacher)
    if student.dtype != teacher.dtype:
        raise TypeError(
            f"{student_name} and {teacher_name} must have the same dtype, got {student.dtype} and {teacher.dtype}: "
            f"cast one of them, for example {teacher_name}.to({student_name}.dtype)"
        )
    check_same_device(teacher_name, teacher, student_name, student)


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Logits (…, V): same shape, at least one class."""
    check_pair("student_logits", student_logits, "teacher_logits", teacher_logits)
    student_shape, teacher_shape = student_logits.shape, teacher_logits.shape
    if student_shape == teacher_shape and student_shape and student_shape[-1] > 0:
        return
    if len(student_shape) == 0:
        raise ValueError("student_logits must have shape (..., V), got a tensor without dimensions")
    if student_shape == teacher_shape:
        raise ValueError(f"student_logits must have at least one class, got shape {tuple(student_shape)}")
    if student_shape[:-1] == teacher_shape[:-1]:
        raise ValueError(
            f"student_logits has {student_shape[-1]} classes but teacher_logits has {teacher_shape[-1]}: slice "
            "both to the classes they share (logits[..., :V]); padding with float('-inf') makes forward KL infinite on "
            "the student's side, reverse KL on the teacher's"
        )
    raise ValueError(
        f"student_logits and teacher_logits must have the same shape, got {tuple(student_shape)} "
        f"and {tuple(teacher_shape)}"
    )


def check_features(
    student: Tensor, teacher: Tensor, *, same_width: bool = False, names: tuple[str, str] = ("student", "teacher")
) -> None:
    """Features (N, …) of the same N; with ``same_width`` also of the same trailing shape."""
    check_pair(names[0], student, names[1], teacher)
    for name, tensor in zip(names, (student, teacher), strict=True):
        check_rows(name, tensor)
    if student.shape[0] != teacher.shape[0]:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same number of rows, got {student.shape[0]} and "
            f"{teacher.shape[0]}"
        )
    if same_width and student.shape != teacher.shape:
        raise ValueError(
            f"{names[0]} and {names[1]} must have the same shape, got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}: put an adapter (for example nn.Linear) on the student's side"
        )


def check_rows(name: str, tensor: Tensor) -> None:
    """Features (N, …) on their own."""
    check_tensor(name, tensor)
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have shape (N, ...) with at least 2 dimensions, got {tuple(tensor.shape)}")


def check_keys(keys: Tensor, features: Tensor, include_self: bool) -> None:
    """Keys (M, …) that features (N, …) can be compared with."""
    check_pair("features", features, "keys", keys)
    check_rows("keys", keys)
    if keys.shape[1:] != features.shape[1:]:
        raise ValueError(
            f"keys must have rows of shape {tuple(features.shape[1:])} like features, got {tuple(keys.shape[1:])}"
        )
    if include_self:
        raise ValueError("include_self=True has no meaning with keys: no row of features is among them")


def check_sequences(student: Tensor, teacher: Tensor, *, min_length: int) -> None:
    """Sequences (N, L, D) of the same N and L >= ``min_length``; widths may differ."""
    check_pair("student", student, "teacher", teacher)
    for name, tensor in (("student", student), ("teacher", teacher)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must have shape (N, L, D), got {tuple(tensor.shape)}")
    if student.shape[:2] != teacher.shape[:2]:
        raise ValueError(
            f"student and teacher must have the same N and L, got {tuple(student.shape[:2])} and "
            f"{tuple(teacher.shape[:2])}"
        )
    if student.shape[1] < min_length:
        raise ValueError(f"sequences must have length L >= {min_length}, got {student.shape[1]}")


def check_maps(student_maps: Tensor, teacher_maps: Tensor) -> None:
    """Feature maps (N, C, H, W) of the same N, with at least one channel and one pixel each."""
    check_pair("student_maps", student_maps, "teacher_maps", teacher_maps)
    for name, maps in (("student_maps", student_maps), ("teacher_maps", teacher_maps)):
        if maps.dim() != 4:
            raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(maps.shape)}")
        if 0 in maps.shape[1:]:
            raise ValueError(f"{name} must have at least one channel and one pixel, got shape {tuple(maps.shape)}")
    if student_maps.shape[0] != teacher_maps.shape[0]:
        raise ValueError(
            "student_maps and teacher_maps must have the same number of samples, got "
            f"{student_maps.shape[0]} and {teacher_maps.shape[0]}"
        )


def check_option(name: str, value: object, allowed: Sequence[object]) -> None:
    """``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be {_one_of([repr(option) for option in allowed])}, got {value!r}")


def check_reduction(reduction: str, allowed: Sequence[str] = REDUCTIONS) -> None:
    """``reduction`` is one of ``allowed``."""
    if reduction not in allowed:
        check_option("reduction", reduction, allowed)


def check_number(name: str, value: float) -> None:
    """``value`` is a finite Python number (a tensor would need a device sync)."""
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    # math.isfinite would break the graph of torch.compile, and an int may lie beyond every float.
    if not -LARGEST_FLOAT <= value <= LARGEST_FLOAT:
        raise ValueError(f"{name} must be finite, got {value}")


def check_positive(name: str, value: float) -> None:
    """``value`` is a finite Python number above 0."""
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be greater than 0, got {value}")


def check_temperature(temperature: float) -> None:
    """The temperature is finite and above 0, and so is its square, which losses are multiplied with."""
    if type(temperature) is float and 1e-150 <= temperature <= 1e150:
        return  # at once, as in check_pair
    check_positive("temperature", temperature)
    if not 0 < temperature * temperature <= LARGEST_FLOAT:
        raise ValueError(f"temperature must be between 1e-150 and 1e150, got {temperature}")


def check_fraction(name: str, value: float) -> None:
    """``value`` lies in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def check_non_negative(name: str, value: float) -> None:
    """``value`` is a finite Python number of at least 0."""
    check_number(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


def check_row_options(mask: Tensor | None, row_weight: Tensor | None, like: Tensor) -> None:
    """Both are None or fit the rows of ``like`` (…, V)."""
    if mask is None and row_weight is None:
        return
    rows = like.shape[:-1]
    check_mask(mask, rows, like)
    check_row_weight(row_weight, rows, like)


def check_mask(mask: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """``mask`` is None or a bool tensor of ``shape`` on the device of ``like``."""
    if mask is None:
        return
    _check_bool_mask(mask)
    _check_shape("mask", mask, shape)
    check_same_device("mask", mask, "the student", like)


def check_feature_mask(mask: Tensor | None, like: Tensor) -> None:
    """``mask`` is None or a bool tensor, one value a row of ``like`` or one an element, on its device."""
    if mask is None:
        return
    _check_bool_mask(mask)
    if mask.shape not in (like.shape, like.shape[:1]):
        leading = mask.shape == like.shape[: mask.dim()]
        raise ValueError(
            f"mask must have shape {_one_of([tuple(like.shape[:1]), tuple(like.shape)])}, got {tuple(mask.shape)}"
            + (": flatten the leading dimensions of features and mask into one" if leading else "")
        )
    check_same_device("mask", mask, "the student", like)


def _check_bool_mask(mask: Tensor) -> None:
    if isinstance(mask, Tensor) and mask.dtype != torch.bool:
        raise TypeError(f"mask must have dtype torch.bool, got {mask.dtype}: mask.bool() counts what is not 0")
    check_tensor("mask", mask, (torch.bool,))


def check_row_weight(row_weight: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """``row_weight`` is None or a float tensor of ``shape`` on the device of ``like``."""
    if row_weight is None:
        return
    check_tensor("row_weight", row_weight)
    _check_shape("row_weight", row_weight, shape)
    check_same_device("row_weight", row_weight, "the student", like)


def check_labels(
    labels: Tensor,
    shape: Sequence[int],
    like: Tensor,
    *,
    num_classes: int | None = None,
    ignore_index: int | None = None,
    like_name: str = "the student",
) -> None:
    """``labels`` is an int64 tensor of ``shape``; on the CPU its values are checked against ``num_classes`` too.

    On a GPU reading the values would wait for the device, and under ``torch.compile`` they are not known:
    there a label out of range is a device-side assertion in the reference, and the kernels make its row NaN.
    """
    check_tensor("labels", labels, (torch.int64,))
    _check_shape("labels", labels, shape)
    check_same_device("labels", labels, like_name, like)
    if num_classes is None or not _is_readable(labels) or labels.numel() == 0:
        return
    out_of_range = (labels < 0) | (labels >= num_classes)
    if ignore_index is not None:
        out_of_range = out_of_range & (labels != ignore_index)  # not in place, which selective checkpoints refuse
    if bool(out_of_range.any()):
        bad = labels[out_of_range][0].item()
        also = "" if ignore_index is None else f", or be ignore_index={ignore_index}"
        advice = ": this loss ignores no label, select the rows that count first" if ignore_index is None else ""
        raise ValueError(f"labels must lie in [0, {num_classes}){also}, got {bad}{advice}")


def check_ignore_index(ignore_index: int) -> None:
    """``ignore_index`` is an int that a label may be."""
    check_int("ignore_index", ignore_index)
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must be an int of 64 bits, got {ignore_index}")


def check_int(name: str, value: int) -> None:
    """``value`` is an int."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")


def check_count(name: str, value: int, lower: int) -> None:
    """``value`` is an int of at least ``lower``."""
    check_int(name, value)
    if value < lower:
        raise ValueError(f"{name} must be at least {lower}, got {value}")


def check_sparse_teacher(
    student_logits: Tensor,
    teacher_values: Tensor,
    teacher_indices: Tensor,
    mask: Tensor | None,
    padding_index: int,
    *,
    logprobs: bool,
) -> None:
    """A stored teacher (…, k) and the mask (…) fit the student's (…, V); on the CPU also what it holds: no class out of
    range or twice, and no logits where it says ``logprobs``.

    Entries with ``padding_index`` or value -inf, and rows ``mask`` drops, may hold anything.
    """
    check_logits(student_logits, student_logits)  # no dense teacher here: the student against itself
    check_mask(mask, student_logits.shape[:-1], student_logits)
    check_tensor("teacher_values", teacher_values)
    check_tensor("teacher_indices", teacher_indices, (torch.int32, torch.int64))
    if teacher_values.dim() == 0 or teacher_values.shape[:-1] != student_logits.shape[:-1]:
        raise ValueError(
            f"teacher_values must have shape (..., k) with the leading shape {tuple(student_logits.shape[:-1])} of "
            f"student_logits, got {tuple(teacher_values.shape)}"
        )
    _check_shape("teacher_indices", teacher_indices, teacher_values.shape)
    num_classes = student_logits.shape[-1]
    check_k(teacher_values.shape[-1], num_classes, "V")
    check_same_device("teacher_values", teacher_values, "student_logits", student_logits)
    check_same_device("teacher_indices", teacher_indices, "student_logits", student_logits)
    if not _is_readable(teacher_indices):
        return
    listed = (teacher_indices != padding_index) & (teacher_values != -math.inf)
    if mask is not None:
        listed = listed & mask.unsqueeze(-1)
    out_of_range = listed & ((teacher_indices < 0) | (teacher_indices >= num_classes))
    if bool(out_of_range.any()):
        bad = teacher_indices[out_of_range][0].item()
        raise ValueError(f"teacher_indices must lie in [0, {num_classes}), or be {padding_index} (padding), got {bad}")
    if logprobs:
        too_large = listed & (teacher_values > LARGEST_LOGPROB)
        if bool(too_large.any()):
            raise ValueError(
                "teacher_values must be log-probabilities, at most 0, for values='logprobs', got "
                f"{teacher_values[too_large][0].item()}"
            )
    repeated = _repeated_class(teacher_indices, listed, num_classes)
    if repeated is not None:
        raise ValueError(f"teacher_indices must not list a class twice in a row, got {repeated} more than once")


def _repeated_class(indices: Tensor, listed: Tensor, num_classes: int) -> int | None:
    """A class that a row of ``indices``, which are in range where ``listed``, holds twice."""
    if hasattr(torch.ops.kdfast, "repeated_index"):  # with the extension; sorting takes half of a short row's time
        position = torch.ops.kdfast.repeated_index(indices, listed, num_classes)
        return None if position < 0 else int(indices.flatten()[position])
    ordered = indices.masked_fill(~listed, -1).sort(dim=-1).values
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    return int(ordered[..., 1:][twice][0]) if bool(twice.any()) else None


def check_topk_options(values: str, temperature: float, tail: str) -> None:
    """The options of a stored teacher go together: stored log-probabilities already have their temperature."""
    check_option("values", values, ("logits", "logprobs"))
    check_option("tail", tail, ("drop", "bucket", "renormalize"))
    check_temperature(temperature)
    if tail == "bucket" and values != "logprobs":
        raise ValueError(
            "tail='bucket' needs values='logprobs', got values='logits': k logits do not say how much mass the rest has"
        )
    if values == "logprobs" and tail != "renormalize" and temperature != 1:
        raise ValueError(
            f"temperature must be 1 for values='logprobs' with tail={tail!r}, got {temperature}: log-probabilities "
            "cannot be softened without the classes that were not stored (tail='renormalize' can)"
        )


def check_projection(side: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``hidden`` (…, H), ``weight`` (V, H) and ``bias`` (V,) of one side form logits."""
    check_tensor(f"{side}_hidden", hidden)
    if hidden.dim() == 0:
        raise ValueError(f"{side}_hidden must have shape (..., H), got a tensor without dimensions")
    check_tensor(f"{side}_weight", weight)
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(f"{side}_weight must have shape (V, H) with at least one class, got {tuple(weight.shape)}")
    if weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{side}_weight must have shape (V, H) with the H = {hidden.shape[-1]} of {side}_hidden, "
            f"got {tuple(weight.shape)}"
        )
    if bias is not None:
        check_tensor(f"{side}_bias", bias)
        _check_shape(f"{side}_bias", bias, weight.shape[:1])
    for name, tensor in ((f"{side}_weight", weight), (f"{side}_bias", bias)):
        if tensor is None:
            continue
        check_same_device(name, tensor, f"{side}_hidden", hidden)
        _check_dtype_outside_autocast(name, tensor, f"{side}_hidden", hidden)


def check_projection_pair(
    student_hidden: Tensor, student_weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor
) -> None:
    """Two checked projections form logits of one shape."""
    check_same_device("teacher_hidden", teacher_hidden, "student_hidden", student_hidden)
    _check_dtype_outside_autocast("student_hidden", student_hidden, "teacher_hidden", teacher_hidden)
    if student_hidden.shape[:-1] != teacher_hidden.shape[:-1]:
        raise ValueError(
            f"student_hidden and teacher_hidden must have the same leading shape, got {tuple(student_hidden.shape)} "
            f"and {tuple(teacher_hidden.shape)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"student_weight has {student_weight.shape[0]} classes but teacher_weight has {teacher_weight.shape[0]}: "
            "slice both to the classes they share (weight[:V])"
        )


def check_mixed_reduction(reduction: str) -> None:
    """A loss that adds cross-entropy to a divergence has no 'mean'."""
    if reduction == "mean":
        raise ValueError(
            "reduction must be 'none', 'sum' or 'batchmean', got 'mean': it would divide the divergence by the number "
            "of classes and the cross-entropy not"
        )
    check_reduction(reduction, ("none", "sum", "batchmean"))


def check_relation_reduction(reduction: str) -> None:
    """A loss on pairs and triplets of rows has a mean and a sum."""
    if reduction == "none":
        raise ValueError(
            "reduction must be 'sum' or 'mean', got 'none': it would return a value for each of N^2 pairs or N^3 "
            "triplets, which are never held in memory"
        )
    check_reduction(reduction, ("sum", "mean"))


def check_triplets(triplets: str | int, generator: torch.Generator | None) -> None:
    """``triplets`` is 'all' or how many apexes to draw, from ``generator`` or PyTorch's own."""
    if isinstance(triplets, str):
        check_option("triplets", triplets, ("all",))
    elif isinstance(triplets, bool) or not isinstance(triplets, int):
        raise TypeError(f"triplets must be 'all' or an int, got {type(triplets).__name__}")
    elif triplets < 1:
        raise ValueError(f"triplets must be 'all' or at least 1, got {triplets}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def check_alpha_without_labels(alpha: float) -> None:
    """Without labels there is no cross-entropy for ``1 - alpha`` to weigh."""
    if alpha != 1:
        raise ValueError(f"alpha must be 1 without labels, got {alpha}: 1 - alpha weighs the cross-entropy with them")


def check_has_other_classes(student_logits: Tensor) -> None:
    """There is a class besides the target."""
    if student_logits.shape[-1] < 2:
        raise ValueError(
            f"student_logits must have at least 2 classes, a target and others, got shape {tuple(student_logits.shape)}"
        )


def check_inplace_backward(inplace_backward: bool, student_logits: Tensor, teacher_logits: Tensor) -> None:
    """The storage of ``student_logits`` can hold its gradient."""
    if not inplace_backward:
        return
    if student_logits.dtype == torch.float16:
        raise ValueError(
            "inplace_backward=True writes the gradient before the loss scale is known, which float16 is too narrow "
            "for: use bfloat16, or inplace_backward=False"
        )
    if not student_logits.is_contiguous():
        raise ValueError("inplace_backward=True needs contiguous student_logits, got a strided or expanded view")
    if not is_traced(student_logits) and _overlap_partly(student_logits, teacher_logits):
        raise ValueError(
            "inplace_backward=True would overwrite rows of teacher_logits that are still to be read: it shares a part "
            "of its memory with student_logits"
        )


def _ends(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first and the last element."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + steps * tensor.itemsize


def _overlap_partly(one: Tensor, other: Tensor) -> bool:
    """Whether elements of two tensors that stand in different places may share memory."""
    if one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() or one.numel() == 0:
        return False
    if one.data_ptr() == other.data_ptr() and one.stride() == other.stride():
        return False  # the very same elements: each is read before it is written
    (first, last), (other_first, other_last) = _ends(one), _ends(other)
    return first <= other_last and other_first <= last


def check_sample_weight(sample_weight: Tensor | None, num_samples: int) -> None:
    """``sample_weight`` is None or one finite weight above 0 for each of ``num_samples``."""
    if sample_weight is None:
        return
    check_tensor("sample_weight", sample_weight)
    _check_shape("sample_weight", sample_weight, (num_samples,))
    if sample_weight.is_meta:
        return  # without values
    bad = ~(sample_weight.isfinite() & (sample_weight > 0))
    if bool(bad.any()):
        raise ValueError(f"sample_weight must be finite and greater than 0, got {sample_weight[bad][0].item()}")


def check_projected(name: str, features: Tensor, weight: Tensor) -> None:
    """``features`` (N, …) have the width and the device of the layer with ``weight`` (out, width)."""
    check_rows(name, features)
    width = features.shape[1:].numel()
    if width != weight.shape[1]:
        raise ValueError(f"{name} must have {name}_dim = {weight.shape[1]} features a row, got {width}")
    check_same_device(name, features, f"{name}_projection", weight)


def check_contrast(
    student: Tensor, teacher: Tensor, indices: Tensor, negatives: Tensor | None, num_samples: int
) -> None:
    """Features of N rows; ``indices`` (N,) and ``negatives`` (N, K) are positions among ``num_samples``."""
    check_features(student, teacher)
    check_tensor("indices", indices, (torch.int64,))
    _check_shape("indices", indices, student.shape[:1])
    _check_positions("indices", indices, num_samples, student)
    if negatives is None:
        return
    check_tensor("negatives", negatives, (torch.int64,))
    if negatives.dim() != 2 or negatives.shape[0] != student.shape[0] or negatives.shape[1] == 0:
        raise ValueError(
            f"negatives must have shape (N, K) with N = {student.shape[0]} and K >= 1, got {tuple(negatives.shape)}"
        )
    _check_positions("negatives", negatives, num_samples, student)


def check_k(k: int, upper: int, upper_name: str) -> None:
    """``k`` is an int in [1, upper]."""
    check_int("k", k)
    if not 1 <= k <= upper:
        raise ValueError(f"k must be between 1 and {upper_name} = {upper}, got {k}")


def _check_dtype_outside_autocast(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Both tensors have one dtype, to which autocast would bring them itself."""
    kind = other.device.type
    enabled = kind != "meta" and torch.is_autocast_enabled(kind)  # about which PyTorch raises where it is asked
    if tensor.dtype != other.dtype and not enabled:
        raise TypeError(f"{name} and {other_name} must have the same dtype, got {tensor.dtype} and {other.dtype}")


def is_traced(tensor: Tensor) -> bool:
    """Whether ``tensor`` has a shape and no values: while it is compiled, and in FakeTensorMode."""
    return torch.compiler.is_compiling() or isinstance(tensor, FakeTensor)


def _is_readable(tensor: Tensor) -> bool:
    """Whether the values can be looked at: a GPU would have to be waited for."""
    return tensor.device.type == "cpu" and not is_traced(tensor)


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")


def _check_positions(name: str, positions: Tensor, count: int, like: Tensor) -> None:
    """``positions`` lie in [0, count), which only the CPU can tell without waiting for the device."""
    check_same_device(name, positions, "the student", like)
    if not _is_readable(positions):
        return
    out_of_range = (positions < 0) | (positions >= count)
    if bool(out_of_range.any()):
        raise ValueError(f"{name} must lie in [0, {count}), got {positions[out_of_range][0].item()}")


def _one_of(options: Sequence[object]) -> str:
    words = [str(option) for option in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
