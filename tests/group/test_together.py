"""What users put together: uneven ranks in a ring of bfloat16, mixed precision, meshes, changing batches, queues."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import ranks
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

import sadcl
from sadcl import functional as F
from sadcl.testing import make_features, make_labels

B, V, C, D = 9, 2, 4, 16
SIZES = [4, 0, 5]


def part(rank: int, *tensors: Tensor) -> list[Tensor]:
    return [x.split(SIZES)[rank] for x in tensors]


def losses(x: Tensor, labels: Tensor, **more: Any) -> list[Tensor]:
    keys, key_labels = make_features(7, D, seed=3).to(x.dtype), make_labels(7, C, seed=4)
    return [
        F.sample_contrastive_loss(x, labels, **more),
        F.supcon_loss(x[:, :, 0], labels[:, 1], temperature=20.0, **more),
        F.multilabel_supcon_loss(x[:, :, 1], labels, keys=keys, key_labels=key_labels, weighting="overlap", **more),
    ]


def with_gradients(x: Tensor, labels: Tensor, **more: Any) -> list[Tensor]:
    leaf = x.clone().requires_grad_()
    found = losses(leaf, labels, **more)
    return [y for loss in found for y in (loss.detach(), torch.autograd.grad(loss, leaf, retain_graph=True)[0])]


def ring_of_bfloat16(rank: int, backend: str | None) -> list[Any]:
    x, labels = part(rank, make_features(B, V, C, D).bfloat16(), make_labels(B, C, "ignored"))
    return [y.double().numpy() for y in with_gradients(x, labels, group="world", ring=True, backend=backend)]


@pytest.mark.parametrize("backend", [None, "torch"])
def test_uneven_ranks_one_of_them_empty_in_a_ring_of_bfloat16(backend: str | None) -> None:
    results = ranks(3).run(ring_of_bfloat16, backend)
    wide = with_gradients(make_features(B, V, C, D).bfloat16().double(), make_labels(B, C, "ignored"))
    for number, want in enumerate(wide):
        got = [torch.as_tensor(one[number]) / 3 for one in results]
        if want.dim() == 0:
            torch.testing.assert_close(sum(got), want, rtol=1e-5, atol=0)
        else:
            assert (torch.cat(got) - want).abs().amax() <= torch.finfo(torch.bfloat16).eps * want.abs().amax()


class Model(nn.Module):
    """A projection, and the loss inside."""

    def __init__(self, group: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(D, C * D)
        self.loss = sadcl.SampleContrastiveLoss(temperature=0.3, group=group)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.project(x).unflatten(-1, (C, D)), labels)


def step_of(model: nn.Module, x: Tensor, labels: Tensor) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(x, labels).backward()
        optimizer.step()
    weight = model.project.weight
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()


def mixed(rank: int) -> list[Any]:
    """Parameters after three steps: FSDP2 with a bfloat16 forward, and DDP under autocast."""
    mesh = dist.init_device_mesh("cpu", (3,), mesh_dim_names=("dp",))
    x, labels = part(rank, make_features(B, V, D), make_labels(B, C, "ignored"))
    sharded = Model(mesh["dp"])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(sharded.project, mesh=mesh, mp_policy=policy)
    fully_shard(sharded, mesh=mesh, mp_policy=policy)
    copies = DistributedDataParallel(Model(mesh["dp"]))
    of_sharded = step_of(sharded, x, labels)
    optimizer = torch.optim.SGD(copies.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = copies(x, labels)
        loss.backward()
        optimizer.step()
    return [of_sharded.numpy(), copies.module.project.weight.detach().numpy()]


def test_mixed_precision_over_a_mesh() -> None:
    """Products are rounded to bfloat16, the loss is not: parameters are one float32 process's to 2% of what moved."""
    results = ranks(3).run(mixed)
    before = Model(None).project.weight.detach()
    want = step_of(Model(None), make_features(B, V, D), make_labels(B, C, "ignored"))
    moved = (want - before).abs().amax()
    for both in zip(*results, strict=True):
        for got in map(torch.as_tensor, both):
            assert torch.equal(got, torch.as_tensor(both[0])), "ranks differ"
            assert (got - want).abs().amax() <= 0.02 * moved


def changing(rank: int, capacity: int | None) -> tuple[list[Any], int]:
    """One compiled function, batches of other sizes (never V, C or D): what it and eager mode give, and its graphs."""
    torch.compiler.reset()
    graphs = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def loss(x: Tensor, labels: Tensor) -> Tensor:
        return F.sample_contrastive_loss(x, labels, group="world", capacity=capacity)

    run = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    pairs = []
    for step, images in enumerate(((5, 3), (6, 5), (3, 8), (7, 3))):
        x = make_features(images[rank], V, C, D, seed=10 * step + rank)
        labels = make_labels(images[rank], C, "random", seed=10 * step + rank)
        for function in (run, loss):
            leaf = x.clone().requires_grad_()
            value = function(leaf, labels)
            value.backward()
            pairs.append([value.detach().numpy(), leaf.grad.numpy()])
    return pairs, len(graphs)


@pytest.mark.parametrize("capacity", [None, 9 * C])
def test_a_compiled_graph_serves_batches_that_change(capacity: int | None) -> None:
    for pairs, graphs in ranks(2).run(changing, capacity):
        assert graphs == 1
        for got, want in zip(pairs[::2], pairs[1::2], strict=True):
            for ours, eager in zip(got, want, strict=True):
                torch.testing.assert_close(torch.as_tensor(ours), torch.as_tensor(eager), rtol=1e-6, atol=1e-7)


def different_queues(rank: int) -> str:
    """Full rings, whose next key goes elsewhere on rank 1, which has added one alone."""
    queue = sadcl.KeyQueue(4, D, C)
    queue.enqueue(make_features(4, D), make_labels(4, C), group="world")
    if rank == 1:
        queue.enqueue(make_features(1, D), make_labels(1, C))
    try:
        queue.enqueue(make_features(2, D), make_labels(2, C), group="world")
    except ValueError as error:
        return str(error)
    return "no error"


def test_queues_that_differ_are_an_error_on_every_rank() -> None:
    for words in ranks(2).run(different_queues):
        assert "expected the same next on every rank" in words
