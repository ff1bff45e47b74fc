"""The memory bank's tensor belongs to its process: it travels with the module as a buffer does, but never by DDP."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from sadcl._own import own_tensors
from sadcl.bank import MemoryBank
from sadcl.head import SADCLHead

pytest.importorskip("jsonargparse")  # processes starts sadcl's command line
import processes

SIZES = {"hidden_dim": 8, "num_heads": 2, "ffn_dim": 8, "encoder_layers": 0, "decoder_layers": 1, "proj_dim": 4}


def make(slots: int = 2, classes: int = 3) -> SADCLHead:
    torch.manual_seed(0)
    return SADCLHead(8, classes, feature_size=(2, 2), dropout=0.0, bank_slots=slots, **SIZES)


class Own(nn.Module):
    """A module of one's own around the head, with a buffer that DDP must keep the same everywhere."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.inner = head
        self.register_buffer("shared", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> object:
        return self.inner(x)


WRAPPED = {
    "the head itself": lambda head: head,
    "a module of one's own": Own,
    "two levels, in a list": lambda head: Own(nn.Sequential(nn.Identity(), Own(head))),
    "compiled": lambda head: torch.compile(head, backend="eager"),
    "compiled inside": lambda head: Own(torch.compile(head, backend="eager")),
    "compiled outside": lambda head: torch.compile(Own(head), backend="eager"),
}


def _train(folder: Path) -> None:
    """In each of two processes: under every wrapper the bank stays this rank's, and takes its own features."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    seen = {}
    for name, wrap in WRAPPED.items():
        head = make()
        head.memory_bank.slots.fill_(rank + 1.0)  # as after loading this process's part of a checkpoint
        module = wrap(head)
        for part in module.modules():
            if isinstance(part, Own):
                part.shared.fill_(rank)
        parallel = nn.parallel.DistributedDataParallel(module)
        built = head.memory_bank.slots.clone()
        x = torch.full((2, 8, 2, 2), rank + 1.0)
        out = parallel(x)
        head.update_bank(out, torch.tensor([[1, 0, 0], [0, 0, 0]]), threshold=0.0)
        sum(part.square().mean() for part in out[:5]).backward()
        parallel(x)
        shared = [part.shared for part in module.modules() if isinstance(part, Own)]
        seen[name] = {
            "built": built,
            "bank": head.memory_bank.slots,
            "feature": out.label_features[0, 0].detach(),
            "grads": [p.grad for p in head.parameters()],
            "shared": torch.stack(shared) if shared else torch.zeros(1),
        }
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    if not torch.distributed.is_available():
        pytest.skip("torch without distributed")
    folder = tmp_path_factory.mktemp("ranks")
    assert processes.group(_train, folder) == [0, 0], [p.read_text()[-2000:] for p in folder.glob("*.txt")]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", WRAPPED)
def test_every_process_keeps_its_own_bank(ranks, name) -> None:
    for rank, seen in enumerate(ranks):
        now = seen[name]
        assert torch.equal(now["built"], torch.full((2, 3, 8), rank + 1.0))
        want = now["built"].clone()
        want[0, 0] = now["feature"]
        assert torch.equal(now["bank"], want)
        assert not now["shared"].any(), "an ordinary buffer is rank 0's"
    assert not torch.equal(ranks[0][name]["feature"], ranks[1][name]["feature"])
    assert processes.differences(ranks[0][name]["grads"], ranks[1][name]["grads"]) == []


def test_state_dict_copies_and_pickles_hold_the_bank() -> None:
    head = make()
    head.memory_bank.slots.normal_()
    slots = head.memory_bank.slots
    assert head.state_dict()["memory_bank.slots"].data_ptr() == slots.data_ptr()
    assert head.state_dict(keep_vars=True)["memory_bank.slots"] is slots
    file = io.BytesIO()
    torch.save(head, file)
    file.seek(0)
    for twin in (copy.deepcopy(head), pickle.loads(pickle.dumps(head)), torch.load(file, weights_only=False)):
        assert torch.equal(twin.memory_bank.slots, slots)
        assert twin.memory_bank.slots.data_ptr() != slots.data_ptr()
    assert list(own_tensors(head)) == [slots] and list(own_tensors(nn.Linear(2, 2))) == []
    with torch.device("meta"):
        assert make().memory_bank.slots.is_meta


def test_the_bank_moves_and_casts_with_its_module() -> None:
    head = make()
    assert nn.Sequential(head).double()[0].memory_bank.slots.dtype == torch.float64
    assert head.to("meta").memory_bank.slots.is_meta
    assert not head.to_empty(device="cpu").memory_bank.slots.is_meta


def test_a_pickle_of_an_earlier_version_no_longer_holds_a_buffer() -> None:
    bank = MemoryBank(2, 3, 4)
    state = bank.__getstate__() if hasattr(bank, "__getstate__") else dict(vars(bank))
    state = {**state, "_buffers": {"slots": state["slots"] + 1}}
    del state["slots"]
    old = MemoryBank.__new__(MemoryBank)
    old.__setstate__(state)
    assert not list(old.buffers()) and torch.equal(old.slots, torch.ones(2, 3, 4))
    assert torch.equal(old.double().state_dict()["slots"], torch.ones(2, 3, 4).double())


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("saved", [1, 2, 4, 7])
def test_a_state_of_another_batch_size_loads(saved, assign) -> None:
    head, other = make(4), make(saved)
    other.memory_bank.slots.normal_()
    got = nn.Sequential(head)
    got.load_state_dict(nn.Sequential(other).state_dict(), assign=assign)
    want = [other.memory_bank.slots[number % saved] for number in range(4)]
    assert torch.equal(head.memory_bank.slots, torch.stack(want)) and head.memory_bank.batch_slots == 4
    assert head(torch.randn(4, 8, 2, 2)).bank_embeddings.shape == (4, 3, 4)
    assert torch.equal(head.prototypes, other.prototypes)


def test_a_state_that_does_not_fit_is_an_error() -> None:
    bank = MemoryBank(2, 3, 4)
    for wrong in (torch.zeros(2, 5, 4), torch.zeros(2, 3, 5), torch.zeros(0, 3, 4), torch.zeros(3), torch.zeros(())):
        with pytest.raises(RuntimeError, match=r"slots.*\[2, 3, 4\] in the module"):
            bank.load_state_dict({"slots": wrong})
    with pytest.raises(RuntimeError, match="Missing"):
        bank.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected.*more"):
        bank.load_state_dict({"slots": torch.zeros(2, 3, 4), "more": torch.zeros(1)})
    assert bank.load_state_dict({}, strict=False).missing_keys == ["slots"]
    assert torch.equal(bank.slots, torch.zeros(2, 3, 4))


def test_an_averaged_model_follows_the_bank() -> None:
    pytest.importorskip("timm")
    from sadcl.train.config import EmaConfig
    from sadcl.train.ema import make_ema

    head = make()
    ema = make_ema(head, EmaConfig(decay=0.9))
    head.memory_bank.slots.normal_()
    ema.update(head, 3)
    assert torch.equal(ema.module.memory_bank.slots, head.memory_bank.slots)
    assert ema.module.memory_bank.slots.data_ptr() != head.memory_bank.slots.data_ptr()
