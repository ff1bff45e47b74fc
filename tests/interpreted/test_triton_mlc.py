"""Triton's image-level multi-label losses against the oracle and the golden numbers."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ops.test_mlc import COLUMNS, KINDS, problem, ragged_cases, run
from sadcl.kernels import _launch, mlc_pairs
from torch import Tensor

from sadcl import functional as F
from sadcl import reference
from sadcl.testing import (
    RAGGED,
    assert_within_budget,
    error_budgets,
    layouts,
    make_features,
    make_labels,
    poisoned_allocations,
    value_and_grads,
)

GOLDEN = Path(__file__).parent.parent / "golden"
# One of each weighting with images alone, and with keys, a batch or both.
FILES = [path for kind in F.WEIGHTINGS for path in sorted(GOLDEN.glob(f"mlc_{kind}_*.npz"))[::6]]


def both(leaves: dict[str, Tensor], options: dict[str, Any], upstream: Tensor | None = None, **more: Any) -> None:
    """Triton's values and gradients are the oracle's, in float64."""
    ours = functools.partial(run, leaves, upstream, **options, **more)
    with poisoned_allocations():
        got = ours(backend="triton")
    for name, g, w in zip(("loss", *leaves), got, ours(backend="reference"), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_matches_the_oracle(kind: str, columns: str) -> None:
    """Every weighting over every kind of columns; patterns, normalisation and reduction in turn."""
    number = KINDS.index(kind) + COLUMNS.index(columns)
    for case in (number, number + 3):
        leaves, options = problem(kind, columns, (5, 2, 5, 9, 4), RAGGED[case % len(RAGGED)])
        normalize, reduction = ((True, "none"), (False, "sum"))[case % 2]
        upstream = torch.rand(5, 2, dtype=torch.float64) if reduction == "none" else None
        both(leaves, options, upstream, normalize=normalize, reduction=reduction)


@pytest.mark.parametrize("classes", [31, 32, 33, 65])
@pytest.mark.parametrize("kind", ["all", "jaccard", "simdis", "msc"])
def test_edges_of_words(kind: str, classes: int) -> None:
    leaves, options = problem(kind, "both", (5, 1, classes, 9, 4), "ignored")
    options["labels"][:, -1] = options["key_labels"][:, -1] = 1
    both(leaves, options)


@pytest.mark.parametrize("size", [(15, 1, 5, 9, 17), (8, 2, 5, 33, 16), (17, 1, 5, 32, 15), (7, 5, 3, 31, 33)], ids=str)
@pytest.mark.parametrize("kind", ["any", "dense"])
def test_edges_of_tiles(kind: str, size: tuple[int, ...]) -> None:
    """Anchors, width and keys one less than, as many as, one more than a tile has; more than a panel."""
    leaves, options = problem(kind, "both", size)
    got, want = (run(leaves, backend=backend, **options) for backend in ("triton", "torch"))
    for name, g, w in zip(("loss", *leaves), got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.budget
@pytest.mark.parametrize(
    "kind, dtype",
    [(kind, torch.float32) for kind in F.WEIGHTINGS] + [("any", torch.bfloat16), ("simdis", torch.float16)],
    ids=str,
)
def test_within_the_error_budget(kind: str, dtype: torch.dtype) -> None:
    leaves, options = problem(kind, "both", (4, 2, 5, 24, 6), "random", dtype)
    leaves = {name: value for name, value in leaves.items() if name in ("features", "keys", "prototypes")}
    options |= {"normalize": True, "temperature": 0.1}
    names = list(leaves)
    upstream = torch.rand(4, 2, dtype=torch.float64)

    def oracle(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True)) | {k: v for k, v in options.items() if k not in ("labels",)}
        kind = given.pop("weighting")
        return reference.mlc(given.pop("features"), options["labels"], given.pop("temperature"), kind, **given)

    wide = [value.double() for value in leaves.values()]
    budgets = error_budgets(lambda: value_and_grads(oracle, *wide, upstream=upstream), dtype, draws=4)

    def ours(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        rest = {name: value for name, value in options.items() if name != "labels"}
        rows = F.multilabel_supcon_loss(
            given.pop("features"), options["labels"], reduction="none", backend="triton", **given, **rest
        )
        own = (options["labels"] == 1).sum(dim=1).clamp(min=1)[:, None]
        return rows * own if kind == "msc" else rows  # the oracle knows no 1 / |y|

    got = value_and_grads(ours, *leaves.values(), upstream=upstream.float())
    for name, g, budget in zip(("loss", *names), got, budgets, strict=True):
        assert_within_budget(name, g, budget)


@pytest.mark.parametrize("kind", ["all", "mulsupcon", "jaccard", "msc"])
def test_defined_results(kind: str) -> None:
    for name, change in ragged_cases():
        leaves, options = problem(kind, "both" if name != "no_keys" else "keys", (4, 2, 5, 9, 3))
        change(leaves, options)
        got, want = (run(leaves, backend=which, **options) for which in ("triton", "reference"))
        assert all(value.isfinite().all() for value in got), name
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("kind", ["any", "mulsupcon", "msc"])
def test_nan_reaches_whom_it_should(kind: str) -> None:
    leaves, options = problem(kind, "keys", pattern="random")
    labels = options["labels"]
    labels[:, 1], labels[2], options["key_labels"][:, 1] = 1, 0, 1  # image 2 has no partner
    leaves["features"][2] = float("nan")
    loss, *grads = run(leaves, backend="triton", **options)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads) and not grads[0][2].any()
    leaves["features"][1] = float("nan")
    rows = F.multilabel_supcon_loss(**leaves, reduction="none", backend="triton", **options)
    assert rows[1].isnan().all() and rows[[0, 2, 3, 4, 5]].isfinite().all()
    options["labels"] = torch.zeros_like(labels)
    loss, *grads = run(leaves, backend="triton", **options)
    assert loss == 0 and not any(grad.any() for grad in grads)  # nobody looked at the NaN


@pytest.mark.parametrize("kind", ["any", "mulsupcon", "dense"])
def test_only_what_is_wanted(kind: str) -> None:
    """Each gradient alone is what it is beside the others; the temperature's needs the keys' sweep, unseen."""
    for columns in ("keys", "both"):
        leaves, options = problem(kind, columns, (4, 2, 5, 9, 3))
        together = dict(zip(leaves, run(leaves, backend="triton", **options)[1:], strict=True))
        for name, want in together.items():
            fixed = {other: value for other, value in leaves.items() if other != name}
            got = value_and_grads(
                lambda x, fixed=fixed, name=name, options=options: F.multilabel_supcon_loss(
                    **fixed, **{name: x}, backend="triton", **options
                ),
                leaves[name],
            )[1]
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=f"{columns}: {name}")


def test_layouts_labels_and_determinism() -> None:
    leaves, options = problem("jaccard", "both", (5, 2, 5, 9, 4), dtype=torch.float32)
    want = run(leaves, backend="triton", **options)
    for name, layout in layouts(leaves["features"]):
        got = run({**leaves, "features": layout}, backend="triton", **options)
        assert all(map(torch.equal, got, want)), name
    for dtype in (torch.int8, torch.int64, torch.bfloat16):
        given = {key: options[key].to(dtype).t().contiguous().t() for key in ("labels", "key_labels")}
        assert all(map(torch.equal, run(leaves, backend="triton", **{**options, **given}), want)), dtype
    given = {key: options[key] == 1 for key in ("labels", "key_labels")}
    want = run(leaves, backend="reference", **{**options, **{key: value.float() for key, value in given.items()}})
    torch.testing.assert_close(run(leaves, backend="triton", **{**options, **given}), want, rtol=2e-5, atol=1e-6)


def test_scores_that_float32_rounds_away() -> None:
    """At tau = 0.001 the peak is 1,000: beside it, in float32, a rest of 1e-5 would be lost."""
    x = torch.tensor([[[1.0, 0.0]], [[1.0, 1e-3]], [[0.99, 0.14]]])
    labels = torch.tensor([[1, 0], [1, 0], [0, 1]])
    for normalize in (True, False):
        call = lambda x, backend, n=normalize: F.multilabel_supcon_loss(  # noqa: E731
            x, labels, weighting="any", temperature=1e-3, normalize=n, reduction="none", backend=backend
        )
        got, want = call(x, "triton"), call(x.double(), "reference")
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("beta", [0.0, 2.5])
def test_factors_of_rows(beta: float) -> None:
    leaves, options = problem("msc", "both", (5, 1, 5, 9, 4))
    options["beta"] = beta
    both(leaves, options)


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0])
def test_thresholds_are_whole_numbers(threshold: float) -> None:
    """``I Q >= U P`` is ``I / U >= threshold`` in float64, where it is met exactly too."""
    shared, union = torch.meshgrid(torch.arange(121), torch.arange(1, 121), indexing="ij")
    numerator, denominator = mlc_pairs.least_share(threshold, 120)
    want = (shared.double() / union.double() >= threshold) & (shared <= union)
    assert torch.equal((shared * denominator >= union * numerator) & (shared <= union), want)
    above = math.nextafter(threshold, 2.0)
    if above <= 1.0:
        numerator, denominator = mlc_pairs.least_share(above, 120)
        want = (shared.double() / union.double() >= above) & (shared <= union)
        assert torch.equal((shared * denominator >= union * numerator) & (shared <= union), want)


@pytest.mark.parametrize("kind", ["jaccard", "mulsupcon", "msc"])
def test_positives_that_weigh_nothing(kind: str) -> None:
    leaves, options = problem(kind, "both", (4, 1, 9, 5, 5), dtype=torch.float32)
    options |= {"labels": torch.eye(9)[:4], "key_labels": torch.eye(9)[4:], "threshold": 0.0}
    if "class_weight" in leaves:
        options["class_weight"] = torch.zeros_like(leaves.pop("class_weight"))
    for value in run(leaves, backend="triton", **options):
        assert torch.equal(value, torch.zeros_like(value))


def test_launches() -> None:
    leaves, options = problem("any", "both", (5, 2, 5, 9, 4))
    with _launch.recording() as recorded:
        run(leaves, backend="triton", **options)
    stage, pack, sweep = ["_stage_vectors_kernel"] * 2, ["_pack_kernel"] * 2, ["_pair_sweep_kernel"]
    gradient = ["_gradient_kernel", "_combine_kernel"] * 2
    assert [launch.name for launch in recorded] == [
        *stage, *pack, *sweep, "_loss_kernel", *stage, *pack, *sweep, "_moves_kernel", *gradient, "_temperature_kernel",
    ]  # fmt: skip


def test_wrong_labels_and_weights_are_refused() -> None:
    x, labels = make_features(4, 9), make_labels(4, 5)
    run = functools.partial(F.multilabel_supcon_loss, x, backend="triton")
    with pytest.raises(ValueError, match="labels: expected 0, 1 or -1"):
        run(labels + 2)
    with pytest.raises(ValueError, match="key_labels: expected 0, 1 or -1"):
        run(labels, keys=x, key_labels=labels + 2)
    with pytest.raises(ValueError, match="weights: expected finite numbers >= 0, got -1"):
        run(labels, weights=-torch.ones(4, 4))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_golden(path: Path) -> None:
    golden = np.load(path)
    vectors = [name for name in ("features", "keys", "prototypes") if name in golden]
    leaves = {name: torch.tensor(golden[name]) for name in vectors}
    options = {name: golden[name].item() for name in ("threshold", "alpha", "beta", "per_image") if name in golden}
    loss, *grads = run(
        leaves,
        labels=torch.tensor(golden["labels"]),
        key_labels=torch.tensor(golden["key_labels"]) if "keys" in golden else None,
        weighting=str(golden["kind"]),
        temperature=float(golden["temperature"]),
        include_batch=bool(golden["include_batch"]) if "include_batch" in golden else "keys" not in golden,
        backend="triton",
        **options,
    )
    wanted = [golden["loss"], *(golden[f"grad_{name}"] for name in vectors)]
    for name, got, want in zip(("loss", *vectors), (loss, *grads), wanted, strict=True):
        assert np.linalg.norm(got.double().numpy() - want) <= 1e-5 * max(np.linalg.norm(want), 0.3), name


def test_gradients_of_large_scores() -> None:
    """Near-duplicates at tau = 0.001, where float32 scores of 1,000 differ in their last bits."""
    x = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0, 0.2]]) + 0.01 * torch.randn(6, 3), dim=-1)
    labels = make_labels(6, 3, "all_active")
    x = x.bfloat16().float()
    loss = lambda x, backend: F.multilabel_supcon_loss(  # noqa: E731
        x, labels, weighting="any", temperature=1e-3, normalize=False, backend=backend
    )
    got, want = value_and_grads(lambda x: loss(x, "triton"), x), value_and_grads(lambda x: loss(x, "reference"), x)
    torch.testing.assert_close(got[0].double(), want[0].double(), rtol=1e-3, atol=1e-4)
    assert (got[1] - want[1]).norm() <= 1e-3 * want[1].norm()
