"""The SADCL head: feature map in, logits, label features and the contrastive embeddings out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._checks import check_devices, check_floating, check_tensor
from .bank import MemoryBank
from .classes import check_indices, fit_width
from .functional.group_classifier import group_classifier
from .linear import Linear
from .transformer import DecoderLayer, EncoderLayer, PositionSine

Maps = Tensor | Sequence[Tensor]  # a feature map [B, channels, H, W], or several, the finest first


class SADCLOutput(NamedTuple):
    """What the head says of a batch; the contrastive entries are None in step 1 or when not asked for.

    Attributes:
        logits: ``[B, C]``.
        label_features: h ``[B, C, E]``, before the projection.
        embeddings: projected h ``[B, C, P]``.
        bank_embeddings: projected first B slots of the memory bank ``[B, C, P]``, the losses' second view.
        prototype_embeddings: projected prototypes ``[1, C, P]``.
        attention: weights of the last decoder layer ``[B, heads, C, H, W]``, or of every layer
            ``[layers, B, heads, C, H, W]``, if asked for.
    """

    logits: Tensor
    label_features: Tensor
    embeddings: Tensor | None = None
    bank_embeddings: Tensor | None = None
    prototype_embeddings: Tensor | None = None
    attention: Tensor | None = None


class GroupClassifier(nn.Module):
    """One linear classifier per class: ``logit[b, c] = <weight[c], h[b, c]> + bias[c]``."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, width))
        self.bias = nn.Parameter(torch.empty(num_classes))
        bound = width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, label_features: Tensor) -> Tensor:
        """``[B, C, E]`` to ``[B, C]``."""
        return group_classifier(label_features, self.weight, self.bias)


class Projection(nn.Module):
    """The contrastive MLP ``E -> E -> P`` with a ReLU between."""

    def __init__(self, width: int, proj_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Linear(width, width), Linear(width, proj_dim)])

    def forward(self, x: Tensor) -> Tensor:
        """``[..., E]`` to ``[..., P]``."""
        return self.layers[1](F.relu(self.layers[0](x)))


class Pyramid(nn.Module):
    """Several maps as one memory: each through a 1x1 convolution of its own, the coarser ones resized (bilinear) to the
    grid of the first, and all added: what one convolution of all channels, stacked on the finest grid, would give."""

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(count, width, 1) for count in channels)
        # Stages inside a network are not normalised as its last map is (EfficientNet-Lite2: standard deviations of 6.5
        # and 0.9). At equal weights they drown it: 0.02 less mAP after two epochs of the demo than without them.
        with torch.no_grad():
            for level in list(self.levels)[:-1]:
                for parameter in level.parameters():
                    parameter.mul_(0.1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """``[B, channels[i], H_i, W_i]`` to ``[B, width, H_0, W_0]``."""
        first, *others = (level(part) for level, part in zip(self.levels, maps, strict=True))
        for other in others:
            first = first + F.interpolate(other, first.shape[-2:], mode="bilinear")
        return first


def move_maps(maps: Maps, device: torch.device) -> Maps:
    """Images, a feature map, or several maps, on a device."""
    if isinstance(maps, Tensor):
        return maps.to(device, non_blocking=True)
    return tuple(part.to(device, non_blocking=True) for part in maps)


class SADCLHead(nn.Module):
    """Label transformer, group-wise classifier and the contrastive parts.

    ``tokens = input_proj(map)``; encoder layers (positions on queries and keys); decoder layers from the
    label queries, starting at 0; ``h = decoder_norm(.)``; logits by class; embeddings by a shared MLP of h,
    of the bank's slots and of the prototypes. With ``contrastive=False`` (step 1) the MLP, prototypes and
    bank do not exist; :meth:`init_contrastive` adds them for step 2.

    Args:
        in_channels: channels of the feature map; or of each of several maps, which :class:`Pyramid` joins.
        num_classes: C.
        hidden_dim: E, divisible by 4 and by num_heads; by default in_channels, of several maps those of the last.
        num_heads: attention heads.
        ffn_dim: inner width of the feed-forward parts; by default 4 E (8192 at the published E of 2048).
        encoder_layers: published: 1.
        decoder_layers: published: 2.
        proj_dim: P, width of the embeddings.
        feature_size: usual (H, W) of the feature map, the finest one; others work too.
        dropout: in attention, feed-forward and residual branches.
        contrastive: whether to build projection, prototypes and memory bank.
        bank_slots: batch size of one process, the number of slots of the memory bank.
        input_proj: True for a 1x1 convolution, False for the identity, None for a convolution only where
            in_channels and hidden_dim differ.

    Raises:
        ValueError: if sizes do not fit together.
    """

    def __init__(
        self,
        in_channels: int | Sequence[int],
        num_classes: int,
        hidden_dim: int | None = None,
        num_heads: int = 4,
        ffn_dim: int | None = None,
        encoder_layers: int = 1,
        decoder_layers: int = 2,
        proj_dim: int = 1024,
        feature_size: tuple[int, int] = (14, 14),
        dropout: float = 0.1,
        *,
        contrastive: bool = True,
        bank_slots: int = 32,
        input_proj: bool | None = None,
    ) -> None:
        super().__init__()
        channels = (in_channels,) if isinstance(in_channels, int) else tuple(in_channels)
        width = channels[-1] if hidden_dim is None else hidden_dim
        _check_sizes(channels, num_classes, width, num_heads, encoder_layers, decoder_layers, feature_size)
        inner = 4 * width if ffn_dim is None else ffn_dim
        if input_proj is None:
            input_proj = channels != (width,)
        elif not input_proj and channels != (width,):
            raise ValueError(f"input_proj=False: expected in_channels == hidden_dim, got {in_channels} and {width}")
        self.in_channels = in_channels if isinstance(in_channels, int) else channels
        self.num_classes = num_classes
        self.hidden_dim = width
        self.proj_dim = proj_dim
        self.ffn_dim = inner
        self.input_proj: nn.Module = nn.Identity()
        if input_proj:
            several = not isinstance(in_channels, int)
            self.input_proj = Pyramid(channels, width) if several else nn.Conv2d(channels[0], width, 1)
        self.position = PositionSine(width, (feature_size[0], feature_size[1]))
        self.encoder = nn.ModuleList(EncoderLayer(width, num_heads, inner, dropout) for _ in range(encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(width, num_heads, inner, dropout) for _ in range(decoder_layers))
        self.decoder_norm = nn.LayerNorm(width)
        self.queries = nn.Parameter(torch.randn(num_classes, width))
        self.classifier = GroupClassifier(num_classes, width)
        self.projection: Projection | None = None
        self.prototypes: nn.Parameter | None = None
        self.memory_bank: MemoryBank | None = None
        if contrastive:
            self.init_contrastive(batch_slots=bank_slots)
        self.register_load_state_dict_post_hook(_place_positions)

    def forward(
        self,
        feature_map: Maps,
        need_weights: bool | Literal["all"] = False,
        contrastive: bool = True,
    ) -> SADCLOutput:
        """Recognise the labels of a batch.

        Args:
            feature_map: ``[B, in_channels, H, W]``, or as many of them as in_channels has entries.
            need_weights: True for the attention maps of the last decoder layer, ``"all"`` for every layer's.
            contrastive: False skips projection, bank and prototypes (prediction needs none of them, and a batch
                may then exceed the bank's slots).

        Returns:
            A :class:`SADCLOutput`.

        Raises:
            ValueError: if the shape or device is wrong, or the batch larger than the memory bank while ``contrastive``.
        """
        images = self._check_maps(feature_map)
        label_features, attention = self._decode(feature_map, need_weights)
        output = SADCLOutput(self.classifier(label_features), label_features, attention=attention)
        if not contrastive or self.projection is None or self.memory_bank is None or self.prototypes is None:
            return output
        return output._replace(
            embeddings=self.projection(label_features),
            bank_embeddings=self.projection(self.memory_bank.read(images)),
            prototype_embeddings=self.projection(self.prototypes[None]),
        )

    def _check_maps(self, feature_map: Maps) -> int:
        """How many images there are."""
        several = not isinstance(self.in_channels, int)
        wanted = self.in_channels if isinstance(self.in_channels, tuple) else (self.in_channels,)
        if isinstance(feature_map, Tensor) == several or (several and len(feature_map) != len(wanted)):
            given = "one tensor" if isinstance(feature_map, Tensor) else f"{len(feature_map)} maps"
            raise TypeError(f"feature_map: expected {f'{len(wanted)} maps' if several else 'one tensor'}, got {given}")
        maps = [feature_map] if isinstance(feature_map, Tensor) else feature_map
        for i, (part, channels) in enumerate(zip(maps, wanted, strict=True)):
            name = f"feature_map[{i}]" if several else "feature_map"
            check_floating(name, check_tensor(name, part, (4,), "[B, in_channels, H, W]"))
            if part.shape[1] != channels or 0 in part.shape[2:]:
                raise ValueError(f"{name}: expected [B, {channels}, H, W] with H, W >= 1, got {list(part.shape)}")
            if part.shape[0] != maps[0].shape[0]:
                raise ValueError(f"{name}: expected {maps[0].shape[0]} images as in the first map, got {part.shape[0]}")
            check_devices(**{name: part}, queries=self.queries)
        return maps[0].shape[0]

    def _decode(self, feature_map: Maps, need_weights: bool | str) -> tuple[Tensor, Tensor | None]:
        projected = self.input_proj(feature_map)
        height, breadth = projected.shape[2:]
        memory = projected.flatten(2).transpose(1, 2)  # [B, L, E]
        pos = self.position((height, breadth)).to(memory.dtype)
        for layer in self.encoder:
            memory = layer(memory, pos)
        target: Tensor | None = None
        maps: list[Tensor] = []
        for index, layer in enumerate(self.decoder):
            wanted = need_weights == "all" or (bool(need_weights) and index == len(self.decoder) - 1)
            target, weights = layer(target, self.queries, memory, pos, wanted)
            if weights is not None:
                maps.append(weights.unflatten(-1, (height, breadth)))
        if not maps:
            return self.decoder_norm(target), None
        return self.decoder_norm(target), torch.stack(maps) if need_weights == "all" else maps[0]

    def init_contrastive(self, prototypes: Tensor | None = None, batch_slots: int = 32) -> None:
        """Make the head ready for step 2: projection, prototypes and a bank filled with them.

        An existing projection is kept; prototypes and bank are made anew. Call it before the optimizer is
        built.

        Args:
            prototypes: ``[C, E]``, usually from :func:`sadcl.prototypes.build_prototypes`; random if None.
            batch_slots: batch size of one process.

        Raises:
            ValueError: if the prototypes' shape is not ``[C, E]``.
        """
        like = self.queries
        if prototypes is None:
            prototypes = torch.randn_like(like)
        elif prototypes.shape != like.shape:
            raise ValueError(f"prototypes: expected [C, E]={list(like.shape)}, got {list(prototypes.shape)}")
        prototypes = prototypes.detach().to(like)
        with _where(like):
            if self.projection is None:
                self.projection = Projection(self.hidden_dim, self.proj_dim).to(like)
            self.prototypes = nn.Parameter(prototypes.clone())
            self.memory_bank = MemoryBank(batch_slots, self.num_classes, self.hidden_dim).to(like)
        self.memory_bank.fill(prototypes)

    def update_bank(self, output: SADCLOutput, labels: Tensor, threshold: float = 0.8) -> None:
        """Store the recognised label features of a step; see :meth:`sadcl.bank.MemoryBank.update`.

        Call it after the losses of the step are computed, before or after the backward.
        """
        if self.memory_bank is None:
            raise ValueError("the head has no memory bank: call init_contrastive first")
        self.memory_bank.update(output.label_features, output.logits, labels, threshold)

    @torch.no_grad()
    def set_queries(self, embeddings: Tensor) -> None:
        """Start the label queries from text or other embeddings.

        Args:
            embeddings: ``[C, E']``. With E' = E they are taken as they are; otherwise a fixed orthonormal map
                brings them to E and each row to length sqrt(E) (:func:`sadcl.classes.fit_width` says why).
        """
        queries = fit_width(embeddings, self.hidden_dim)
        if queries.shape[0] != self.num_classes:
            raise ValueError(f"embeddings: expected {self.num_classes} rows, one a class, got {queries.shape[0]}")
        self.queries.copy_(queries)

    def keep_classes(self, indices: Sequence[int] | Tensor) -> None:
        """Cut or reorder the class set: class ``indices[i]`` becomes class i.

        Queries, classifier rows, prototypes and bank go along, so the kept classes' logits stay what they
        were. The parameters are new objects: build the optimizer afterwards.

        Args:
            indices: distinct class indices.
        """
        index = check_indices(indices, self.num_classes).to(self.queries.device)
        self._rebuild(lambda rows, _: rows.index_select(-2 if rows.dim() > 1 else 0, index))

    def extend_classes(self, new: int | Tensor) -> None:
        """Append classes: fresh classifier rows and prototypes, and queries from embeddings if given.

        The new classes' bank slots hold their prototypes. The old classes' logits stay what they were. The
        parameters are new objects: build the optimizer afterwards.

        Args:
            new: how many, or their embeddings ``[n, E']`` (treated as in :meth:`set_queries`).
        """
        count = new if isinstance(new, int) else new.shape[0]
        if isinstance(new, bool) or count < 1:
            raise ValueError(f"new: expected a number of classes >= 1 or embeddings [n, E'], got {new!r}")
        where, width = _where(self.queries), self.hidden_dim
        queries = torch.randn(count, width, device=where) if isinstance(new, int) else fit_width(new, width)
        with where:
            fresh = GroupClassifier(count, width)
        prototypes = torch.randn(count, width, device=where)
        added = {
            "queries": queries,
            "weight": fresh.weight.detach(),
            "bias": fresh.bias.detach(),
            "prototypes": prototypes,
            "slots": prototypes,
        }

        def append(rows: Tensor, name: str) -> Tensor:
            extra = added[name].to(rows)
            if name == "slots":
                extra = extra.expand(rows.shape[0], -1, -1)
            return torch.cat([rows, extra], dim=-2 if rows.dim() > 1 else 0)

        self._rebuild(append)

    def _rebuild(self, change: Callable[[Tensor, str], Tensor]) -> None:
        """Pass everything that has a class dimension through ``change(rows, name)``."""
        for owner, name in (
            (self, "queries"),
            (self.classifier, "weight"),
            (self.classifier, "bias"),
            (self, "prototypes"),
        ):
            old = getattr(owner, name)
            if old is not None:
                setattr(owner, name, nn.Parameter(change(old.detach(), name), requires_grad=old.requires_grad))
        if self.memory_bank is not None:
            self.memory_bank.slots = change(self.memory_bank.slots, "slots")
        self.num_classes = self.queries.shape[0]


def _where(like: Tensor) -> torch.device:
    """Where to make what joins ``like``, whatever the default device: with the CPU's random numbers, or on meta."""
    return torch.device("meta" if like.is_meta else "cpu")


def _place_positions(head: SADCLHead, _: Any) -> None:
    """Positions are in no state dict: a meta head's follow the tensors that load_state_dict assigned."""
    if head.position.position.is_meta and not head.queries.is_meta:
        head.position.to_empty(device=head.queries.device)


def _check_sizes(
    in_channels: tuple[int, ...],
    num_classes: int,
    width: int,
    num_heads: int,
    encoder_layers: int,
    decoder_layers: int,
    feature_size: tuple[int, int],
) -> None:
    if min(*in_channels, num_classes, width) < 1:
        raise ValueError(
            f"expected in_channels, num_classes, hidden_dim >= 1, got {in_channels}, {num_classes}, {width}"
        )
    if width % 4 or num_heads < 1 or width % num_heads:
        raise ValueError(
            f"hidden_dim={width}, num_heads={num_heads}: expected a width divisible by 4 (sine positions) "
            "and by the number of heads"
        )
    if encoder_layers < 0 or decoder_layers < 1:
        raise ValueError(
            f"expected encoder_layers >= 0 and decoder_layers >= 1, got {encoder_layers} and {decoder_layers}"
        )
    if len(feature_size) != 2 or min(feature_size) < 1:
        raise ValueError(f"feature_size: expected (H, W) >= 1, got {feature_size}")
