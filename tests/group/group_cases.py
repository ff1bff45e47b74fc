"""Losses over a group, as one process computes them and as ranks do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import make_features, make_labels

B, V, C, D, K = 7, 2, 4, 5, 6


@dataclass(frozen=True)
class Case:
    """One call of a functional.

    Attributes:
        name: says what is special about it.
        loss: the functional.
        split: arguments whose first dimension is images, of which each rank gets a part.
        same: arguments that all ranks get.
        options: the others.
        group: options of the group alone.
    """

    name: str
    loss: str
    split: dict[str, Tensor | None]
    same: dict[str, Tensor] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    group: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        """Every floating tensor but labels in another dtype."""

        def cast(tensors: dict[str, Any]) -> dict[str, Any]:
            return {
                name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and "label" not in name else x
                for name, x in tensors.items()
            }

        return Case(self.name, self.loss, cast(self.split), cast(self.same), self.options, self.group)

    def part(self, rank: int, sizes: Sequence[int]) -> dict[str, Tensor | None]:
        """What a rank gets of what is split."""
        first = sum(sizes[:rank])
        some = slice(first, first + sizes[rank])
        return {name: None if x is None else x[some] for name, x in self.split.items()}


def wants_gradient(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and "label" not in name


def value_and_gradients(case: Case, split: dict[str, Any], **more: Any) -> dict[str, np.ndarray]:
    """The loss (``loss``, as it comes) and the gradients of every floating argument, by name."""
    given = {**split, **case.same}
    leaves = {n: x.detach().clone().requires_grad_() for n, x in given.items() if wants_gradient(n, x)}
    upstream = leaves.pop("upstream", None)
    given = {**given, **leaves}
    given.pop("upstream", None)
    result = getattr(F, case.loss)(**given, **case.options, **more)
    if isinstance(result, tuple):
        result = 2.0 * result[0] + 3.0 * result[1]
    weight = None if upstream is None else upstream.detach().reshape(result.shape)
    grads = torch.autograd.grad(result, list(leaves.values()), grad_outputs=weight)
    return {"loss": result.detach().numpy(), **{n: g.numpy() for n, g in zip(leaves, grads, strict=True)}}


def on_rank(
    rank: int, cases: Sequence[Case], sizes: Sequence[Sequence[int]], backend: str | None = None
) -> list[dict[str, np.ndarray]]:
    """What a rank computes."""
    more = {"group": "world", "backend": backend}
    pairs = zip(cases, sizes, strict=True)
    return [value_and_gradients(case, case.part(rank, size), **more, **case.group) for case, size in pairs]


def put_together(case: Case, parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What DDP makes of the ranks' results: what one process should have."""
    rows = "upstream" in case.split
    scale = 1.0 if rows else 1.0 / len(parts)
    whole = {
        "loss": np.concatenate([p["loss"] for p in parts]) if rows else np.mean([p["loss"] for p in parts], axis=0)
    }
    for name in parts[0].keys() - {"loss"}:
        of_ranks = [part[name] for part in parts]
        whole[name] = scale * (np.concatenate(of_ranks) if name in case.split else np.sum(of_ranks, axis=0))
    return whole


def _rows_of(case: Case, shape: tuple[int, ...]) -> Case:
    """The same with reduction="none" and drawn upstream gradients."""
    upstream = torch.rand(shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.5
    return Case(
        case.name + " rows", case.loss, {**case.split, "upstream": upstream}, case.same,
        {**case.options, "reduction": "none"}, case.group,
    )  # fmt: skip


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sscl_cases() -> Iterator[Case]:
    x = make_features(B, V, C, D, dtype=torch.float64)
    tau = {"temperature": torch.tensor(0.3, dtype=torch.float64)}
    weights = {"class_weight": _draw(C, seed=2).abs()}, {"sample_weight": _draw(B, seed=3).abs()}
    for pattern in ("ignored", "none", "single_pair", "one_huge_class", "all_active", "one_row_per_class"):
        yield Case(
            f"sscl {pattern}", "sample_contrastive_loss", {"features": x, "labels": make_labels(B, C, pattern)}, tau
        )
    y = make_labels(B, C, "ignored")
    zero = x.clone()
    zero[2] = 0.0
    base = Case("sscl", "sample_contrastive_loss", {"features": x, "labels": y}, tau)
    yield _rows_of(base, (B, V, C))
    yield Case("sscl zero vectors", base.loss, {"features": zero, "labels": y}, tau)
    yield Case("sscl one view", base.loss, {"features": x[:, 0], "labels": y}, tau)
    yield Case("sscl weights", base.loss, {**base.split, **weights[1]}, {**tau, **weights[0]})
    for group in ({}, {"ring": True}, {"capacity": B * C}, {"ring": True, "capacity": B * C}):
        for formulation in ("paper", "released"):
            options = {"formulation": formulation, "reduction": "sum", "base_temperature": 0.2}
            yield Case(f"sscl {formulation} {group}", base.loss, base.split, tau, options, group)
            yield _rows_of(Case(f"sscl {formulation} {group}", base.loss, base.split, tau, options, group), (B, V, C))


def pscl_cases() -> Iterator[Case]:
    x, p = make_features(B, C, D, dtype=torch.float64), _draw(C, D, seed=4)
    same = {"prototypes": p, "temperature": torch.tensor(0.3, dtype=torch.float64)}
    for formulation in ("paper", "released"):
        for pattern in ("ignored", "none", "single_pair", "one_huge_class", "empty_images"):
            split = {"features": x, "labels": make_labels(B, C, pattern)}
            case = Case(
                f"pscl {formulation} {pattern}", "prototype_contrastive_loss", split, same, {"formulation": formulation}
            )
            yield case
            yield _rows_of(case, (B, C))
        weighted = {**same, "class_weight": _draw(C, seed=2).abs()}
        split = {"features": x, "labels": make_labels(B, C, "ignored"), "sample_weight": _draw(B, seed=3).abs()}
        yield Case(
            f"pscl {formulation} weights", "prototype_contrastive_loss", split, weighted,
            {"formulation": formulation, "reduction": "sum"},
        )  # fmt: skip


def dual_cases() -> Iterator[Case]:
    x = make_features(2, B, C, D, dtype=torch.float64)
    same = {"prototypes": _draw(C, D, seed=4), "class_weight": _draw(C, seed=2).abs()}
    for formulation in ("paper", "released"):
        for bank in (x[1], None):
            split = {"embeddings": x[0], "bank_embeddings": bank, "labels": make_labels(B, C, "ignored")}
            options = {"formulation": formulation, "sample_temperature": 0.3, "prototype_temperature": 0.2}
            yield Case(f"dual {formulation} {bank is None}", "dual_contrastive_loss", split, same, options)


def supcon_cases() -> Iterator[Case]:
    x = torch.nn.functional.normalize(make_features(B, V, D, dtype=torch.float64), dim=-1)
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 3])
    tau = {"temperature": torch.tensor(0.3, dtype=torch.float64)}
    mask = (torch.rand(B, B, generator=torch.Generator().manual_seed(5)) < 0.4).double()
    for mode in ("all", "one"):
        for name, how in (
            ("classes", {"labels": labels}),
            ("floats", {"labels": labels.double() - 2.0}),
            ("views", {}),
        ):
            case = Case(f"supcon {mode} {name}", "supcon_loss", {"features": x, **how}, tau, {"contrast_mode": mode})
            yield case
            yield _rows_of(case, (B, V if mode == "all" else 1))
        yield Case(f"supcon {mode} mask", "supcon_loss", {"features": x, "mask": mask}, tau, {"contrast_mode": mode})
    split = {"features": x, "labels": labels, "sample_weight": _draw(B, seed=3).abs()}
    for group in ({"ring": True}, {"capacity": B}):
        yield Case(f"supcon {group}", "supcon_loss", split, tau, {"reduction": "sum"}, group)


def mlc_cases() -> Iterator[Case]:
    x, tau = make_features(B, V, D, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    split = {"features": x, "labels": make_labels(B, C, "ignored")}
    keys, key_labels = _draw(K, D, seed=6), make_labels(K, C, "ignored", seed=9)
    for number, weighting in enumerate(F.WEIGHTINGS):
        same = {"temperature": tau}
        if weighting in ("mulsupcon", "msc"):
            same["class_weight"] = _draw(C, seed=2).abs()
        if weighting == "msc":
            same["prototypes"] = _draw(C, D, seed=4)
        options = {"weighting": weighting, "alpha": 0.7, "beta": 0.6}
        name = f"mlc {weighting}"
        yield Case(name, "multilabel_supcon_loss", split, same, options)
        both = {**same, "keys": keys, "key_labels": key_labels}
        ring = {"ring": True} if number % 2 else {"capacity": B}
        yield _rows_of(Case(name + " keys", "multilabel_supcon_loss", split, both, options, ring), (B, V))
        alone = {**options, "include_batch": False, "reduction": "sum"}
        yield Case(name + " keys alone", "multilabel_supcon_loss", split, both, alone)
    flat = {"features": x[:, 0], "labels": split["labels"], "sample_weight": _draw(B, seed=3).abs()}
    options = {"weighting": "mulsupcon", "per_image": True, "normalize": False, "base_temperature": 0.1}
    yield Case("mlc flat", "multilabel_supcon_loss", flat, {"temperature": tau}, options)
    dense = {"features": x[:, 0], "labels": None, "weights": _draw(B, B + K, seed=7).abs()}
    for group in ({}, {"ring": True}):
        yield Case(f"mlc dense {group}", "multilabel_supcon_loss", dense, {"temperature": tau, "keys": keys}, {}, group)


CASES = {
    "sscl": sscl_cases, "pscl": pscl_cases, "dual": dual_cases, "supcon": supcon_cases, "mlc": mlc_cases,
}  # fmt: skip
