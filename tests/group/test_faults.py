"""Ranks that disagree hear the same error; a killed one ends the others; nothing hangs."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import Ranks, ranks

import sadcl
from sadcl import _collectives
from sadcl import functional as F
from sadcl.portable import group_sweep
from sadcl.testing import make_features, make_labels

B, V, C, D = 3, 2, 4, 5


def sscl(rank: int, **odd: Any) -> torch.Tensor:
    """SSCL, where the last rank has something odd."""
    shape = {"b": B, "v": V, "c": C, "d": D, "dtype": torch.float32, **{k: v for k, v in odd.items() if k in "bvcd"}}
    shape["dtype"] = odd.get("dtype", torch.float32)
    x = make_features(shape["b"], shape["v"], shape["c"], shape["d"], dtype=shape["dtype"])
    labels = make_labels(shape["b"], shape["c"], "random")
    labels[:1, :1] = odd.get("label", labels[:1, :1])
    rest = {k: v for k, v in odd.items() if k not in ("b", "v", "c", "d", "dtype", "label")}
    return F.sample_contrastive_loss(x.requires_grad_(), labels, **{"group": "world", **rest})


def mlc(rank: int, columns: int = 2 * B, **odd: Any) -> torch.Tensor:
    if odd.pop("dense", False):
        return F.multilabel_supcon_loss(make_features(B, D), None, weights=torch.ones(B, columns), group="world")
    c = odd.pop("c", C)
    keys = {"keys": make_features(k, D), "key_labels": make_labels(k, c)} if (k := odd.pop("k", 0)) else {}
    return F.multilabel_supcon_loss(make_features(B, D), make_labels(B, c), group="world", **keys, **odd)


def pscl(rank: int, **odd: Any) -> torch.Tensor:
    c = odd.pop("c", C)
    return F.prototype_contrastive_loss(
        make_features(B, c, D), make_features(c, D), make_labels(B, c), group="world", **odd
    )


def dual(rank: int, **odd: Any) -> torch.Tensor:
    x, p = make_features(B, C, D), make_features(C, D)
    return F.dual_contrastive_loss(x, None, p, make_labels(B, C), group="world", **odd).prototype


def supcon(rank: int, **odd: Any) -> torch.Tensor:
    labels = odd.pop("labels", torch.zeros(B, dtype=torch.int64))
    return F.supcon_loss(make_features(B, V, D), labels, group="world", **odd)


def queue(rank: int, size: int = 4, dim: int = D, **odd: Any) -> None:
    sadcl.KeyQueue(size, dim, C).enqueue(make_features(B, odd.get("d", dim)), make_labels(B, C), group="world")


# What all ranks call, what the last one has odd, and what all of them are told.
DISAGREEMENTS: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (sscl, {"d": 6}, "the same D on every rank, got 5 on rank 0 and 6 on rank {last}"),
    (sscl, {"c": 6}, "the same C on every rank, got 4 on rank 0 and 6 on rank {last}"),
    (sscl, {"v": 1}, "the same V on every rank, got 2 on rank 0 and 1 on rank {last}"),
    (sscl, {"dtype": torch.bfloat16}, "the same dtype on every rank, got float32 on rank 0 and bfloat16"),
    (sscl, {"formulation": "released"}, "the same formulation on every rank, got paper on rank 0 and released"),
    (sscl, {"reduction": "none"}, "the same reduction on every rank, got mean on rank 0 and none"),
    (sscl, {"temperature": 0.5}, "the same temperature on every rank, got 0.2 on rank 0 and 0.5 on rank {last}"),
    (sscl, {"temperature": torch.ones(2)}, r"temperature: expected a number or a tensor of one element, .* \(on rank"),
    (sscl, {"temperature": "hot"}, r"temperature: expected a number > 0, got str \(on rank {last}"),
    (sscl, {"ring": True}, "the same ring on every rank, got False on rank 0 and True"),
    (sscl, {"capacity": 12}, "the same capacity on every rank, got None on rank 0 and 12"),
    (sscl, {"label": 2.0}, r"labels: expected 0, 1 or -1 \(ignored\), got values 2 \(on rank {last}"),
    (sscl, {"backend": "reference"}, "backend: expected None or one of .*torch with a group, got 'reference'"),
    (sscl, {"backend": "cpp", "formulation": "released"}, "'cpp'.* sscl over a group has no such implementation"),
    (mlc, {"weighting": "jaccard"}, "the same weighting on every rank, got mulsupcon on rank 0 and jaccard"),
    (mlc, {"c": 6}, "the same C on every rank"),
    (mlc, {"k": 2}, "the same K on every rank, got none on rank 0 and 2"),
    (mlc, {"threshold": 0.5}, "the same threshold on every rank, got 0.3 on rank 0 and 0.5"),
    (mlc, {"dense": True}, "the same C on every rank, got 4 on rank 0 and none"),
    (pscl, {"c": 6}, "the same C on every rank"),
    (pscl, {"temperature": torch.ones(2)}, "temperature: expected"),
    (dual, {"prototype_temperature": 0.5}, "the same temperature on every rank, got 0.07 on rank 0 and 0.5"),
    (dual, {"sample_temperature": -1.0}, "sample_temperature: expected a finite number > 0, got -1"),
    (supcon, {"labels": torch.zeros(B)}, "the same labels on every rank, got integers on rank 0 and floating"),
    (supcon, {"contrast_mode": "one"}, "the same contrast_mode on every rank"),
    (supcon, {"labels": torch.zeros(B + 1)}, "labels: expected B=3"),
    (queue, {"dim": 6}, "the same dim on every rank, got 5 on rank 0 and 6"),
    (queue, {"d": 6}, "keys: expected dim=5"),
]  # fmt: skip


def odd_one_out(rank: int, function: Callable[..., Any], odd: dict[str, Any], last: int) -> Any:
    started = time.monotonic()
    try:
        function(rank, **(odd if rank == last else {}))
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "no error", "", 0.0


@pytest.mark.parametrize(
    "function, odd, words", DISAGREEMENTS, ids=lambda x: str(x)[:30] if isinstance(x, dict) else ""
)
def test_ranks_that_disagree_hear_the_same_at_once(function: Any, odd: dict[str, Any], words: str) -> None:
    world = 3
    said = ranks(world).run(odd_one_out, function, odd, world - 1)
    assert {(kind, text) for kind, text, _ in said} == {said[0][:2]}
    assert said[0][0] in ("ValueError", "TypeError")
    assert re.search(words.replace("{last}", str(world - 1)), said[0][1]), said[0][1]
    assert max(seconds for *_, seconds in said) < 20
    assert ranks(world).run(odd_one_out, sscl, {}, 0) == [("no error", "", 0.0)] * world  # and they go on


def test_ranks_that_call_different_losses() -> None:
    said = ranks(2).run(other_loss, errors=True)
    assert {str(error) for error in said} == {str(said[0])}
    assert "the same loss on every rank, got sample_contrastive_loss on rank 0 and supcon_loss on rank 1" in str(
        said[0]
    )


def other_loss(rank: int) -> None:
    (supcon if rank else sscl)(rank)


def bounded(rank: int, capacity: int) -> None:
    sscl(rank, capacity=capacity, b=B + rank)


def test_more_than_capacity_is_an_error_on_every_rank() -> None:
    most = int(make_labels(B + 1, C, "random").sum())
    said = ranks(2).run(bounded, most - 1, errors=True)
    assert [str(error) for error in said] == [
        f"capacity: expected at least {most} (rank 1 has as many), got {most - 1}"
    ] * 2
    assert ranks(2).run(bounded, most) == [None, None]


def dense(rank: int, columns: int) -> None:
    mlc(rank, dense=True, columns=columns)


def test_given_weights_have_a_column_for_every_row_of_every_rank() -> None:
    said = ranks(2).run(dense, B, errors=True)
    assert {str(error) for error in said} == {"weights: expected 6 columns for all ranks' rows, got 3 on rank 0"}
    assert ranks(2).run(dense, 2 * B) == [None, None]


# -- ranks that die --


def dies(rank: int, when: str) -> None:
    """Rank 1 is killed: before the loss, within its forward (after the ranks met), or before the backward."""
    if rank == 1 and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and when == "forward":
        met = _collectives.meet

        def killed(*args: Any, **kwargs: Any) -> Any:
            met(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)

        group_sweep.meet = killed
    loss = sscl(rank)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


@pytest.mark.parametrize("when", ["before", "forward", "backward"])
def test_the_others_of_a_killed_rank_end_with_an_error(when: str) -> None:
    group = Ranks(3, timeout=15)
    try:
        started = time.monotonic()
        first, killed, last = group.run(dies, when, errors=True)
        assert isinstance(killed, ChildProcessError) and "exit code -9" in str(killed)
        assert isinstance(first, RuntimeError) and isinstance(last, RuntimeError)
        assert time.monotonic() - started < 40
    finally:
        group.close()


def skips(rank: int) -> None:
    if rank == 0:
        sscl(rank)


def test_the_others_of_a_rank_that_skips_a_step_wait_for_the_timeout() -> None:
    """As docs/scaling.md says: no loss can tell a rank that is late from one that will not come."""
    group = Ranks(2, timeout=3)
    try:
        started = time.monotonic()
        waited, skipped = group.run(skips, errors=True)
        assert isinstance(waited, RuntimeError) and skipped is None
        assert 2 < time.monotonic() - started < 40
    finally:
        group.close()
