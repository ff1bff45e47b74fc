"""The class set of a head: queries from embeddings, rows kept, moved and added."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ._checks import check_floating, check_tensor

_MAP_SEED = 2307


def fixed_map(given: int, wanted: int) -> Tensor:
    """The fixed linear map from ``given`` to ``wanted`` features: ``[given, wanted]``, float64.

    Its rows (or, when narrowing, its columns) are orthonormal, so widening keeps every inner product and
    narrowing keeps them up to the usual random-projection error. It is fixed rather than learned: the
    queries stay free parameters, so a learned map would add nothing that they cannot learn themselves,
    while a fixed one puts classes that are added later from the same text encoder into the same space.
    numpy's RandomState stream is frozen, so the map is the same for every version of numpy and torch.
    """
    tall = np.random.RandomState(_MAP_SEED).standard_normal((max(given, wanted), min(given, wanted)))
    q, r = np.linalg.qr(tall)
    q = q * np.sign(np.diag(r))
    return torch.from_numpy(np.ascontiguousarray(q if given > wanted else q.T))


def fit_width(embeddings: Tensor, width: int) -> Tensor:
    """Queries ``[n, width]`` from embeddings ``[n, E']``.

    Embeddings of the right width are taken as they are. Others go through :func:`fixed_map` and each row is
    scaled to length ``sqrt(width)``, that of a freshly initialised query: text encoders compare by cosine,
    so the length carries nothing, while here it decides how sharply the first layer attends.

    Raises:
        ValueError: if the rank is wrong or a value is not finite.
    """
    check_floating("embeddings", check_tensor("embeddings", embeddings, (2,), "[C, E']"))
    if 0 in embeddings.shape:
        raise ValueError(f"embeddings: expected at least one row and column, got {list(embeddings.shape)}")
    if not bool(embeddings.isfinite().all()):
        raise ValueError("embeddings: expected finite values, got NaN or inf")
    embeddings = embeddings.detach()
    if embeddings.shape[1] == width:
        return embeddings.clone()
    mapped = embeddings.cpu().double() @ fixed_map(embeddings.shape[1], width)
    length = mapped.norm(dim=1, keepdim=True).clamp_min(1e-30)
    dtype = torch.promote_types(embeddings.dtype, torch.float32)
    return (mapped / length * width**0.5).to(device=embeddings.device, dtype=dtype)


def check_indices(indices: Sequence[int] | Tensor, num_classes: int) -> Tensor:
    """Class indices as an int64 tensor: at least one, each in range, none twice."""
    index = torch.as_tensor(indices, device="cpu").detach()
    if index.dim() != 1 or index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"indices: expected a non-empty list of class indices, got {indices!r}")
    index = index.long()
    wrong = [i for i in index.tolist() if not 0 <= i < num_classes]
    if wrong:
        raise ValueError(f"indices: expected 0 <= index < {num_classes}, got {wrong}")
    if len(set(index.tolist())) != index.numel():
        raise ValueError(f"indices: expected each class once, got {index.tolist()}")
    return index
