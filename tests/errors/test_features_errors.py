"""Every kind of bad argument of the feature losses is refused, in words that name it, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from kdfast.functional.features import attention_transfer_loss, feature_mse_loss, kernel_alignment_loss, pkt_loss

x = torch.zeros(4, 3)
maps = torch.zeros(2, 3, 4, 5)
nan, inf = float("nan"), float("inf")

# What the losses on (N, …) have in common.
FEATURES = [
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

ERRORS = [
    *[
        (f"{f.__name__}: {name}", lambda f=f, call=call: call(f), exception, match)
        for f in (feature_mse_loss, pkt_loss, kernel_alignment_loss)
        for name, call, exception, match in FEATURES
    ],
    (
        "mse: widths",
        lambda: feature_mse_loss(x, x[:, :2]),
        ValueError,
        r"same shape, got \(4, 3\) and \(4, 2\): .*adapter",
    ),
    ("mse: mask not a tensor", lambda: feature_mse_loss(x, x, mask=[True]), TypeError, "mask must be a torch.Tensor"),
    ("mse: mask not bool", lambda: feature_mse_loss(x, x, mask=x), TypeError, "mask must have dtype torch.bool, got"),
    (
        "mse: mask of another shape",
        lambda: feature_mse_loss(x, x, mask=torch.ones(3, dtype=torch.bool)),
        ValueError,
        r"mask must have shape \(4,\) or \(4, 3\), got \(3,\)",
    ),
    (
        "mse: mask of tokens",
        lambda: feature_mse_loss(x[None], x[None], mask=torch.ones(1, 4, dtype=torch.bool)),
        ValueError,
        r"\(1,\) or \(1, 4, 3\), got \(1, 4\): flatten the leading dimensions of features and mask",
    ),
    (
        "mse: mask on another device",
        lambda: feature_mse_loss(x, x, mask=torch.ones(4, dtype=torch.bool, device="meta")),
        ValueError,
        "mask is on meta",
    ),
    ("pkt: eps 0", lambda: pkt_loss(x, x, eps=0.0), ValueError, "eps must be greater than 0, got 0.0"),
    ("pkt: eps below 0", lambda: pkt_loss(x, x, eps=-1e-7), ValueError, "eps must be greater than 0, got -1e-07"),
    ("pkt: eps NaN", lambda: pkt_loss(x, x, eps=nan), ValueError, "eps must be finite, got nan"),
    ("pkt: eps a tensor", lambda: pkt_loss(x, x, eps=torch.tensor(1e-7)), TypeError, "eps must be a float, got Tensor"),
    (
        "attention: not a tensor",
        lambda: attention_transfer_loss(maps, 3.0),
        TypeError,
        "teacher_maps must be a torch.Tensor, got float",
    ),
    (
        "attention: integers",
        lambda: attention_transfer_loss(maps.int(), maps),
        TypeError,
        "student_maps must have dtype",
    ),
    ("attention: dtypes", lambda: attention_transfer_loss(maps, maps.double()), TypeError, "must have the same dtype"),
    (
        "attention: devices",
        lambda: attention_transfer_loss(maps, maps.to("meta")),
        ValueError,
        "teacher_maps is on meta but student_maps is on cpu",
    ),
    (
        "attention: 3-D",
        lambda: attention_transfer_loss(maps, maps[0]),
        ValueError,
        r"teacher_maps must have shape \(N, C, H, W\), got \(3, 4, 5\)",
    ),
    (
        "attention: samples",
        lambda: attention_transfer_loss(maps, maps[:1]),
        ValueError,
        "student_maps and teacher_maps must have the same number of samples, got 2 and 1",
    ),
    (
        "attention: no channel",
        lambda: attention_transfer_loss(maps[:, :0], maps),
        ValueError,
        r"student_maps must have at least one channel and one pixel, got shape \(2, 0, 4, 5\)",
    ),
    (
        "attention: no pixel",
        lambda: attention_transfer_loss(maps, maps[..., :0]),
        ValueError,
        "teacher_maps must have at least one channel and one pixel",
    ),
    ("attention: p 0", lambda: attention_transfer_loss(maps, maps, 0), ValueError, "p must be greater than 0, got 0"),
    ("attention: p below 0", lambda: attention_transfer_loss(maps, maps, -2), ValueError, "p must be greater than 0"),
    (
        "attention: p infinite",
        lambda: attention_transfer_loss(maps, maps, inf),
        ValueError,
        "p must be finite, got inf",
    ),
    (
        "attention: p a string",
        lambda: attention_transfer_loss(maps, maps, "2"),
        TypeError,
        "p must be a float, got str",
    ),
]


@pytest.mark.parametrize(("call", "exception", "match"), [pytest.param(*row[1:], id=row[0]) for row in ERRORS])
def test_bad_arguments_are_refused(call: Callable[[], object], exception: type[Exception], match: str) -> None:
    with pytest.raises(exception, match=match):
        call()
