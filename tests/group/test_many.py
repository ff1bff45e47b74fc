"""64 ranks, played by threads of one process over torch's multi-threaded process group."""

from __future__ import annotations

import threading
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from group_cases import Case, put_together, value_and_gradients
from processes import CONTEXT
from ranks import split_sizes

from sadcl.testing import make_features, make_labels

WORLD, B, V, C, D = 64, 96, 2, 6, 5


def cases() -> list[Case]:
    x, labels = make_features(B, V, C, D, dtype=torch.float64), make_labels(B, C, "ignored")
    p, tau = make_features(C, D, seed=4, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    sscl = {"features": x, "labels": labels}
    dual = {"embeddings": x[:, 0], "bank_embeddings": x[:, 1], "labels": labels}
    rows = {"features": x[:, :, 0], "labels": labels}
    return [
        Case("sscl", "sample_contrastive_loss", sscl, {"temperature": tau}),
        Case("dual released", "dual_contrastive_loss", dual, {"prototypes": p}, {"formulation": "released"}),
        Case("mlc", "multilabel_supcon_loss", rows, {"temperature": tau, "prototypes": p}, {"weighting": "msc"}),
    ]


def ring_cases() -> list[Case]:
    """A ring of 64 threads passes 64 times 64 messages a round, which takes a minute."""
    return [Case("ring", one.loss, one.split, one.same, one.options, {"ring": True}) for one in cases()[:1]]


def play(world: int, chosen: list[Case]) -> list[list[Any]]:
    """What each of ``world`` threads computes, one list a thread."""
    from torch.testing._internal.distributed import multi_threaded_pg

    torch.set_num_threads(1)
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    multi_threaded_pg._install_threaded_pg()
    store, sizes, results = dist.HashStore(), split_sizes(B, world, 0), [None] * world

    def rank_of(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = [
                value_and_gradients(case, case.part(rank, sizes), group="world", **case.group) for case in chosen
            ]
        except BaseException as error:
            results[rank] = error
            multi_threaded_pg.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize(
    "chosen", [cases(), pytest.param(ring_cases(), marks=pytest.mark.slow)], ids=["gathered", "ring"]
)
def test_sixty_four_ranks_give_the_same_numbers(chosen: list[Case]) -> None:
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        results = pool.submit(play, WORLD, chosen).result(timeout=240)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    assert 0 in split_sizes(B, WORLD, 0)
    for number, case in enumerate(chosen):
        truth = value_and_gradients(case, case.split)
        got = put_together(case, [result[number] for result in results])
        for name, want in truth.items():
            np.testing.assert_allclose(got[name], want, rtol=1e-9, atol=1e-9, err_msg=f"{case.name}: {name}")
