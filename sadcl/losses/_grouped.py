"""The process group of a loss module."""

from __future__ import annotations

from typing import Any

from torch import nn

from .._groups import GroupLike, hold_group


class GroupedLoss(nn.Module):
    """A loss over the ranks of :attr:`group`.

    The group is kept by name and ranks, so that the module can be copied, pickled and averaged; where it is used it is
    looked up, so a module of ``"world"`` may be made before the processes are joined.
    """

    ring: bool = False
    capacity: int | None = None
    _group: Any = None  # of modules pickled before there were groups, too

    def over(self, group: GroupLike, ring: bool = False, capacity: int | None = None) -> None:
        """Set group, ring and capacity, in ``__init__``."""
        self.group = group
        self.ring = ring
        self.capacity = capacity

    @property
    def group(self) -> Any:
        """None, ``"world"`` or a :class:`sadcl._groups.GroupName`; a ProcessGroup or DeviceMesh may be assigned."""
        return self._group

    @group.setter
    def group(self, value: GroupLike) -> None:
        self._group = hold_group(value)

    def in_group(self) -> str:
        """For ``extra_repr``."""
        if self._group is None:
            return ""
        named = repr(self._group) if isinstance(self._group, str) else f"ranks {list(self._group.ranks)}"
        return f", group={named}" + (", ring" if self.ring else "")
