"""Another default device (torch.set_default_device) than the inputs': every tensor is made on the inputs' device.

The meta device stands in for an accelerator: whatever is made there by mistake has no values.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._device import _device_constructors

import sadcl
from sadcl import functional as F
from sadcl.classes import check_indices
from sadcl.metrics import MultilabelAccumulator, average_precision, multilabel_report
from sadcl.prototypes import PrototypeSums
from sadcl.testing import make_features, make_labels
from sadcl.train.thresholds import tune_thresholds

B, C, D = 6, 5, 8
SIZES = {"hidden_dim": D, "num_heads": 2, "ffn_dim": 8, "encoder_layers": 1, "decoder_layers": 2, "proj_dim": 4}


def head(**options) -> sadcl.SADCLHead:
    torch.manual_seed(0)
    with torch.device("cpu"):
        return sadcl.SADCLHead(D, C, feature_size=(2, 3), bank_slots=B, dropout=0.0, **SIZES, **options)


def _ap(method):
    scores, labels = make_features(B, C, 1)[..., 0], make_labels(B, C, "ignored")
    return average_precision(scores, labels, method)


def _report():
    scores, labels = make_features(B, C, 1)[..., 0].sigmoid(), make_labels(B, C)
    report = multilabel_report(scores, labels, threshold=[0.5] * C)
    return report.ap, torch.from_numpy(np.array([report.mAP, report.CF1, report.top3_OF1]))


def _accumulated():
    seen = MultilabelAccumulator()
    for _ in range(3):
        seen.update(make_features(B, C, 1)[..., 0].double().numpy(), make_labels(B, C).bool())
    return seen.scores, seen.labels, seen.compute().ap


def _tuned():
    return tune_thresholds(make_features(B, C, 1)[..., 0].sigmoid(), make_labels(B, C))


def _prototypes():
    sums = PrototypeSums()
    sums.add(make_features(B, C, D), make_features(B, C, 1)[..., 0], make_labels(B, C, "single_pair"))
    with pytest.warns(UserWarning, match="at random"):
        return sums.finish()


def _losses(backend):
    x, labels = make_features(B, 2, C, D).requires_grad_(), make_labels(B, C)
    weight = make_features(1, 1, C, seed=5)[0, 0].abs()
    active = F.compact_labels(labels)
    options = {"class_weight": weight, "backend": backend}
    loss = F.sample_contrastive_loss(x, labels, active=active if backend != "reference" else None, **options)
    loss = loss + F.prototype_contrastive_loss(x[:, 0], x[0, 0].detach(), labels, **options)
    loss = loss + sum(F.dual_contrastive_loss(x[:, 0], x[:, 1], x[0, 0].detach(), labels, **options))
    loss = loss + F.asymmetric_loss(x[:, 0, :, 0], labels, **options)
    loss = loss + F.supcon_loss(x[:, :, 0], labels[:, 0], backend=backend)
    loss.backward()
    return loss.detach(), x.grad


def _attention(form, backend, dropout):
    torch.manual_seed(1)
    with torch.device("cpu"):
        module = sadcl.LabelAttention(D, 2, dropout, form=form, backend=backend)
    query, memory = make_features(C, D).requires_grad_(), make_features(B, 6, D)
    padded = make_labels(B, 6, labels_per_image=1.0).bool()
    out, weights = module(query, memory, memory[0], padded, need_weights=True)
    out.square().sum().backward()
    return out.detach(), weights.detach(), query.grad


def _step():
    one = head()
    out = one(make_features(B, D, 4, 3), need_weights="all")  # another map size than usual: positions are made anew
    one.update_bank(out, make_labels(B, C), threshold=0.1)
    loss = sadcl.DualContrastiveLoss()(out.embeddings, out.bank_embeddings, out.prototype_embeddings, make_labels(B, C))
    loss.total.backward()
    return [part.detach() for part in (*out, one.memory_bank.slots, one.queries.grad)]


def _classes():
    one = head()
    one.keep_classes([4, 0, 2])
    one.extend_classes(1)
    one.extend_classes(make_features(1, 7))
    return [part.detach() for part in (*one(make_features(2, D, 2, 3))[:5], one.memory_bank.slots)]


def _contrastive():
    one = head(contrastive=False)
    one.init_contrastive(batch_slots=2)
    return [part.detach() for part in one(make_features(2, D, 2, 3))[:5]]


CASES = {
    **{f"ap {method}": lambda method=method: _ap(method) for method in ("voc_area", "sklearn", "voc11")},
    "report": _report,
    "accumulator": _accumulated,
    "thresholds": _tuned,
    "prototypes": _prototypes,
    "indices": lambda: check_indices([2, 0], C),
    **{f"losses {b}": lambda b=b: _losses(b) for b in ("cpp", "torch", "reference") if sadcl.backends()[b].available},
    **{
        f"attention {form} {backend} {dropout}": lambda f=form, b=backend, d=dropout: _attention(f, b, d)
        for form in ("plain", "folded")
        for backend in ("cpp", "torch")
        for dropout in (0.0, 0.4)
        if sadcl.backends()[backend].available
    },
    "head": _step,
    "classes of a head": _classes,
    "contrastive parts of a head": _contrastive,
}


@pytest.fixture
def elsewhere() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_results_are_the_same_whatever_the_default_device(name, portable, monkeypatch, request) -> None:
    if portable:
        monkeypatch.setenv("SADCL_BACKEND", "torch")
    want = CASES[name]()
    request.getfixturevalue("elsewhere")
    got = CASES[name]()
    torch.set_default_device(None)
    for a, b in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))


def test_a_meta_head_stays_on_meta(elsewhere) -> None:
    one = head().to("meta")
    one.extend_classes(2)
    one.init_contrastive(batch_slots=3)
    assert all(tensor.is_meta for tensor in one.state_dict().values())
    assert one(torch.empty(2, D, 2, 3)).logits.is_meta


def test_every_tensor_is_made_on_a_named_device() -> None:
    """But for what a module makes in its constructor, which goes to the default device as torch's modules do."""
    makers = {function.__name__ for function in _device_constructors()}
    found = []
    root = Path(sadcl.__file__).parent
    for path in sorted([*root.rglob("*.py"), *(root.parent / "kernels").glob("*.py")]):
        tree = ast.parse(path.read_text())
        constructed = {
            id(node)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "__init__"
            for node in ast.walk(function)
        }
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and (node.func.value.id, node.func.attr in makers) == ("torch", True)
                and not any(keyword.arg in ("device", None) for keyword in node.keywords)
                and id(node) not in constructed
            ):
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
    assert found == []
