"""The rows of all ranks as columns for the rows of this one: gathered at once, or passed round in a ring.

What a rank sends in the forward is one piece of bytes: its vectors, in their own dtype, and what is known of them
(pairs, ids, labels). The columns lie in rank order; each rank has room for as many items (pairs of image and class,
images) as the largest has, or for ``capacity`` of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks
from .._collectives import Group, Met, all_gather, exchange, meet, pass_on
from .._dtypes import accumulation_dtype, norm_dtype
from .group_pairs import Columns, Tags
from .mlc import planes

# A block of scores, and a block of vectors, hold at most this many elements: 4 MB on a CPU; elsewhere launches cost.
_BLOCK_ELEMENTS = {"cpu": 1 << 20}
_ALIGNED = 16  # bytes: a rank's vectors begin where every dtype may


class Own(NamedTuple):
    """This rank's rows.

    Attributes:
        place: int64 [R], of rows in the flat [B V C], or its end for rows that are none.
        raw: [R, D], 0 for rows that are none.
        tags: a row of tags an item, as they are sent: [items, T].
    """

    place: Tensor
    raw: Tensor
    tags: Tensor


def steps(vectors: Tensor) -> Iterator[slice]:
    """Rows of ``vectors [R, D]`` in steps of the size of a block."""
    step = max(1, _BLOCK_ELEMENTS.get(vectors.device.type, 1 << 24) // max(vectors.shape[1], 1))
    return (slice(first, first + step) for first in range(0, vectors.shape[0], step))


def items_of(x: Any) -> Tensor | int:
    """How many items this rank has."""
    return x.features.shape[0] if x.class_ptr is None else x.class_ptr[-1]


def reads_counts(x: Any) -> bool:
    """Whether the host waits for what the ranks bring."""
    return x.capacity == 0 or x.released or x.weights is not None or _checks.reads_values(x.features)


def gathered_bytes(x: Any, slot: Any) -> Any:
    """Bytes that a rank sends for ``slot`` items in the forward."""
    _, v, _, d = x.features.shape
    vectors = 0 if x.ring else slot * v * d * x.features.element_size()
    return (vectors + slot * _tag_bytes(x) + _ALIGNED - 1) // _ALIGNED * _ALIGNED


def _tag_bytes(x: Any) -> int:
    if x.pairs is not None:
        return 4
    return 8 if x.ids is not None else 0 if x.labels is None else x.labels.shape[1]


def own_rows(x: Any, met: Met, slot: int) -> Own:
    """This rank's rows, compacted."""
    b, v, c, d = x.features.shape
    device = x.features.device
    known = None if met.counts is None else met.counts[x.rank]
    if x.pairs is None:
        pair = torch.arange(b, device=device)
        if x.ids is not None:
            tags = x.ids[:, None]
        else:
            tags = x.features.new_empty(b, 0, dtype=torch.int8) if x.labels is None else x.labels.to(torch.int8)
    else:
        pair = x.pairs[: min(slot, x.pairs.shape[0]) if known is None else known].long()
        tags = pair[:, None].to(torch.int32)
    image, label = pair // c, pair % c
    raw = x.features[image, :, label] if x.pairs is not None else x.features[:, :, 0]
    place = (image[:, None] * v + torch.arange(v, device=device)) * c + label[:, None]
    if known is None and x.pairs is not None:
        there = torch.arange(pair.shape[0], device=device) < met.items[x.rank]
        raw = torch.where(there[:, None, None], raw, 0.0)
        place = torch.where(there[:, None], place, b * v * c)
    return Own(place.flatten(), raw.reshape(-1, d), tags)


class Sweep:
    """Own rows, and the columns of all ranks block by block."""

    def __init__(self, x: Any, met: Met | None = None, kept: Tensor | None = None) -> None:
        """Meet the other ranks and gather what they have; in the backward they have met, and it may be kept."""
        self.x, self.group = x, Group(x.group, x.rank, x.world)
        self.v, self.d = x.features.shape[1], x.features.shape[3]
        self.acc, self.wide = accumulation_dtype(x.features.dtype), norm_dtype(x.features.device)
        self.met = met = self._meet() if met is None else met
        self.slot: int = x.capacity or max(met.counts or [0])
        self.own = own_rows(x, met, self.slot)
        self.rows = self.own.raw.shape[0]
        self.kept = kept
        if x.include_batch:
            self.kept = all_gather(self._packed(), self.group) if kept is None else kept
            self._open()

    @classmethod
    def again(cls, x: Any, counts: Tensor, kept: Tensor) -> Sweep:
        """In the backward; ``counts [3, world]`` and ``kept`` are the forward's."""
        items, images, labels = counts.unbind()
        known = reads_counts(x)
        met = Met(items, images, labels, items.tolist() if known else None, images.tolist() if known else None)
        return cls(x, met, kept if kept.numel() > 0 else None)

    @property
    def z(self) -> Tensor:
        """Unit vectors of own rows."""
        return self._own_units[0]

    @property
    def norm(self) -> Tensor:
        return self._own_units[1]

    @functools.cached_property
    def _own_units(self) -> tuple[Tensor, Tensor]:
        return self.unit(self.own.raw)

    @functools.cached_property
    def own_tags(self) -> Tags:
        return self.tags(self.own.tags)

    def _meet(self) -> Met:
        x = self.x
        columns = None
        if x.weights is not None:
            keys = 0 if x.keys is None else x.keys.shape[0]
            columns = (x.weights.shape[1] - keys, self.v if x.include_batch else 0)
        items = items_of(x)
        labels = items if x.labels is None else (x.labels == 1).sum()
        return meet(
            x.signature, items, x.features.shape[0], labels, x.temperature, x.capacity, reads_counts(x), self.group,
            columns=columns,
        )  # fmt: skip

    def unit(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors and norms of rows."""
        if not self.x.normalize:
            return raw.to(self.acc), torch.ones(raw.shape[0], dtype=self.wide, device=raw.device)
        norm = raw.new_empty(raw.shape[0], dtype=self.wide)
        unit = torch.empty_like(raw, dtype=self.acc)
        for some in steps(raw):  # the wide copies are larger than all else that a step holds
            norm[some] = torch.linalg.vector_norm(raw[some].to(self.wide), dim=1)
            length = norm[some, None]
            unit[some] = torch.where(length == 0, 0.0, raw[some].to(self.wide) / length).to(self.acc)
        return unit, norm

    def tags(self, sent: Tensor) -> Tags:
        """What items ``sent [items, T]`` are, an entry for each of their views."""
        x, v = self.x, self.v
        if x.pairs is not None:
            return Tags(ids=(sent[:, 0] % x.features.shape[2]).long().repeat_interleave(v))
        if x.ids is not None:
            return Tags(ids=sent[:, 0].repeat_interleave(v))
        if x.labels is None:
            return Tags()
        return Tags(labels=planes(sent, self.acc).each(lambda plane: plane.repeat_interleave(v, 0)))

    def _packed(self) -> Tensor:
        """What this rank sends: vectors, then tags, as bytes."""
        own = self.own
        out = torch.zeros(gathered_bytes(self.x, self.slot), dtype=torch.uint8, device=own.raw.device)
        at = 0
        for part, room in zip(self._sent(), self._rooms(), strict=True):
            if part.numel() > 0:
                out[at : at + room].view(part.dtype)[: part.numel()] = part.flatten()
            at += room
        return out

    def _sent(self) -> list[Tensor]:
        return [self.own.tags] if self.x.ring else [self.own.raw, self.own.tags]

    def _rooms(self) -> list[int]:
        tags = self.slot * _tag_bytes(self.x)
        return [tags] if self.x.ring else [self.slot * self.v * self.d * self.own.raw.element_size(), tags]

    def _open(self) -> None:
        """Views of what all ranks have sent: vectors [W, slot V, D] and tags [W, slot, T]."""
        assert self.kept is not None
        at, views = 0, []
        for like, room in zip(self._sent(), self._rooms(), strict=True):
            length = self.slot * (1 if like is self.own.tags else self.v)
            part = self.kept[:, at : at + room].view(like.dtype) if room else like.new_empty(self.group.world, 0)
            views.append(part.unflatten(1, (length, like.shape[1])))
            at += room
        self.all_tags = views[-1]
        self.all_raw = None if self.x.ring else views[0]

    def exchanged_weights(self) -> list[Tensor]:
        """What the rows of each rank give to the own ones, of given weights: ``[R, rows of that rank]``."""
        counts = [count * self.v for count in self.met.counts or []]
        send = [part.t().reshape(-1) for part in self.x.weights[:, : sum(counts)].split(counts, dim=1)]
        sizes = [count * self.rows for count in counts]
        came = exchange(torch.cat(send), sizes, sizes, self.group)
        pieces = zip(came.split(sizes), counts, strict=True)
        return [piece.view(self.rows, count) for piece, count in pieces]

    def columns_of_weights(self, columns: Columns) -> slice:
        """Where some columns stand in given weights, whose rows are those of all ranks without gaps."""
        counts = self.met.counts or []
        if columns.kind == "rows":
            rank = columns.at.start // max(self.slot * self.v, 1)
            first = (sum(counts[:rank]) - rank * self.slot) * self.v
        else:
            first = sum(counts) * self.v if self.x.include_batch else 0
        return slice(first + columns.at.start, first + columns.at.stop)

    def weights_of(self, columns: Columns) -> Tensor:
        """The given weights of own rows to some columns."""
        return self.x.weights[:, self.columns_of_weights(columns)]

    def blocks(self, vectors: bool = True) -> Iterator[Columns]:
        """All columns; own rows meet themselves among those of the batch. Without ``vectors`` their labels alone."""
        if self.x.include_batch and vectors:
            for ranks, raw in self.arrivals():
                yield from self.of_ranks(ranks, raw)
        elif self.x.include_batch:
            yield from self.of_ranks(range(self.group.world), None)
        yield from self.replicated(vectors)

    def replicated(self, vectors: bool = True) -> Iterator[Columns]:
        """Keys and prototypes."""
        if self.x.keys is not None:
            labels = self.x.key_labels
            tags = Tags() if labels is None else Tags(labels=planes(labels, self.acc))
            yield from self._replicated("keys", self.x.keys, tags, vectors)
        if self.x.prototypes is not None and vectors:
            yield from self._replicated("prototypes", self.x.prototypes, Tags(), vectors)

    def _step(self) -> int:
        """Items of a block."""
        most = _BLOCK_ELEMENTS.get(self.z.device.type, 1 << 24)
        rows = min(most // max(self.rows, 1), most // max(self.d, 1))
        return max(1, rows // max(self.v, 1))

    def arrivals(self) -> Iterator[tuple[range, Tensor]]:
        """Vectors ``[ranks, slot V, D]`` of some ranks at a time: of all, or as they come round in a ring."""
        world, rank, room = self.group.world, self.group.rank, self.slot * self.v
        if room == 0:
            return
        if not self.x.ring:
            assert self.all_raw is not None
            yield range(world), self.all_raw
            return
        travelling = self.own.raw.new_zeros(room, self.d)
        travelling[: self.rows] = self.own.raw
        for step in range(world):
            yield range((rank - step) % world, (rank - step) % world + 1), travelling[None]
            if step + 1 < world:
                travelling = pass_on(travelling, self.group)

    def of_ranks(self, ranks: range, raw: Tensor | None) -> Iterator[Columns]:
        """The columns of an arrival."""
        if self.slot == 0:
            return
        alone = self.x.released or self.x.weights is not None  # what looks at one rank at a time
        several = 1 if alone else max(1, self._step() // self.slot)
        for first in range(ranks.start, ranks.stop, several):
            last = min(first + several, ranks.stop)
            part = None
            if raw is not None:
                part = raw[first - ranks.start : last - ranks.start].reshape(-1, self.d)
            if last - first == 1:
                yield from self._of_rank(first, part)
            else:
                yield self._columns(first, last, slice(0, self.slot), part)

    def _of_rank(self, rank: int, raw: Tensor | None) -> Iterator[Columns]:
        items = self.slot if self.met.counts is None else self.met.counts[rank]
        step = max(items, 1) if self.x.released else self._step()  # all rows of an image at once
        for first in range(0, items, step):
            some = slice(first, min(first + step, items))
            part = None if raw is None else raw[some.start * self.v : some.stop * self.v]
            yield self._columns(rank, rank + 1, some, part)

    def _columns(self, first: int, last: int, items: slice, raw: Tensor | None) -> Columns:
        """The same items of consecutive ranks."""
        start = first * self.slot + items.start
        at = slice(start * self.v, (start + (last - first - 1) * self.slot + items.stop - items.start) * self.v)
        valid = None
        if self.met.counts is None or min(self.met.counts[first:last]) < items.stop:
            number = torch.arange(items.start, items.stop, device=self.met.items.device)
            valid = (number < self.met.items[first:last, None]).flatten().repeat_interleave(self.v)
        own = first <= self.group.rank < last
        diagonal = ((self.group.rank - first) * self.slot - items.start) * self.v if own else None
        sent = self.all_tags[first:last, items].flatten(0, 1)
        z = None if raw is None else self.unit(raw)[0]
        return Columns("rows", at, self.tags(sent), valid, diagonal, z, sent)

    def _replicated(self, kind: str, raw: Tensor, tags: Tags, vectors: bool) -> Iterator[Columns]:
        step = self._step() * self.v
        for first in range(0, raw.shape[0], step):
            some = slice(first, min(first + step, raw.shape[0]))
            z = self.unit(raw[some])[0] if vectors else None
            yield Columns(kind, some, tags.of(some), None, None, z, None)
