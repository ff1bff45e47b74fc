"""Image-level multi-label contrastive losses: every backend against the float64 oracle."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sadcl import functional as F
from sadcl.testing import RAGGED, layouts, make_features, make_labels, poisoned_allocations, value_and_grads
from tests.here import backends_here

BACKENDS = backends_here("mlc")
KINDS = (*F.WEIGHTINGS, "dense")
COLUMNS = ("batch", "keys", "both")


def problem(
    kind: str,
    columns: str = "batch",
    size: tuple[int, ...] = (6, 2, 5, 9, 7),
    pattern: str = "ignored",
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(what may have a gradient, the rest) of B, V, C, D, K."""
    b, v, c, d, k = size
    leaves = {"features": make_features(b, v, d, dtype=dtype), "temperature": torch.tensor(0.3, dtype=dtype)}
    options: dict[str, Any] = {"labels": make_labels(b, c, pattern), "weighting": kind}
    if columns != "batch":
        leaves["keys"] = make_features(k, d, dtype=dtype, seed=4)
        options["key_labels"] = make_labels(k, c, pattern, seed=3)
        options["include_batch"] = columns == "both"
    generator = torch.Generator().manual_seed(5)
    if kind == "msc":
        leaves["prototypes"] = make_features(c, d, dtype=dtype, seed=6)
        options.update(alpha=0.7, beta=0.6)
    if kind in ("msc", "mulsupcon"):
        leaves["class_weight"] = torch.rand(c, generator=generator).to(dtype) + 0.1
    if kind == "dense":
        n, m = b * v, (b * v if columns != "keys" else 0) + (k if columns != "batch" else 0)
        weights = torch.rand(n, m, generator=generator) * (torch.rand(n, m, generator=generator) < 0.4)
        leaves["weights"], options["weighting"] = weights.to(dtype), "any"
        leaves["weights"][0] = 0
    return leaves, options


def run(leaves: dict[str, Tensor], upstream: Tensor | None = None, **options: Any) -> tuple[Tensor, ...]:
    names = list(leaves)

    def loss(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return F.multilabel_supcon_loss(given.pop("features"), options["labels"], **given, **rest)

    rest = {name: value for name, value in options.items() if name != "labels"}
    return value_and_grads(loss, *leaves.values(), upstream=upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_matches_the_oracle(kind: str, columns: str, backend: str) -> None:
    choices = ((True, "mean"), (True, "none"), (False, "sum"))
    for case, pattern in enumerate(RAGGED):
        leaves, options = problem(kind, columns, (5, 2, 5, 9, 4), pattern)
        normalize, reduction = choices[case % 3]
        upstream = torch.rand(5, 2, dtype=torch.float64) if reduction == "none" else None
        ours = functools.partial(run, leaves, upstream, normalize=normalize, reduction=reduction, **options)
        with poisoned_allocations():
            got = ours(backend=backend)
        for name, g, w in zip(("loss", *leaves), got, ours(backend="reference"), strict=True):
            torch.testing.assert_close(g, w, rtol=1e-9, atol=1e-11, msg=f"{name}, {pattern}, {reduction}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_near_the_oracle(kind: str, columns: str, dtype: torch.dtype, backend: str) -> None:
    leaves, options = problem(kind, columns, (21, 2, 33, 63, 60), "ignored", dtype)
    leaves["temperature"] = torch.tensor(0.1)
    for name in ("class_weight", "weights"):
        if name in leaves:
            leaves[name] = leaves[name].float()
    got = run(leaves, backend=backend, **options)
    want = run({name: leaf.double() for name, leaf in leaves.items()}, backend="reference", **options)
    digits = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for name, g, w in zip(("loss", *leaves), got, want, strict=True):
        bar = digits if g.dtype == dtype else 1e-6
        rows, truth = (
            g.double().reshape(-1, g.shape[-1] if g.dim() else 1),
            w.reshape(-1, w.shape[-1] if w.dim() else 1),
        )
        error, size = (rows - truth).norm(dim=1), truth.norm(dim=1)
        assert (error <= bar * (size + 0.3 * size.mean()) * 3).all(), f"{name}: {(error / size).max():.3g}"


@pytest.mark.parametrize("backend", backends_here("mlc", "reference"))
@pytest.mark.parametrize("kind", F.WEIGHTINGS)
def test_reductions_and_weights(kind: str, backend: str) -> None:
    leaves, options = problem(kind, "both")
    call = functools.partial(F.multilabel_supcon_loss, backend=backend, **leaves, **options)
    rows, labels = call(reduction="none"), options["labels"]
    assert (rows.shape == (6, 2) and (rows[(labels == 1).sum(dim=1) == 0] == 0).all()) or kind == "all"
    count = 2 * (labels == 1).sum() if kind == "mulsupcon" else 12
    torch.testing.assert_close(call(reduction="sum"), rows.sum())
    torch.testing.assert_close(call(), rows.sum() / count)
    sample_weight = torch.rand(6, dtype=torch.float64)
    weighted = (rows * sample_weight[:, None]).sum() / count
    torch.testing.assert_close(call(sample_weight=sample_weight), weighted)
    torch.testing.assert_close(call(base_temperature=0.1), rows.sum() / count * 3)
    if kind == "mulsupcon":
        own = (labels == 1).sum(dim=1).clamp(min=1)[:, None]
        torch.testing.assert_close(call(per_image=True, reduction="none"), rows / own)
        torch.testing.assert_close(call(per_image=True), (rows / own).sum() / 12)


@pytest.mark.parametrize("backend", backends_here("mlc", "reference"))
def test_flat_features_are_one_view(backend: str) -> None:
    leaves, options = problem("any", size=(6, 1, 5, 9, 7))
    x = leaves["features"]
    got = F.multilabel_supcon_loss(x[:, 0], reduction="none", backend=backend, **options)
    want = F.multilabel_supcon_loss(x, reduction="none", backend=backend, **options)
    assert got.shape == (6,) and torch.equal(got, want[:, 0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_say_what_a_weighting_says(backend: str) -> None:
    """SupCon's positives as dense weights, and as labels of one class an image."""
    groups = torch.tensor([0, 1, 0, 2, 1, 0])
    x = torch.nn.functional.normalize(make_features(6, 2, 9, dtype=torch.float64), dim=-1)
    same = (groups[:, None] == groups).repeat_interleave(2, 0).repeat_interleave(2, 1)
    same = (same & ~torch.eye(12, dtype=torch.bool)).double()
    want = F.supcon_loss(x, groups, temperature=0.1, base_temperature=None)
    weights = same / same.sum(dim=1, keepdim=True)
    torch.testing.assert_close(F.multilabel_supcon_loss(x, None, weights=weights, backend=backend), want)
    one_hot = torch.nn.functional.one_hot(groups, 3)
    for kind in ("all", "any", "jaccard", "overlap", "mulsupcon", "simdis"):
        got = F.multilabel_supcon_loss(x, one_hot, weighting=kind, backend=backend)
        torch.testing.assert_close(got, want)


def ragged_cases() -> Iterator[tuple[str, Callable[[dict[str, Tensor], dict[str, Any]], None]]]:
    def no_labels(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
        options["labels"] = torch.zeros_like(options["labels"])

    def one_row(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
        leaves["features"], options["labels"] = leaves["features"][:1, :1], options["labels"][:1]

    def no_keys(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
        if "keys" in leaves:
            leaves["keys"], options["key_labels"] = leaves["keys"][:0], options["key_labels"][:0]

    def all_equal(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
        leaves["features"] = leaves["features"][:1, :1].expand(leaves["features"].shape)

    def zero_rows(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
        leaves["features"] = leaves["features"].clone()
        leaves["features"][1] = 0

    def all_ignored(leaves: dict[str, Tensor], options: dict[str, Any]) -> None:
        options["labels"] = torch.full_like(options["labels"], -1)

    for case in (no_labels, one_row, no_keys, all_equal, zero_rows, all_ignored):
        yield case.__name__, case


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("kind", F.WEIGHTINGS)
def test_defined_results(kind: str, columns: str, backend: str) -> None:
    for name, change in ragged_cases():
        leaves, options = problem(kind, columns)
        change(leaves, options)
        got, want = (run(leaves, backend=which, **options) for which in (backend, "reference"))
        assert all(value.isfinite().all() for value in got), name
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=name)
    leaves, options = problem(kind, "keys" if kind != "msc" else columns)
    options["labels"] = torch.zeros_like(options["labels"])
    if kind == "all":
        options["key_labels"][:, 0] = 1
    loss, *grads = run(leaves, backend=backend, **options)
    assert loss == 0 and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("backend", backends_here("mlc", "reference"))
@pytest.mark.parametrize("kind", F.WEIGHTINGS)
def test_nan_reaches_whom_it_should(kind: str, backend: str) -> None:
    leaves, options = problem(kind, "keys", pattern="random")
    labels = options["labels"]
    labels[:, 1], labels[2], options["key_labels"][:, 1] = 1, 0, 1  # image 2 has no partner
    options["key_labels"][2] = labels[3]
    leaves["features"][2] = float("nan")
    loss, *grads = run(leaves, backend=backend, **options)
    assert loss.isfinite() and all(grad.isfinite().all() for grad in grads), "an anchor without a positive"
    assert (grads[0][2] == 0).all()
    options["key_labels"][0] = labels[1]
    leaves["features"][1] = float("nan")
    rows = F.multilabel_supcon_loss(**leaves, reduction="none", backend=backend, **options)
    assert rows[1].isnan().all() and rows[[0, 2, 3, 4, 5]].isfinite().all()
    leaves, options = problem(kind, "both", pattern="all_active")
    leaves["keys"][0] = float("nan")
    rows = F.multilabel_supcon_loss(**leaves, reduction="none", backend=backend, **options)
    assert rows.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_label_dtypes_agree(backend: str) -> None:
    leaves, options = problem("any", "both", dtype=torch.float32)
    want = run(leaves, backend=backend, **options)
    for name, layout in layouts(leaves["features"]):
        got = run({**leaves, "features": layout}, backend=backend, **options)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7, msg=name)
    for dtype in (torch.int8, torch.int64, torch.float64, torch.bfloat16):
        changed = {**options, "labels": options["labels"].to(dtype), "key_labels": options["key_labels"].to(dtype).t()}
        changed["key_labels"] = changed["key_labels"].contiguous().t()
        torch.testing.assert_close(run(leaves, backend=backend, **changed), want, rtol=0, atol=0)
    plain = {name: (options[name] == 1) for name in ("labels", "key_labels")}
    bools, numbers = {**options, **plain}, {**options, **{name: value.float() for name, value in plain.items()}}
    torch.testing.assert_close(run(leaves, **bools), run(leaves, **numbers), rtol=0, atol=0)
    unsigned = {**options, **{name: value.to(torch.uint8) for name, value in plain.items()}}
    torch.testing.assert_close(run(leaves, **unsigned), run(leaves, **numbers), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [40.0, 640.0])
def test_vectors_as_they_are(size: float, backend: str) -> None:
    """Scores in the thousands: the softmax must not be rebuilt from a float32 log-sum-exp."""
    leaves, options = problem("any", "both", (20, 1, 5, 16, 9), "random", torch.float32)
    leaves["features"], leaves["keys"] = leaves["features"] * size / 4, leaves["keys"] * size / 4
    leaves["temperature"] = torch.tensor(1.0)
    got = run(leaves, normalize=False, backend=backend, **options)
    want = run({name: leaf.double() for name, leaf in leaves.items()}, normalize=False, backend="reference", **options)
    for name, g, w in zip(("loss", *leaves), got, want, strict=True):
        scores = 2**-24 * size * size  # what float32 scores of that size are off by
        assert (g.double() - w).norm() <= (1e-5 + scores) * w.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [*COLUMNS, "queue"])
@pytest.mark.parametrize("kind", KINDS)
def test_where_nothing_is_shared_all_is_exactly_zero(kind: str, columns: str, backend: str, dtype: torch.dtype) -> None:
    """Positives that weigh nothing (jaccard at threshold 0; classes of weight 0) move nothing, not even by 1e-38."""
    leaves, options = problem(kind, "keys" if columns == "queue" else columns, (4, 1, 9, 5, 5), dtype=dtype)
    options["labels"] = torch.eye(9)[:4]
    if columns != "batch":
        options["key_labels"] = torch.eye(9)[4:]
    if columns == "queue":  # keys that want no gradient pass by once
        options["keys"] = leaves.pop("keys")
    if "class_weight" in leaves:
        options["class_weight"] = torch.zeros_like(leaves.pop("class_weight"))
    if kind == "dense":
        options["weights"] = -torch.zeros_like(leaves.pop("weights"))
    for value in run(leaves, backend=backend, threshold=0.0, reduction="sum", **options):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", ["batch", "keys"])
def test_a_share_meets_its_threshold_in_whole_numbers(columns: str, backend: str, dtype: torch.dtype) -> None:
    """0.33333334 is more than 1/3, which float32 rounds up to it: a third is no positive there."""
    leaves, options = problem("jaccard", columns, (5, 1, 5, 9, 5), dtype=dtype)
    labels = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 0, 0], [0, 0, 1, 1, 0]])
    options["labels"] = labels
    if columns == "keys":
        options["key_labels"] = labels
    for threshold in (1 / 3, 0.33333334, 0.3333333):
        got, want = (run(leaves, backend=b, threshold=threshold, **options) for b in (backend, "reference"))
        for name, g, w in zip(("loss", *leaves), got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5, msg=f"{name}, {threshold}")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    columns=st.sampled_from(COLUMNS),
    size=st.tuples(st.integers(1, 9), st.integers(1, 3), st.integers(1, 70), st.integers(1, 30), st.integers(0, 60)),
    pattern=st.sampled_from(RAGGED),
    tau=st.floats(0.05, 2.0),
    threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)
def test_any_problem(
    backend: str, kind: str, columns: str, size: tuple[int, ...], pattern: str, tau: float, threshold: float
) -> None:
    leaves, options = problem(kind, columns, size, pattern)
    leaves["temperature"] = torch.tensor(tau, dtype=torch.float64)
    got, want = (run(leaves, backend=which, threshold=threshold, **options) for which in (backend, "reference"))
    for name, g, w in zip(("loss", *leaves), got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-10, msg=name)


def test_wrong_arguments() -> None:
    x, labels = make_features(6, 2, 9), make_labels(6, 5)
    keys, key_labels, prototypes = make_features(4, 9, seed=2), make_labels(4, 5, seed=2), make_features(5, 9, seed=3)
    both: dict[str, Any] = {"keys": keys, "key_labels": key_labels}
    for error, words, options in [
        (TypeError, r"features: expected a torch.Tensor \[B, V, D\] or \[B, D\], got list", {"features": [1.0]}),
        (ValueError, r"features: expected shape \[B, V, D\] or \[B, D\], got \(9,\)", {"features": x[0, 0]}),
        (ValueError, r"features: expected no empty dimension, got shape \(0, 2, 9\)", {"features": x[:0]}),
        (TypeError, "features: expected a floating point dtype, got torch.int32", {"features": x.int()}),
        (TypeError, r"labels: expected a torch.Tensor \[B, C\], got NoneType", {"labels": None}),
        (
            ValueError,
            r"labels: expected B=6 \(from features\) in dimension 0, got shape \(5, 5\)",
            {"labels": labels[:5]},
        ),
        (TypeError, "labels: expected a real dtype", {"labels": labels.to(torch.complex64)}),
        (ValueError, "labels: expected 0, 1 or -1", {"labels": labels + 2}),
        (ValueError, "key_labels: expected 0, 1 or -1", {"keys": keys, "key_labels": key_labels + 2}),
        (ValueError, r"key_labels: expected the labels \[K, C\] of keys, got None", {"keys": keys}),
        (ValueError, "key_labels: expected None without keys", {"key_labels": key_labels}),
        (ValueError, r"key_labels: expected K=4 \(from keys\)", {"keys": keys, "key_labels": key_labels[:3]}),
        (ValueError, r"key_labels: expected C=5 \(from labels\)", {"keys": keys, "key_labels": key_labels[:, :4]}),
        (ValueError, r"keys: expected D=9 \(from features\)", {**both, "keys": keys[:, :8]}),
        (TypeError, "keys: expected features' dtype torch.float32, got torch.float64", {**both, "keys": keys.double()}),
        (ValueError, "keys is on meta", {**both, "keys": keys.to("meta")}),
        (ValueError, "include_batch: expected True without keys", {"include_batch": False}),
        (ValueError, r"prototypes: expected a tensor \[C, D\] with weighting='msc', got None", {"weighting": "msc"}),
        (
            ValueError,
            "prototypes: expected None .* with weighting='any'",
            {"weighting": "any", "prototypes": prototypes},
        ),
        (ValueError, r"prototypes: expected C=5", {"weighting": "msc", "prototypes": prototypes[:4]}),
        (ValueError, r"prototypes: expected D=9", {"weighting": "msc", "prototypes": prototypes[:, :4]}),
        (ValueError, "weighting: expected one of all, any, .*, got 'none'", {"weighting": "none"}),
        (ValueError, r"threshold: expected a number in \[0, 1\], got 1.5", {"threshold": 1.5}),
        (ValueError, "threshold: expected a number in", {"threshold": float("nan")}),
        (TypeError, "alpha: expected a number, got str", {"alpha": "1"}),
        (ValueError, "beta: expected a finite number >= 0, got -1", {"beta": -1}),
        (ValueError, "temperature: expected a finite number > 0, got 0", {"temperature": 0}),
        (ValueError, "base_temperature: expected a finite number > 0, got -1", {"base_temperature": -1}),
        (ValueError, "reduction: expected one of mean, sum, none", {"reduction": "max"}),
        (ValueError, "class_weight: expected None", {"weighting": "any", "class_weight": torch.ones(5)}),
        (ValueError, r"class_weight: expected C=5", {"class_weight": torch.ones(4)}),
        (ValueError, r"sample_weight: expected B=6", {"sample_weight": torch.ones(12)}),
        (ValueError, "per_image: expected False", {"weighting": "any", "per_image": True}),
        (ValueError, r"weights: expected columns=12 \(from features and keys\)", {"weights": torch.ones(12, 16)}),
        (ValueError, r"weights: expected B V=12 \(from features\)", {"weights": torch.ones(6, 12)}),
        (ValueError, "weights: expected finite numbers >= 0, got -1", {"weights": -torch.ones(12, 12)}),
        (ValueError, "weights: expected finite numbers >= 0, got nan", {"weights": torch.full((12, 12), torch.nan)}),
        (TypeError, "weights: expected a floating", {"weights": torch.ones(12, 12, dtype=torch.int64)}),
        (RuntimeError, "backend='triton'", {"backend": "triton"}),
    ]:
        given = {"features": x, "labels": labels, **options}
        for backend in [options.pop("backend")] if "backend" in options else [*(p.values[0] for p in BACKENDS), None]:
            with pytest.raises(error, match=words):
                F.multilabel_supcon_loss(given["features"], given["labels"], **options_of(given, backend))


def options_of(given: dict[str, Any], backend: str | None) -> dict[str, Any]:
    return {**{k: v for k, v in given.items() if k not in ("features", "labels", "backend")}, "backend": backend}


def test_autocast_takes_keys_of_another_dtype() -> None:
    x, labels = make_features(6, 9, dtype=torch.bfloat16), make_labels(6, 5)
    keys, key_labels = make_features(4, 9, seed=2), make_labels(4, 5, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = F.multilabel_supcon_loss(x, labels, keys=keys, key_labels=key_labels)
    want = F.multilabel_supcon_loss(x, labels, keys=keys.bfloat16(), key_labels=key_labels)
    assert torch.equal(got, want)
