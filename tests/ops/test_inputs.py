"""What any public function may be handed: other devices, lazy views, odd dtypes and sizes, ignored places."""

from __future__ import annotations

import fractions

import numpy as np
import pytest
import torch
from calls import CALLS, cases
from torch import Tensor

import sadcl
from sadcl import functional as F
from sadcl.ops import compact
from sadcl.testing import make_features, make_labels
from tests.here import backends_here

NAMES = {"soft": "labels", "groups": "labels"}  # tensors that a message calls otherwise
PLACES = ("BC", "BCD", "BVCD")  # what has a place for every label
LABELLED = [
    name
    for name, call in CALLS.items()
    if "labels" in call.axes and any(call.axes[field] in PLACES for field in call.derived)
]
CONTRASTIVE = [name for name, call in CALLS.items() if any(field.endswith("temperature") for field in call.axes)]

NORMALISED = [
    name for name, call in CALLS.items() if call.function in ("sscl", "pscl", "dual", "mlc") and name != "supcon-mask"
]


def value_and_grads(name: str, backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    call = CALLS[name]
    leaves = {key: x.detach().clone().requires_grad_(key in call.derived) for key, x in tensors.items()}
    return differentiate(name, backend, leaves)


def differentiate(name: str, backend: str, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    wanted = {key: x for key, x in leaves.items() if x.requires_grad}
    loss = CALLS[name].run(backend, **leaves)
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {"loss": loss.detach(), **dict(zip(wanted, grads, strict=True))}


# -- devices --


@pytest.mark.parametrize("name, backend", cases(reference=True))
def test_a_tensor_on_another_device_is_named(name: str, backend: str) -> None:
    for field in CALLS[name].axes:
        tensors = CALLS[name].make()
        if len(tensors) == 1:
            continue
        tensors[field] = tensors[field].to("meta")
        with pytest.raises(ValueError, match=NAMES.get(field, field)):
            CALLS[name].run(backend, **tensors)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_active_on_another_device_is_named(backend: str) -> None:
    x, y = make_features(4, 3, 8), make_labels(4, 3)
    active = F.compact_labels(y, "torch")
    for field in active._fields:
        moved = active._replace(**{field: getattr(active, field).to("meta")})
        with pytest.raises(ValueError, match="active is on meta but labels is on cpu"):
            F.sample_contrastive_loss(x, y, active=moved, backend=backend)


@pytest.mark.parametrize("name", [name for name in CALLS if name != "supcon-mask"])
def test_meta_tensors_give_shapes(name: str) -> None:
    tensors = {key: x.to("meta").requires_grad_(x.requires_grad) for key, x in CALLS[name].make(grad=True).items()}
    for field, grad in differentiate(name, "torch", tensors).items():
        assert grad.is_meta and grad.shape == (() if field == "loss" else tensors[field].shape)


# -- lazy views --

LAZY = {
    "negated": lambda x: torch._neg_view(-x),
    "imaginary": lambda x: torch.complex(torch.zeros_like(x), -x).conj().imag,
    "real": lambda x: torch.complex(x, x).conj().real,
}


@pytest.mark.parametrize("name, backend", cases(reference=True))
def test_lazily_negated_and_conjugated_views(name: str, backend: str) -> None:
    tensors = CALLS[name].make(dtype=torch.float64)
    want = value_and_grads(name, backend, tensors)
    for field, x in tensors.items():
        for kind, view in LAZY.items():
            if x.dtype == torch.bool or (kind != "negated" and not x.is_floating_point()):
                continue
            leaves = {key: y.detach().clone().requires_grad_(key in CALLS[name].derived) for key, y in tensors.items()}
            leaves[field] = view(x.detach().clone()).requires_grad_(field in CALLS[name].derived)
            assert leaves[field].is_neg() == (kind != "real")
            got = differentiate(name, backend, leaves)
            for key in want:
                torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-11, msg=f"{field} {kind}: {key}")


@pytest.mark.parametrize("name, backend", cases(reference=True))
def test_lazy_zeros(name: str, backend: str) -> None:
    """What forward-mode AD hands out: a tensor without memory."""
    for field, x in CALLS[name].make(dtype=torch.float64).items():
        if field in ("groups", "key_padding_mask") or field.endswith("temperature"):
            continue
        if CALLS[name].derived == [field]:
            continue
        leaves = CALLS[name].make(dtype=torch.float64, grad=True)
        leaves[field] = torch.zeros_like(x)
        want = differentiate(name, backend, leaves)
        leaves[field] = torch._efficientzerotensor(x.shape, dtype=x.dtype)
        got = differentiate(name, backend, leaves)
        for key in want:
            torch.testing.assert_close(got[key], want[key], rtol=1e-9, atol=1e-11, msg=f"{field}: {key}")


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_lazy_views_outside_the_losses(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not sadcl.backends()[backend].available:
        pytest.skip(sadcl.backends()[backend].reason)
    monkeypatch.setenv("SADCL_BACKEND", backend)
    scores, labels = make_features(6, 4), make_labels(6, 4, "ignored")
    for view in (LAZY["negated"], LAZY["imaginary"]):
        for got, want in zip(F.compact_labels(view(labels)), F.compact_labels(labels), strict=True):
            assert torch.equal(got, want)
        want = sadcl.metrics.average_precision(scores, labels)
        torch.testing.assert_close(
            sadcl.metrics.average_precision(view(scores), view(labels)), want, rtol=0, atol=0, equal_nan=True
        )
        banks = []
        for given in ((lambda x: x), view):
            bank = sadcl.MemoryBank(6, 4, 8)
            bank.update(given(make_features(6, 4, 8)), given(scores), given(labels), 0.5)
            banks.append(bank.slots)
        assert torch.equal(*banks) and banks[0].abs().sum() > 0


# -- dtypes --


@pytest.mark.parametrize("name, backend", cases(reference=True, names=[name for name in CALLS if name != "linear"]))
@pytest.mark.parametrize("kind", ["float8", "uint16", "complex", "sparse"])
def test_a_tensor_that_no_kernel_reads_is_a_type_error(name: str, backend: str, kind: str) -> None:
    """But for the linear layer's: torch.nn.functional.linear takes what ours does not, or refuses it itself."""
    for field in CALLS[name].axes:
        tensors = CALLS[name].make()
        x = tensors[field]
        if kind == "sparse":
            tensors[field] = x.reshape(-1)[:1].to_sparse() if x.dim() == 0 else x.to_sparse()
        else:
            dtype = {"float8": torch.float8_e4m3fn, "uint16": torch.uint16, "complex": torch.complex64}[kind]
            tensors[field] = (x if x.dtype == torch.bool else x.abs()).to(dtype)
        with pytest.raises(TypeError, match=f"^{NAMES.get(field, field)}: expected"):
            CALLS[name].run(backend, **tensors)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.uint16, torch.uint64, torch.complex64])
def test_labels_that_no_kernel_reads_are_not_compacted(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="labels: expected a real dtype"):
        F.compact_labels(make_labels(3, 4).to(dtype))


# -- temperatures --


@pytest.mark.parametrize("name, backend", cases(reference=True, names=CONTRASTIVE))
@pytest.mark.parametrize("bad", [-0.2, 0.0, float("nan"), float("inf")])
def test_a_temperature_that_is_none_is_refused(name: str, backend: str, bad: float) -> None:
    fields = [field for field in CALLS[name].axes if field.endswith("temperature")]
    for field in fields:
        tensors = CALLS[name].make()
        for value in (torch.tensor(bad), bad, np.float32(bad)):
            with pytest.raises(ValueError, match=f"{field}: expected a finite number > 0"):
                CALLS[name].run(backend, **{**tensors, field: value})


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_temperature_is_read_when_a_compiled_graph_runs(backend: str) -> None:
    torch._dynamo.reset()
    call = CALLS["sscl"]
    run = torch.compile(lambda **tensors: call.run(backend, **tensors), fullgraph=True, backend="aot_eager")
    tensors = call.make()
    torch.testing.assert_close(run(**tensors), call.run(backend, **tensors))
    with pytest.raises(ValueError, match="temperature: expected a finite number > 0"):
        run(**{**tensors, "temperature": torch.tensor(-0.2)})


@pytest.mark.parametrize("name, backend", cases(reference=True, names=CONTRASTIVE))
def test_any_real_number_is_a_temperature(name: str, backend: str) -> None:
    tensors = CALLS[name].make()
    fields = [field for field in CALLS[name].axes if field.endswith("temperature")]
    want = CALLS[name].run(backend, **{**tensors, **dict.fromkeys(fields, 0.5)})
    for half in (np.float32(0.5), np.float16(0.5), np.float64(0.5), fractions.Fraction(1, 2), torch.tensor(0.5).half()):
        assert torch.equal(CALLS[name].run(backend, **{**tensors, **dict.fromkeys(fields, half)}), want)
    assert CALLS[name].run(backend, **{**tensors, **dict.fromkeys(fields, np.int64(1))}).isfinite()


# -- label attention's choices, soft labels --


@pytest.mark.parametrize("backend", backends_here("label_attention", "reference"))
@pytest.mark.parametrize(
    "choice, message",
    [
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1, got 1.0"),
        ({"dropout": -0.1}, "dropout: expected 0 <= dropout < 1"),
        ({"dropout": float("nan")}, "dropout: expected 0 <= dropout < 1"),
        ({"num_heads": 0}, "num_heads: expected a divisor of E=8, got 0"),
        ({"num_heads": -2}, "num_heads: expected a divisor"),
        ({"num_heads": 3}, "num_heads: expected a divisor"),
        ({"form": "bent"}, "form: expected one of plain, folded"),
        ({"in_proj_weight": torch.zeros(16, 8)}, r"in_proj_weight: expected \[3E, E\] with E=8"),
        ({"out_proj_bias": torch.zeros(7)}, r"out_proj_bias: expected \[E\] with E=8"),
    ],
)
def test_choices_of_label_attention(backend: str, choice: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        F.label_attention(**{**CALLS["attention"].make(), "num_heads": 2, **choice}, backend=backend)


@pytest.mark.parametrize("backend", backends_here("asl", "reference"))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -2.0, 2.0, -0.5])
def test_soft_labels_out_of_range(backend: str, bad: float) -> None:
    y = make_labels(4, 3)
    y[1, 2] = bad
    with pytest.raises(ValueError, match=r"labels: expected values in \[0, 1\] or -1 \(ignored\), got"):
        F.asymmetric_loss(make_features(4, 3), y, backend=backend)


# -- ignored places --


@pytest.mark.parametrize("name, backend", cases(reference=True, names=LABELLED))
@pytest.mark.parametrize("fill", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_ignored_places_may_hold_anything(name: str, backend: str, fill: float) -> None:
    """Values and every gradient are to the bit what 0 there gives, and the places' own gradients are 0."""
    call = CALLS[name]
    results, ignored = [], call.make()["labels"] == -1
    assert ignored.any()
    held = [field for field in call.derived if call.axes[field] in PLACES]
    for value in (0.0, fill):
        tensors = call.make()
        for field in held:
            x = tensors[field].clone()
            (x.transpose(1, 2) if call.axes[field] == "BVCD" else x)[ignored] = value
            tensors[field] = x
        results.append(value_and_grads(name, backend, tensors))
    zero, filled = results
    for field in zero:
        assert torch.equal(filled[field], zero[field]), field
    for field in held:
        grad = filled[field].transpose(1, 2) if call.axes[field] == "BVCD" else filled[field]
        assert (grad[ignored] == 0).all(), field


# -- the ends of float64 --


@pytest.mark.parametrize("name, backend", cases(reference=True, names=NORMALISED))
@pytest.mark.parametrize("scale", [1e170, 1e-170, 1e300, 1e-300])
def test_float64_features_of_any_length(name: str, backend: str, scale: float) -> None:
    tensors = CALLS[name].make(dtype=torch.float64)
    held = [field for field, axes in CALLS[name].axes.items() if axes.endswith("D")]
    want = value_and_grads(name, backend, tensors)
    got = value_and_grads(name, backend, {f: x * scale if f in held else x for f, x in tensors.items()})
    for field in want:
        mine = got[field] * scale if field in held else got[field]
        torch.testing.assert_close(mine, want[field], rtol=1e-10, atol=1e-12, msg=field)


@pytest.mark.parametrize("backend", backends_here("pscl", "reference"))
@pytest.mark.parametrize("options", [{"reduction": "none"}, {"sample_weight": torch.linspace(0.5, 2, 7).double()}])
def test_pscl_shares_are_float64(backend: str, options: dict[str, object]) -> None:
    """A class's loss on its three positives: shares of a third in float32 are off by 1e-8."""
    x, p, y = make_features(7, 3, 8, dtype=torch.float64), make_features(3, 8, dtype=torch.float64), torch.zeros(7, 3)
    y[:3, 0] = y[1:4, 1] = y[:6, 2] = 1
    got = F.prototype_contrastive_loss(x, p, y, backend=backend, **options)
    classes = sadcl.reference.pscl(x, p, y, 0.07)
    want = classes * (y.double() / y.double().sum(0))
    if "sample_weight" in options:
        want = (want * options["sample_weight"][:, None]).sum() / y.sum()
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-15)


# -- sizes of zero --


@pytest.mark.parametrize("name, backend", cases(reference=True))
def test_sizes_of_zero_are_refused_or_answered(name: str, backend: str) -> None:
    """By a ValueError that says the shape, or by results without NaN (attention, classifier and linear take B = 0)."""
    tensors = {
        key: torch.zeros([0 if letter == "B" else size for letter, size in zip(axes, x.shape, strict=True)],
                         dtype=x.dtype).requires_grad_(key in CALLS[name].derived)
        for (key, axes), x in zip(CALLS[name].axes.items(), CALLS[name].make().values(), strict=True)
    }  # fmt: skip
    for key in tensors:
        if key.endswith("temperature"):
            tensors[key] = torch.tensor(0.2, requires_grad=True)
    if CALLS[name].function in ("label_attention", "group_classifier", "linear"):
        assert all(x.isfinite().all() for x in differentiate(name, backend, tensors).values())
    else:
        with pytest.raises(ValueError, match="expected no empty dimension"):
            CALLS[name].run(backend, **tensors)


def test_compaction_keeps_what_its_capacity_says() -> None:
    labels = make_labels(4, 3, "one_row_per_class")
    for capacity in (None, 12, 100, 11):
        for backend in compact.BACKENDS:
            if backend == "triton" or not sadcl.backends()[backend].available:
                continue
            assert F.compact_labels(labels, backend, capacity=capacity).pairs.shape == (min(capacity or 12, 12),)
