"""The losses inside real training: DDP, FSDP2, accumulation, checkpointing, torch.compile, copies of modules."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sadcl
from sadcl.testing import make_features, make_labels

B, C, D, WIDTH, STEPS = 8, 4, 6, 5, 5
SIZES = {2: [5, 3], 3: [0, 6, 2]}


class Model(nn.Module):
    """Two views' embeddings, prototypes, and a sum of all the losses over the group."""

    def __init__(self, group: str | None, learnable: bool = True, again: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, C * D)
        self.prototypes = nn.Parameter(torch.randn(C, D))
        tau = (0.3, 0.05, 1.0) if learnable else None
        self.dual = sadcl.DualContrastiveLoss(
            1.0, 1.0, sample_learnable_temperature=tau, group=group, class_weight=nn.Parameter(torch.ones(C))
        )
        self.mlc = sadcl.MultiLabelSupConLoss("msc", learnable_temperature=tau, group=group)
        self.supcon = sadcl.SupConLoss(temperature=0.5, group=group)
        self.again = again
        self.double()

    def embed(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).view(-1, C, D)

    def losses(self, one: Tensor, two: Tensor, labels: Tensor) -> Tensor:
        total = self.dual(one, two, self.prototypes, labels).total
        rows = nn.functional.normalize(torch.stack([one[:, 0], two[:, 0]], dim=1), dim=-1)
        total = total + self.mlc(torch.stack([one[:, 1], two[:, 1]], dim=1), labels, prototypes=self.prototypes)
        return total + 0.3 * self.supcon(rows, labels[:, 0] + 2 * labels[:, 1])

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        one, two = self.embed(x[:, 0]), self.embed(x[:, 1])
        if self.again:
            return checkpoint(self.losses, one, two, labels, use_reentrant=False)
        return self.losses(one, two, labels)


def batch(step: int) -> tuple[Tensor, Tensor]:
    return make_features(B, 2, WIDTH, seed=step, dtype=torch.float64), make_labels(B, C, "random", seed=step)


def own(rank: int, world: int, *tensors: Tensor) -> list[Tensor]:
    first = sum(SIZES[world][:rank])
    return [x[first : first + SIZES[world][rank]] for x in tensors]


def train(model: nn.Module, forward: Any, take: Any, accumulate: int = 1) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            waits = part + 1 == accumulate or not isinstance(forward, DistributedDataParallel)
            with nullcontext() if waits else forward.no_sync():
                (forward(*take(*batch(10 * step + part))) / accumulate).backward()
        optimizer.step()
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in model.named_parameters()}
    return {name: p.detach().numpy() for name, p in full.items()}


def with_ddp(rank: int, world: int, accumulate: int, again: bool) -> dict[str, Any]:
    model = Model("world", again=again)
    forward = DistributedDataParallel(model, bucket_cap_mb=0.0001)  # many buckets: its collectives lie between ours
    return train(model, forward, lambda *x: own(rank, world, *x), accumulate)


def with_fsdp(rank: int, world: int) -> dict[str, Any]:
    """FSDP2 shards no scalar, so the temperature stays fixed."""
    mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("dp",))
    model = Model("world", learnable=False)
    fully_shard(model.first, mesh=mesh)
    fully_shard(model.second, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.dual.sample.group = model.dual.prototype.group = mesh["dp"]
    return train(model, model, lambda *x: own(rank, world, *x))


def assert_equal(results: list[dict[str, Any]], truth: dict[str, Any]) -> None:
    for rank, result in enumerate(results):
        assert result.keys() == truth.keys()
        for name, want in truth.items():
            got = torch.as_tensor(result[name])
            torch.testing.assert_close(got, torch.as_tensor(want), rtol=1e-9, atol=1e-10, msg=f"{name} on rank {rank}")


@pytest.mark.parametrize("world, accumulate, again", [(2, 1, False), (3, 1, False), (2, 2, False), (2, 1, True)])
def test_ddp_trains_as_one_process(world: int, accumulate: int, again: bool) -> None:
    model = Model(None)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    truth = train(model, model, lambda *x: x, accumulate)
    assert all(not torch.equal(before[name], torch.as_tensor(x)) for name, x in truth.items())
    assert_equal(ranks(world).run(with_ddp, world, accumulate, again), truth)


@pytest.mark.parametrize("world", [2, 3])
def test_fsdp_trains_as_one_process(world: int) -> None:
    model = Model(None, learnable=False)
    truth = train(model, model, lambda *x: x)
    assert_equal(ranks(world).run(with_fsdp, world), truth)


# -- torch.compile --


def loss_and_grads(function: Any, *inputs: Tensor) -> list[Any]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*leaves)
    return [x.detach().numpy() for x in (loss, *torch.autograd.grad(loss, leaves))]


def compiled(rank: int, name: str, backend: str, capacity: int | None, ring: bool) -> tuple[list[Any], list[Any]]:
    """What a whole compiled graph of forward and backward gives, and what eager mode gives."""
    torch.compiler.reset()
    x, y = own(rank, 2, make_features(B, 2, C, D), make_labels(B, C, "ignored"))
    tau, prototypes = torch.tensor(0.3), make_features(C, D, seed=3)
    more: dict[str, Any] = {"group": "world", "ring": ring, "capacity": capacity}
    F = sadcl.functional
    functions = {
        "sscl": lambda x, p, t: F.sample_contrastive_loss(x, y, temperature=t, **more) + 0.0 * p.sum(),
        "released": lambda x, p, t: (
            F.sample_contrastive_loss(x, y, temperature=t, formulation="released", **more) + 0.0 * p.sum()
        ),
        "dual": lambda x, p, t: sum(F.dual_contrastive_loss(x[:, 0], x[:, 1], p, y, sample_temperature=t, **more)),
        "supcon": lambda x, p, t: F.supcon_loss(x[:, :, 0], temperature=t, **more) + 0.0 * p.sum(),
        "msc": lambda x, p, t: F.multilabel_supcon_loss(
            x[:, :, 0], y, weighting="msc", prototypes=p, temperature=t, **more
        ),
    }
    run = torch.compile(functions[name], fullgraph=True, backend=backend)
    return loss_and_grads(run, x, prototypes, tau), loss_and_grads(functions[name], x, prototypes, tau)


@pytest.mark.parametrize(
    "name, backend, capacity, ring",
    [
        ("sscl", "aot_eager", None, False),
        ("sscl", "aot_eager", B * C, False),
        ("sscl", "aot_eager", None, True),
        ("released", "aot_eager", B * C, True),
        ("dual", "aot_eager", B * C, False),
        ("supcon", "aot_eager", None, False),
        ("msc", "aot_eager", B, False),
        pytest.param("dual", "inductor", None, False, marks=pytest.mark.slow),
    ],
)
def test_compiled_in_one_graph(name: str, backend: str, capacity: int | None, ring: bool) -> None:
    for rank, (got, want) in enumerate(ranks(2).run(compiled, name, backend, capacity, ring)):
        for ours, eager in zip(got, want, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-6, msg=f"rank {rank}")


# -- modules --


def copied(rank: int) -> None:
    """Copies of a module of any kind of group are of the same group."""
    pair = dist.new_group([0, 1])
    mesh = dist.init_device_mesh("cpu", (3,), mesh_dim_names=("dp",))
    x, y = make_features(2, 2, C, D, seed=rank), make_labels(2, C, "random", seed=rank)
    for group, world in ((pair, 2), (dist.group.WORLD, 3), (mesh["dp"], 3), ("world", 3)):
        if world == 2 and rank == 2:
            with pytest.raises(ValueError, match="group: expected a group that this process is in"):
                sadcl.SampleContrastiveLoss(group=group)
            continue
        loss = sadcl.SampleContrastiveLoss(learnable_temperature=(0.3, 0.1, 1.0), group=group)
        assert ("world" if group == "world" else f"ranks {list(range(world))}") in repr(loss)
        value = loss(x, y)
        assert value != sadcl.SampleContrastiveLoss(0.3)(x, y)
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert torch.equal(other(x, y), value)
        averaged = torch.optim.swa_utils.AveragedModel(loss)
        assert torch.equal(averaged(x, y), value)
        assert torch.equal(sadcl.functional.sample_contrastive_loss(x, y, temperature=0.3, group=group), value)
    with pytest.raises(ValueError, match="group: expected a mesh of one dimension"):
        sadcl.SampleContrastiveLoss(group=dist.init_device_mesh("cpu", (3, 1), mesh_dim_names=("a", "b")))
    with pytest.raises(TypeError, match="group: expected None, 'world', a ProcessGroup"):
        sadcl.SampleContrastiveLoss(group="everyone")


def test_copies_of_a_module_keep_its_group() -> None:
    ranks(3).run(copied)


def test_a_process_alone_may_say_world() -> None:
    x, y = make_features(2, 2, C, D), make_labels(2, C, "random")
    assert torch.equal(sadcl.SampleContrastiveLoss(group="world")(x, y), sadcl.SampleContrastiveLoss()(x, y))


def test_world_before_the_processes_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="call torch.distributed.init_process_group first"):
        sadcl.SampleContrastiveLoss(group="world")(make_features(2, 2, C, D), make_labels(2, C, "random"))


@pytest.mark.parametrize("option", [{"ring": True}, {"capacity": 4}])
def test_what_only_a_group_has(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: expected .* without a group"):
        sadcl.SampleContrastiveLoss(**option)(make_features(2, 2, C, D), make_labels(2, C, "random"))


# -- the queue --


def queued(rank: int) -> list[list[Any]]:
    """Keys that hold their number come in rank order, of ranks that have 2, 0 and 3."""
    queue, seen = sadcl.KeyQueue(7, 2, C), []
    parallel = DistributedDataParallel(nn.Sequential(nn.Linear(1, 1), queue))
    assert not list(parallel.buffers())
    for step in range(3):
        count, first = (2, 0, 3)[rank], (0, 2, 2)[rank] + 5 * step
        keys = torch.arange(first, first + count)[:, None].float().expand(-1, 2)
        queue.enqueue(keys, (keys[:, :1].int() % 3 - 1).expand(-1, C), group="world")
        seen.append([queue.keys[:, 0].int().tolist(), queue.labels[:, 0].tolist(), queue.next])
    return seen


def test_the_queue_is_the_same_ring_on_every_rank() -> None:
    first, *others = ranks(3).run(queued)
    assert all(other == first for other in others)
    alone, number = sadcl.KeyQueue(7, 2, C), torch.arange(15)[:, None]
    for step in range(3):
        some = number[5 * step : 5 * step + 5]
        alone.enqueue(some.float().expand(-1, 2), (some % 3 - 1).expand(-1, C))
        assert first[step] == [alone.keys[:, 0].int().tolist(), alone.labels[:, 0].tolist(), alone.next]
