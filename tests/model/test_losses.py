"""The losses as modules: what they hold, and what pickles of them name."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sadcl
from sadcl.testing import make_features, make_labels

B, C, D = 6, 5, 7
MAKE = {
    "sscl": sadcl.SampleContrastiveLoss,
    "pscl": sadcl.PrototypeContrastiveLoss,
    "dual": sadcl.DualContrastiveLoss,
    "asl": sadcl.AsymmetricLoss,
}
BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(not sadcl.backends()[name].available, reason=f"no {name}"))
    for name in ("cpp", "torch", "reference")
]


def value(name, loss):
    features, labels = make_features(B, C, D), make_labels(B, C)
    inputs = {
        "sscl": (features, labels),
        "pscl": (features, features[0], labels),
        "dual": (features, None, features[0], labels, features[..., 0]),
        "asl": (features[..., 0], labels),
    }
    result = loss(*inputs[name])
    return result.total if name == "dual" else result


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("backend", BACKENDS)
def test_class_weights_that_are_a_parameter_are_trained(name, backend):
    def make(weight):
        return MAKE[name](class_weight=weight, backend=backend)

    weight = nn.Parameter(torch.linspace(0.5, 2.0, C))
    loss = make(weight)
    assert [id(p) for p in loss.parameters()] == [id(weight)] and not list(loss.buffers())
    value(name, loss).backward()
    got = weight.grad
    # The loss is linear in the weights.
    for index in range(C):
        with torch.no_grad():
            low, high = (value(name, make(weight.detach() + step * torch.eye(C)[index])) for step in (0, 1))
        torch.testing.assert_close(got[index], high - low, rtol=1e-3, atol=1e-4 * float(got.abs().max()))
    assert got.abs().sum() > 0
    twin = make(nn.Parameter(torch.zeros(C)))
    twin.load_state_dict(loss.state_dict())
    assert torch.equal(next(twin.parameters()), weight)


@pytest.mark.parametrize("name", MAKE)
def test_class_weights_that_are_a_tensor_are_a_buffer(name):
    loss = MAKE[name](class_weight=torch.ones(C)).double()
    assert not list(loss.parameters()) and next(loss.buffers()).dtype == torch.float64
    assert not list(MAKE[name](class_weight=None).buffers())
    with pytest.raises(TypeError, match="class_weight"):
        MAKE[name](class_weight=[1.0] * C)


@pytest.mark.parametrize("name", MAKE)
def test_copies_and_pickles_compute_the_same(name):
    loss = MAKE[name](class_weight=nn.Parameter(torch.linspace(0.5, 2.0, C)))
    want = value(name, loss)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert type(twin) is type(loss) and torch.equal(value(name, twin), want)


@pytest.mark.parametrize("name", sorted(set(sadcl.losses.__all__) - {"DEFAULT_WEIGHTS"}))
def test_pickles_of_earlier_versions_find_every_class(name):
    kind = getattr(sadcl.losses, name)
    assert pickle.loads(f"csadcl.losses\n{name}\n.".encode()) is kind
    assert issubclass(kind, nn.Module) or name == "DualContrastiveLossOutput"


def test_one_parameter_serves_the_three_parts():
    weight = nn.Parameter(torch.ones(C))
    loss = sadcl.DualContrastiveLoss(class_weight=weight, backend="torch")
    assert loss.sample.class_weight is loss.prototype.class_weight is loss.classification.class_weight is weight
