"""What the released formulation asks of all ranks: which rows are anchors, and the maxima over pairs of images."""

from __future__ import annotations

import torch
from torch import Tensor

from .group_pairs import Columns
from .group_sweep import Sweep


def anchors(sweep: Sweep) -> Tensor:
    """Which own rows are: (b, v, c) where image ``(v B + b) // V`` of all ``B`` has class c. bool [R]."""
    x, v, met = sweep.x, sweep.v, sweep.met
    c = x.features.shape[2]
    before = met.images.cumsum(0) - met.images
    sent = sweep.all_tags[:, :, 0].long()  # [W, slot]: image of its rank * C + class
    there = torch.arange(sweep.slot, device=sent.device) < met.items[:, None]
    known = torch.where(there, sent + before[:, None] * c, -1).flatten()
    pair = sweep.own.tags[:, 0].long()
    image, label = pair // c + before[x.rank], pair % c
    view = torch.arange(v, device=pair.device)
    asked = (view * met.images.sum() + image[:, None]) // v * c + label[:, None]
    return torch.isin(asked.flatten(), known)


def pair_maxima(sweep: Sweep, columns: Columns, products: Tensor, positive: Tensor) -> Tensor:
    """The sum over a row's positives among the rows of one rank of ``R`` (see the oracle of SSCL), of products: [R]."""
    own, theirs = _image_views(sweep, sweep.own.tags), _image_views(sweep, columns.sent)
    height, width = _number(own), _number(theirs)
    same = products.new_zeros(height * width)
    at = (own[:, None] * width + theirs).flatten()
    of_class = positive.flatten()
    same.index_add_(0, at, of_class.to(products.dtype))
    everything = same == sweep.x.features.shape[2]
    maximum = torch.where(everything, float("-inf"), 0.0).to(products.dtype)
    candidates = torch.where(of_class, products.flatten(), float("-inf"))
    maximum = maximum.scatter_reduce(0, at, candidates, "amax")
    return torch.where(positive, maximum[at].view_as(products), 0.0).sum(dim=1)


def _image_views(sweep: Sweep, sent: Tensor | None) -> Tensor:
    assert sent is not None
    image = sent[:, 0].long() // sweep.x.features.shape[2]
    return (image[:, None] * sweep.v + torch.arange(sweep.v, device=image.device)).flatten()


def _number(image_views: Tensor) -> int:
    return int(image_views.max()) + 1 if image_views.numel() > 0 else 0
