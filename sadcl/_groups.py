"""Process groups as the losses take them: None, ``"world"``, a ProcessGroup, or a DeviceMesh of one dimension."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ._collectives import Group

GroupLike = Any  # None, "world", ProcessGroup, DeviceMesh, GroupName


@dataclass(frozen=True)
class GroupName:
    """A process group by its name and its ranks: what a module keeps, to be copied and pickled.

    Attributes:
        name: in the process where it was made.
        ranks: of the default group, in the group's order; another process finds its own group by them.
    """

    name: str
    ranks: tuple[int, ...]


def hold_group(group: GroupLike) -> str | GroupName | None:
    """``group`` as a module keeps it.

    Raises:
        TypeError: if it is no group.
        ValueError: if this process is not in it, or a mesh has more than one dimension.
    """
    if group is None or isinstance(group, GroupName) or (isinstance(group, str) and group == "world"):
        return group
    if not dist.is_available():
        raise ValueError("group: expected None (this torch has no torch.distributed)")
    if isinstance(group, dist.ProcessGroup):
        return GroupName(group.group_name, tuple(dist.get_process_group_ranks(group)))
    if isinstance(group, dist.DeviceMesh):
        if group.ndim != 1:
            names = ", ".join(repr(name) for name in group.mesh_dim_names or ())
            raise ValueError(f"group: expected a mesh of one dimension (mesh[name]), got {group.ndim} ({names})")
        return hold_group(group.get_group())
    if group == getattr(dist.GroupMember, "NON_GROUP_MEMBER", object()):
        raise ValueError("group: expected a group that this process is in, got one of other processes")
    raise TypeError(
        f"group: expected None, 'world', a ProcessGroup or a DeviceMesh of one dimension, got {_named(group)}"
    )


def find_group(group: GroupLike) -> Group | None:
    """The group as ops take it; None for None.

    ``"world"`` before ``torch.distributed`` is initialised is this process alone, unless ``WORLD_SIZE`` says that there
    are others.

    Raises:
        TypeError, ValueError: as :func:`hold_group`; or this process has no such group.
        RuntimeError: the processes were not joined yet.
    """
    if group is None:
        return None
    held = hold_group(group)
    return Group(*(_world() if isinstance(held, str) else _found(held.name, held.ranks)))  # type: ignore[union-attr]


def _world() -> tuple[str, int, int]:
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise RuntimeError("group='world': call torch.distributed.init_process_group first (WORLD_SIZE is set)")
        return "", 0, 1
    return _described(dist.group.WORLD)


def _found(name: str, ranks: tuple[int, ...]) -> tuple[str, int, int]:
    """The group of this name, or else the first one of these ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(f"group: the processes of ranks {list(ranks)} are not joined: call init_process_group first")
    candidates = list(dist.distributed_c10d._world.pg_map)
    candidates.sort(key=lambda one: one.group_name != name)
    for one in candidates:
        if tuple(dist.get_process_group_ranks(one)) == ranks:
            return _described(one)
    raise ValueError(f"group: this process has no group of the ranks {list(ranks)}; set the loss's group anew")


# Constants to a compiler. torch.compiler.assume_constant_result says no more than this, but imports the compiler.
_world._dynamo_marked_constant = _found._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _described(group: Any) -> tuple[str, int, int]:
    world = dist.get_world_size(group)
    return group.group_name, dist.get_rank(group), world


def _named(value: Any) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__
