"""What the ranks of a process group tell each other inside an op: gathers, exchanges, and that they agree.

A group is its name, as torch's functional collectives take it; the empty name is this process alone, and every function
here then moves nothing. Every rank calls the same functions in the same order, whatever it has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

TEXT_BYTES = 1024  # of a rank's signature or complaint; only ranks that do not agree send one
# Agrees, hash of the signature, items, images, bits of the temperature, columns of given weights, labels.
_HEADER = 7
_DEVICE = "cpu"


class Group(NamedTuple):
    """A process group as an op takes it."""

    name: str = ""
    rank: int = 0
    world: int = 1


# The two ways by which anything leaves this process; benchmarks/bench_group.py counts here. The operators' names are
# the same in every torch since 2.6, those of their Python wrappers are not.
def _gather(flat: Tensor, group: Group) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_gather_into_tensor(flat, group.world, group.name))


def _exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    ops = torch.ops._c10d_functional
    return ops.wait_tensor(ops.all_to_all_single(x, receive, send, group.name))


def all_gather(x: Tensor, group: Group) -> Tensor:
    """``x`` of every rank, of one shape on all of them: ``[world, *x.shape]``."""
    if not group.name:
        return x[None]
    return _gather(x.contiguous().reshape(-1), group).view(group.world, *x.shape)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], group: Group) -> Tensor:
    """Send ``x [sum(send), ...]`` in pieces, one a rank; what came, in rank order: ``[sum(receive), ...]``."""
    return _exchange(x.contiguous(), list(send), list(receive), group) if group.name else x


def pass_on(x: Tensor, group: Group) -> Tensor:
    """Send ``x``, of one shape on all ranks, to the next rank; what the one before has sent."""
    send, receive = [0] * group.world, [0] * group.world
    send[(group.rank + 1) % group.world] = x.shape[0]
    receive[(group.rank - 1) % group.world] = x.shape[0]
    return exchange(x, send, receive, group)


class Met(NamedTuple):
    """What every rank has brought.

    Attributes:
        items: int64 ``[world]``, on the tensors' device.
            images: the same.
        labels: the same.
        counts: ``items`` as Python ints, None where the host did not wait for them.
        image_counts: ``images`` likewise.
    """

    items: Tensor
    images: Tensor
    labels: Tensor
    counts: list[int] | None
    image_counts: list[int] | None


def meet(
    signature: str,
    items: Tensor | int,
    images: int,
    labels: Tensor | int,
    temperature: Tensor,
    capacity: int,
    reads: bool,
    group: Group,
    *,
    columns: tuple[int, int] | None = None,
) -> Met:
    """Tell the others how many items come, and make sure that all do the same.

    Args:
        signature: what has to be the same on all ranks, as ``name=value; name=value``.
        items: how many things this rank will give; a 0-d tensor where the host should not wait.
        images: how many images they are of.
        labels: how many labels these have.
        temperature: 0-d.
        capacity: the most items that a rank may have; 0: any number.
        reads: whether the host reads what was said; otherwise nothing is made sure of.
        group: the ranks.
        columns: how many columns of given weights are for rows, and how many rows an item has.

    Raises:
        ValueError, TypeError: on every rank alike, where ranks disagree or one of them refused its arguments.
    """
    device = temperature.device
    given = -1 if columns is None else columns[0]
    mine = torch.tensor([1, _hashed(signature), 0, images, 0, given, 0], dtype=torch.int64, device=device)
    mine[2], mine[6] = items, labels
    mine[4] = temperature.detach().to(torch.float32).view(torch.int32)
    everyone = all_gather(mine, group)
    if not reads:
        return Met(everyone[:, 2], everyone[:, 3], everyone[:, 6], None, None)
    said = everyone.tolist()
    if any(row[0] != 1 or row[1] != said[0][1] for row in said):
        _disagree(signature, refused=False, device=device, group=group)
    if any(row[4] != said[0][4] for row in said):
        values = everyone[:, 4].to(torch.int32).view(torch.float32).tolist()
        _differ("temperature", [f"{value:g}" for value in values])
    counts = [row[2] for row in said]
    if columns is not None:
        rows = sum(counts) * columns[1]
        for rank, row in enumerate(said):
            if row[5] != rows:
                raise ValueError(f"weights: expected {rows} columns for all ranks' rows, got {row[5]} on rank {rank}")
    if capacity and max(counts) > capacity:
        rank = max(range(len(counts)), key=counts.__getitem__)
        raise ValueError(f"capacity: expected at least {counts[rank]} (rank {rank} has as many), got {capacity}")
    return Met(everyone[:, 2], everyone[:, 3], everyone[:, 6], counts, [row[3] for row in said])


def refuse(error: Exception, device: torch.device, group: Group) -> NoReturn:
    """Tell the others, who are in :func:`meet`, why this rank will not come; raises what they raise."""
    all_gather(torch.zeros(_HEADER, dtype=torch.int64, device=device), group)
    kind = TypeError if isinstance(error, TypeError) else ValueError
    _disagree(f"{kind.__name__}: {error}", refused=True, device=device, group=group)


def _disagree(text: str, *, refused: bool, device: torch.device, group: Group) -> NoReturn:
    """Raise the same error on every rank, from what each has to say."""
    encoded = bytearray(("!" if refused else "=").encode() + text.encode()[: TEXT_BYTES - 1])
    buffer = torch.zeros(TEXT_BYTES, dtype=torch.uint8, device=_DEVICE)
    buffer[: len(encoded)] = torch.frombuffer(encoded, dtype=torch.uint8)
    rows = all_gather(buffer.to(device), group).cpu()
    said = [bytes(row.tolist()).rstrip(b"\0").decode(errors="ignore") for row in rows]
    for rank, one in enumerate(said):
        if one.startswith("!"):
            kind, _, reason = one[1:].partition(": ")
            raise (TypeError if kind == "TypeError" else ValueError)(f"{reason} (on rank {rank} of the group)")
    fields = [dict(part.partition("=")[::2] for part in one[1:].split("; ")) for one in said]
    for name in fields[0]:
        if len({one.get(name) for one in fields}) > 1:
            _differ(name, [one.get(name, "none") for one in fields])
    raise ValueError("group: ranks disagree in what they compute")


def _differ(name: str, values: list[str]) -> NoReturn:
    other = next(rank for rank, value in enumerate(values) if value != values[0])
    raise ValueError(
        f"group: expected the same {name} on every rank, got {values[0]} on rank 0 and {values[other]} on rank {other}"
    )


def _hashed(text: str) -> int:
    """56 bits of a text, the same in every process (Python's own hash is not)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
