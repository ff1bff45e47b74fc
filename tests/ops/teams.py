"""Every op of the extension, forward and backward, at sizes at which each of its parallel regions starts a team.

``python -m tests.races`` checks that they do, of every ``#pragma omp parallel`` in csrc.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sadcl import functional as F
from sadcl import metrics
from sadcl._collectives import Group
from sadcl.bank import MemoryBank
from sadcl.functional._group import rows_of_ranks
from sadcl.functional.linear import linear
from sadcl.head import GroupClassifier
from sadcl.testing import make_features, make_labels, value_and_grads

Job = Callable[[], tuple[Tensor, ...]]


def jobs(dtype: torch.dtype = torch.float32) -> dict[str, Job]:
    """By name: an op's, or an op's, a dash and what is special about it."""
    made = functools.partial(make_features, dtype=dtype)
    return {**losses(made), **layers(made)}


def losses(made: Callable[..., Tensor]) -> dict[str, Job]:
    b, c, d = 24, 20, 64
    y, p = make_labels(b, c), made(c, d, seed=5)
    some = make_labels(b, c, "ignored")
    x, bank = made(b, c, d), made(b, c, d, seed=2)
    columns = some.repeat(1, d)  # of x.flatten(1): enough pairs for two threads
    views, keys, key_labels = x[:, :8], made(360, d, seed=7), make_labels(360, c, seed=7)

    def sscl(rows: float, **options: Any) -> Job:
        y = make_labels(b, c, labels_per_image=rows / b)
        return lambda: value_and_grads(
            lambda x: F.sample_contrastive_loss(x, y, backend="cpp", **options), x[:, None].expand(-1, 2, -1, -1)
        )

    def mlc(x: Tensor, **options: Any) -> Tensor:
        return F.multilabel_supcon_loss(x, y, backend="cpp", **options)

    def own_rows(x: Tensor, k: Tensor) -> Tensor:  # of a process alone
        more = {"labels": y, "keys": k, "key_labels": key_labels, "ring": False, "capacity": None}
        number, tau = F.WEIGHTINGS.index("simdis"), torch.tensor(0.2)
        return rows_of_ranks(x[:, :, None], tau, number, "", Group(), "cpp", **more).row_loss.sum()

    return {
        "compact": lambda: tuple(F.compact_labels(y.repeat(16, 5), "cpp")),
        "sscl": sscl(60, reduction="sum"),
        "sscl_mean": sscl(60),
        "sscl-blocks": sscl(360),  # above 512 rows scores are not kept as a square
        "sscl-released": sscl(60, formulation="released"),
        "pscl": lambda: value_and_grads(
            lambda x, p: F.prototype_contrastive_loss(x, p, some, reduction="sum", backend="cpp"), x, p
        ),
        "pscl_mean": lambda: value_and_grads(
            lambda x, p: F.prototype_contrastive_loss(x, p, some, backend="cpp"), x, p
        ),
        "dual": lambda: value_and_grads(lambda x, b: sum(F.dual_contrastive_loss(x, b, p, y, backend="cpp")), x, bank),
        "asl": lambda: value_and_grads(lambda x: F.asymmetric_loss(x.flatten(1), columns, backend="cpp"), x),
        "mlc": lambda: value_and_grads(
            lambda x, k: mlc(x, keys=k, key_labels=key_labels, weighting="jaccard"), views, keys
        ),
        "mlc-batch": lambda: value_and_grads(lambda x, p: mlc(x, prototypes=p, weighting="msc"), views, p),
        "mlc-queue": lambda: value_and_grads(
            lambda x: mlc(x, keys=keys, key_labels=key_labels, weighting="overlap", include_batch=False), views
        ),
        "mlc-classes": lambda: value_and_grads(
            lambda x, k: mlc(x, keys=k, key_labels=key_labels, weighting="mulsupcon"), views, keys
        ),
        "group_rows": lambda: value_and_grads(own_rows, views, keys),
        "zlpr": lambda: value_and_grads(lambda x: F.zlpr_loss(x.flatten(1), columns, backend="cpp"), x),
        "two_way": lambda: value_and_grads(lambda x: F.two_way_loss(x.flatten(1), columns, backend="cpp"), x),
        "supcon": lambda: value_and_grads(lambda x: F.supcon_loss(x, y.argmax(1), backend="cpp"), x[:, :2]),
    }


def layers(made: Callable[..., Tensor]) -> dict[str, Job]:
    b, c, d, width, heads = 24, 20, 64, 64, 4
    x, y = made(b, c, d), make_labels(b, c)
    memory, query = made(b, 30, width, seed=3), made(c, width, seed=4)
    many = made(b, 22, width, seed=4)  # a set of queries for each image
    parameters = [made(*shape, seed=6) * 0.1 for shape in ((3 * width, width), (width, width))]
    biases = [torch.linspace(-1, 1, n).to(x.dtype) for n in (3 * width, width)]
    place = made(30, width, seed=11)
    padded = torch.arange(30) >= torch.arange(4, 4 + b)[:, None]
    classifier = GroupClassifier(c, d)
    classifier.weight.data, classifier.bias.data = made(c, d, seed=8), torch.linspace(-1, 1, c).to(x.dtype)

    def attention(form: str | None, query: Tensor, **options: Any) -> Job:
        def run(query: Tensor, memory: Tensor, in_weight: Tensor, in_bias: Tensor, out_weight: Tensor) -> Tensor:
            weights = (in_weight, in_bias, out_weight, biases[1])
            out, applied = F.label_attention(query, memory, *weights, heads, form=form, backend="cpp", **options)
            return out if applied is None else torch.cat((out, applied.transpose(1, 2).flatten(2)), 2)

        more = heads * 30 if options else 0
        upstream = made(b, query.shape[-2], width + more, seed=9)
        return lambda: value_and_grads(run, query, memory, parameters[0], biases[0], parameters[1], upstream=upstream)

    def wide() -> tuple[Tensor, ...]:  # weights whose gradients, where they are rounded, a team rounds
        query, memory = made(5, 192, seed=12), made(2, 8, 192, seed=13)
        weights = made(3 * 192, 192, seed=14) * 0.1, made(192, 192, seed=15) * 0.1

        def run(query: Tensor, memory: Tensor, in_weight: Tensor, out_weight: Tensor) -> Tensor:
            return F.label_attention(query, memory, in_weight, None, out_weight, None, heads, backend="cpp")[0]

        return value_and_grads(run, query, memory, *weights, upstream=made(2, 5, 192, seed=16))

    def update() -> tuple[Tensor, ...]:
        store = MemoryBank(b, c, 2 * d)
        store.update(torch.cat((x, x), 2), x[..., 0] + 2, torch.ones(b, c), 0.6)
        return (store.slots,)

    return {
        "label_attention": attention(None, query),
        "label_attention-plain": attention("plain", many),
        "label_attention-folded": attention("folded", many),
        "label_attention-masked": attention(
            "plain", many, key_padding_mask=padded, need_weights=True, memory_pos=place
        ),
        "label_attention-wide": wide,
        "group_classifier": lambda: value_and_grads(classifier, x, upstream=x[..., 0]),
        "bank": update,
        "linear": lambda: value_and_grads(linear, memory, parameters[1], biases[1], upstream=memory),
        "average_precision": lambda: (metrics.average_precision(x.flatten(1), y.repeat(1, d)),),
    }
