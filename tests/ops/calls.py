"""Every loss, label attention, the classifier and the linear layer as functions of named tensors.

A test over :data:`CALLS` sees every public function that has a derivative, with all of its tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.functional.group_classifier import group_classifier
from sadcl.functional.linear import linear
from sadcl.testing import make_features, make_labels
from tests.here import backends_here

SIZES = {"B": 5, "V": 2, "C": 4, "D": 8, "L": 6, "T": 24}


@dataclass(frozen=True)
class Call:
    """``run(backend, **tensors)`` gives a number; ``axes`` has the shape of each tensor in letters of :data:`SIZES`."""

    function: str  # module of sadcl.functional that says which backends there are
    run: Callable[..., Tensor]
    axes: dict[str, str]
    reference: bool = True  # whether backend="reference" is an oracle of its own

    def make(self, b: int = SIZES["B"], dtype: torch.dtype = torch.float32, grad: bool = False) -> dict[str, Tensor]:
        """Its tensors for ``b`` images; the floating ones that have a derivative require it where ``grad``."""
        sizes = {**SIZES, "B": b}
        made = {}
        for seed, (name, letters) in enumerate(self.axes.items()):
            value = _tensor(name, tuple(sizes[letter] for letter in letters), dtype, seed + 1)
            made[name] = value.requires_grad_() if grad and name in self.derived else value
        return made

    @property
    def derived(self) -> list[str]:
        """The tensors that have a derivative."""
        return [name for name in self.axes if name not in ("labels", "groups", "mask", "key_padding_mask")]


def _tensor(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    if name == "labels":
        return make_labels(*shape, "ignored")
    if name == "soft":
        return (0.1 + 0.7 * make_labels(*shape)).to(acc)
    if name == "groups":
        return torch.arange(shape[0]) % 3
    if name == "mask":
        return make_labels(*shape, labels_per_image=2 * shape[1] / 3)
    if name == "key_padding_mask":
        return make_labels(*shape).bool()
    if name.endswith("temperature"):
        return torch.tensor(0.2 + seed / 100, dtype=acc)
    if name in ("class_weight", "sample_weight"):
        return torch.linspace(0.5, 1.5, shape[0], dtype=acc)
    if len(shape) == 1:
        return make_features(1, *shape, seed=seed)[0].to(dtype)
    return make_features(*shape, dtype=dtype, seed=seed)


def _sscl(**options: Any) -> Callable[..., Tensor]:
    return lambda backend, features, labels, **tensors: (
        F.sample_contrastive_loss(features, labels, backend=backend, **tensors, **options).square().sum()
    )


def _pscl(**options: Any) -> Callable[..., Tensor]:
    return lambda backend, features, prototypes, labels, **tensors: (
        F.prototype_contrastive_loss(features, prototypes, labels, backend=backend, **tensors, **options).square().sum()
    )


def _dual(backend: str | None, embeddings: Tensor, prototypes: Tensor, labels: Tensor, **options: Any) -> Tensor:
    view = options.pop("bank_embeddings", None)
    sample, prototype = F.dual_contrastive_loss(embeddings, view, prototypes, labels, backend=backend, **options)
    return sample + 2 * prototype


def _asl(**options: Any) -> Callable[..., Tensor]:
    def run(backend: str | None, logits: Tensor, labels: Tensor | None = None, soft: Any = None, **tensors: Any) -> Any:
        y = soft if labels is None else labels
        return F.asymmetric_loss(logits, y, backend=backend, **tensors, **options).square().sum()

    return run


def _supcon(backend: str | None, features: Tensor, groups: Any = None, mask: Any = None, **options: Any) -> Tensor:
    return F.supcon_loss(features, groups, mask, backend=backend, **options)


def _mlc(backend: str | None, features: Tensor, labels: Any = None, keys: Any = None, **tensors: Any) -> Tensor:
    kind = (
        "any" if labels is None or "class_weight" not in tensors else "msc" if "prototypes" in tensors else "mulsupcon"
    )
    key_labels = None
    if keys is not None and labels is not None:
        key_labels = torch.ones(keys.shape[0], labels.shape[1], device=labels.device)
    return (
        F.multilabel_supcon_loss(
            features,
            labels,
            weighting=kind,
            keys=keys,
            key_labels=key_labels,
            reduction="none",
            backend=backend,
            **tensors,
        )
        .square()
        .sum()
    )


def _two_way(backend: str | None, logits: Tensor, labels: Tensor, **tensors: Any) -> Tensor:
    rows, columns = F.two_way_loss(logits, labels, reduction="none", backend=backend, **tensors)
    return rows.square().sum() + columns.square().sum()


def _attention(form: str, need_weights: bool) -> Callable[..., Tensor]:
    def run(backend: str | None, **tensors: Tensor) -> Tensor:
        out, weights = F.label_attention(**tensors, num_heads=2, form=form, need_weights=need_weights, backend=backend)
        total = (out * torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device)).sum()
        return total if weights is None else total + weights.square().sum()

    return run


_WEIGHTS = {"class_weight": "C", "sample_weight": "B"}
_SSCL = {"features": "BVCD", "labels": "BC", "temperature": "", **_WEIGHTS}
_PSCL = {"features": "BCD", "prototypes": "CD", "labels": "BC", "temperature": "", **_WEIGHTS}
_DUAL = {"embeddings": "BCD", "bank_embeddings": "BCD", "prototypes": "CD", "labels": "BC", "class_weight": "C",
         "sample_temperature": "", "prototype_temperature": ""}  # fmt: skip
_ATTENTION = {"memory": "BLD", "memory_pos": "LD", "in_proj_weight": "TD", "in_proj_bias": "T",
              "out_proj_weight": "DD", "out_proj_bias": "D"}  # fmt: skip

CALLS = {
    "sscl": Call("sscl", _sscl(), _SSCL),
    "sscl-rows": Call("sscl", _sscl(reduction="none"), _SSCL),
    "sscl-released": Call("sscl", _sscl(formulation="released", base_temperature=0.1, reduction="sum"), _SSCL),
    "pscl": Call("pscl", _pscl(), _PSCL),
    "pscl-shares": Call("pscl", _pscl(reduction="none"), _PSCL),
    "pscl-released": Call("pscl", _pscl(formulation="released", reduction="sum"), _PSCL),
    "dual": Call("dual", _dual, _DUAL),
    "dual-one-view": Call("dual", _dual, {name: axes for name, axes in _DUAL.items() if name != "bank_embeddings"}),
    "asl": Call("asl", _asl(), {"logits": "BC", "labels": "BC", **_WEIGHTS}),
    "asl-elements": Call("asl", _asl(reduction="none", clip=0.0), {"logits": "BC", "labels": "BC", **_WEIGHTS}),
    "asl-mean": Call("asl", _asl(reduction="mean", gamma_pos=0, detach_focal_weight=True),
                     {"logits": "BC", "labels": "BC"}),
    "asl-soft": Call("asl", _asl(reduction="released"), {"logits": "BC", "soft": "BC", **_WEIGHTS}),
    "supcon": Call("supcon", _supcon, {"features": "BVD", "groups": "B", "temperature": "", "sample_weight": "B"}),
    "supcon-simclr": Call("supcon", _supcon, {"features": "BVD"}),
    "supcon-mask": Call("mlc", _supcon, {"features": "BVD", "mask": "BB", "temperature": "", "sample_weight": "B"}),
    "mlc": Call("mlc", _mlc, {"features": "BVD", "labels": "BC", "keys": "CD", "temperature": "", **_WEIGHTS}),
    "mlc-msc": Call("mlc", _mlc, {"features": "BD", "labels": "BC", "keys": "LD", "prototypes": "CD", "temperature": "",
                                  **_WEIGHTS}),
    "mlc-any": Call("mlc", _mlc, {"features": "BVD", "labels": "BC"}),
    "zlpr": Call("zlpr", lambda backend, **tensors: F.zlpr_loss(**tensors, reduction="sum", backend=backend),
                 {"logits": "BC", "labels": "BC", "sample_weight": "B"}),
    "two_way": Call("two_way", _two_way, {"logits": "BC", "labels": "BC", **_WEIGHTS}),
    "attention": Call("label_attention", _attention("plain", False), {"query": "CD", **_ATTENTION}),
    "attention-weights": Call(
        "label_attention", _attention("plain", True),
        {"query": "BCD", **_ATTENTION, "memory_pos": "BLD", "key_padding_mask": "BL"},
    ),
    "attention-folded": Call("label_attention", _attention("folded", False), {"query": "CD", **_ATTENTION}),
    "classifier": Call(
        "group_classifier",
        lambda backend, **tensors: group_classifier(**tensors, backend=backend).square().sum(),
        {"features": "BCD", "weight": "CD", "bias": "C"},
        reference=False,
    ),
    "linear": Call(
        "linear",
        lambda backend, **tensors: linear(**tensors).square().sum(),
        {"x": "BCD", "weight": "DD", "bias": "D"},
        reference=False,
    ),
}  # fmt: skip


def cases(reference: bool = False, names: Sequence[str] = tuple(CALLS)) -> list[Any]:
    """Parameters ``name, backend``: every call by every CPU backend, and by the oracle where asked for."""
    parameters = []
    for name in names:
        call = CALLS[name]
        oracle = ("reference",) if reference and call.reference else ()
        if call.function in ("", "linear"):
            found: list[Any] = [pytest.param(backend) for backend in ("torch", *oracle)]
        else:
            found = [*backends_here(call.function), *map(pytest.param, oracle)]
        for backend in found:
            parameters.append(
                pytest.param(name, *backend.values, marks=backend.marks, id=f"{name}-{backend.values[0]}")
            )
    return parameters
