"""The memory bank against the loop it replaces, and its slot rules."""

from __future__ import annotations

import pytest
import torch

from sadcl.bank import MemoryBank


def looped(slots, features, probabilities, labels, threshold):
    slots = slots.clone()
    for b in range(features.shape[0]):
        for c in range(features.shape[1]):
            if labels[b, c] == 1 and probabilities[b, c] > threshold:
                slots[b, c] = features[b, c]
    return slots


def filled(batch_slots=5, classes=7, width=6, seed=0):
    torch.manual_seed(seed)
    bank = MemoryBank(batch_slots, classes, width)
    bank.fill(torch.randn(classes, width))
    return bank


@pytest.mark.parametrize("batch", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("probabilities", [False, True])
def test_matches_the_loop(batch, dtype, probabilities):
    bank = filled()
    before = bank.slots.clone()
    for step in range(3):
        features = torch.randn(batch, 7, 6)
        labels = (torch.rand(batch, 7) < 0.5).to(dtype)
        scores = torch.rand(batch, 7) if probabilities else torch.randn(batch, 7) * 4
        chance = scores if probabilities else scores.sigmoid()
        want = looped(bank.slots, features, chance, labels, 0.6)
        bank.update(features, scores, labels, 0.6, probabilities=probabilities)
        assert torch.equal(bank.slots, want), step
    assert torch.equal(bank.slots[batch:], before[batch:])
    assert not torch.equal(bank.slots[:batch], before[:batch])


def test_ignored_labels_and_the_threshold_are_strict():
    bank = filled(1, 4, 2)
    before = bank.slots.clone()
    labels = torch.tensor([[1, -1, 0, 1]])
    bank.update(torch.ones(1, 4, 2), torch.tensor([[0.8, 0.9, 0.9, 0.81]]), labels, probabilities=True)
    assert torch.equal(bank.slots[0, :3], before[0, :3])
    assert torch.equal(bank.slots[0, 3], torch.ones(2))


def test_what_nan_scores_and_half_precision_do():
    bank = filled(2, 3, 4)
    before = bank.slots.clone()
    labels = torch.ones(2, 3)
    bank.update(torch.full((2, 3, 4), float("nan")), torch.full((2, 3), float("nan")), labels)
    assert torch.equal(bank.slots, before)
    features = torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        bank.update(features, torch.full((2, 3), 9.0, dtype=torch.bfloat16), labels)
    assert bank.slots.dtype == torch.float32 and not bank.slots.requires_grad
    assert torch.equal(bank.slots, features.detach().float())


def test_an_update_between_forward_and_backward_leaves_the_gradient_alone():
    bank = filled(2, 3, 4)
    layer = torch.nn.Linear(4, 2)
    layer(bank.read(2)).square().sum().backward()
    want = layer.weight.grad.clone()
    layer.zero_grad()
    loss = layer(bank.read(2)).square().sum()
    bank.fill(torch.zeros(3, 4))
    loss.backward()
    assert torch.equal(layer.weight.grad, want)


def test_no_step_reads_the_device_back():
    """On the meta device anything that needs a value fails."""
    bank = MemoryBank(4, 3, 8).to("meta")
    bank.update(*(torch.empty(*s, device="meta") for s in ((2, 3, 8), (2, 3), (2, 3))))


def test_state_is_the_buffer():
    bank, other = filled(), filled(seed=1)
    other.load_state_dict(bank.state_dict())
    assert torch.equal(bank.slots, other.slots) and list(bank.state_dict()) == ["slots"]


def test_bad_input():
    bank = filled()
    good = (torch.zeros(2, 7, 6), torch.zeros(2, 7), torch.zeros(2, 7))
    with pytest.raises(ValueError, match="batch of 6 images: the memory bank has 5 slots"):
        bank.update(torch.zeros(6, 7, 6), torch.zeros(6, 7), torch.zeros(6, 7))
    with pytest.raises(ValueError, match="6 images"):
        bank.read(6)
    with pytest.raises(ValueError, match="label_features"):
        bank.update(torch.zeros(2, 7, 5), *good[1:])
    with pytest.raises(ValueError, match="scores"):
        bank.update(good[0], torch.zeros(2, 6), good[2])
    with pytest.raises(ValueError, match="labels"):
        bank.update(*good[:2], torch.zeros(3, 7))
    with pytest.raises(ValueError, match="threshold"):
        bank.update(*good, threshold=80)
    with pytest.raises(ValueError, match="prototypes"):
        bank.fill(torch.zeros(6, 7))
    with pytest.raises(ValueError, match="sizes"):
        MemoryBank(0, 3, 4)
