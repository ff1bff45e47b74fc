"""Tensors that belong to one process: part of a module's state, but no buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class OwnTensors(nn.Module):
    """A module some of whose tensors (the attributes that ``own`` names) differ between processes by design.

    They are part of the state dict, and move, cast, copy and pickle with the module. They are no buffers, because
    DistributedDataParallel overwrites buffers with rank 0's, when it is built and before every forward; its list of
    exceptions holds full names, which every wrapper changes (``module.``, ``_orig_mod.``, the user's own).
    """

    own: ClassVar[tuple[str, ...]] = ()

    def fit(self, name: str, given: Tensor) -> Tensor:
        """What to load for ``own`` tensor ``name`` where a state dict has ``given``; its shape must then be right."""
        return given

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OwnTensors:
        super()._apply(fn, recurse)
        for name in self.own:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.own:
            tensor = getattr(self, name)
            destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lists = (missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        for name in self.own:
            key, mine = prefix + name, getattr(self, name)
            if key in unexpected_keys:
                unexpected_keys.remove(key)
            if key not in state_dict:
                if strict:
                    missing_keys.append(key)
                continue
            given = self.fit(name, state_dict[key])
            if given.shape != mine.shape:
                shapes = f"{list(state_dict[key].shape)} in the state dict, {list(mine.shape)} in the module"
                error_msgs.append(f"size mismatch for {key}: {shapes}")
            elif local_metadata.get("assign_to_params_buffers", False):
                setattr(self, name, given)
            else:
                with torch.no_grad():
                    mine.copy_(given)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for name in self.own:  # in a pickle of an earlier version they are buffers
            if name in self._buffers:
                setattr(self, name, self._buffers.pop(name))


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor of ``module``'s parts that belongs to this process alone: what ``module.buffers()`` leaves out."""
    for part in module.modules():
        if isinstance(part, OwnTensors):
            yield from (getattr(part, name) for name in part.own)
