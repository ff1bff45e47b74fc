"""The group-wise classifier as a function."""

from __future__ import annotations

from torch import Tensor

from .. import _checks as check
from .._backends import makes_program, resolve_implicit
from ..ops import group_classifier as _group_classifier
from ..portable.group_classifier import classify

BACKENDS = _group_classifier.group_classifier.backends


def group_classifier(features: Tensor, weight: Tensor, bias: Tensor, backend: str | None = None) -> Tensor:
    """``logit[b, c] = <weight[c], features[b, c]> + bias[c]``.

    Source: SADCL (ECAI 2023), the group-wise classifier of SARL.

    Args:
        features: label features h ``[B, C, E]`` of any strides.
        weight: ``[C, E]``.
        bias: ``[C]``.
        backend: ``None`` (best for the device), ``"cpp"``, ``"triton"`` or ``"torch"``.

    Returns:
        ``[B, C]``, in the dtype that features and weight promote to.

    Raises:
        ValueError: if shapes or devices do not fit together.
        TypeError: if one of them is no floating point tensor.
    """
    for name, value, layout in (
        ("features", features, "[B, C, E]"),
        ("weight", weight, "[C, E]"),
        ("bias", bias, "[C]"),
    ):
        check.check_floating(name, check.check_tensor(name, value, (layout.count(",") + 1,), layout))
    check.check_size("bias", bias, 0, weight.shape[0], "C", "weight")
    for dim, axis in ((1, "C"), (2, "E")):
        check.check_size("features", features, dim, weight.shape[dim - 1], axis, "weight")
    check.check_devices(features=features, weight=weight, bias=bias)
    name = backend or resolve_implicit("group_classifier", features.device, BACKENDS)
    # Plain ATen: exportable, and differentiable forward.
    if name == "torch" or (backend is None and (makes_program() or check.forward_mode())):
        return classify(features, weight, bias)
    return _group_classifier.group_classifier(_group_classifier.Inputs(features, weight, bias), name).logits
