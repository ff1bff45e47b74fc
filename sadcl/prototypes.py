"""Category prototypes from a trained step-1 model: the mean label feature of what it recognises well."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_tensor
from .head import move_maps


class PrototypeSums:
    """Running float64 sums of label features per class.

    Args:
        threshold: probability above which a positive counts as confidently recognised.
    """

    def __init__(self, threshold: float = 0.85) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold: expected a probability, got {threshold}")
        self.threshold = threshold
        self._sums: Tensor | None = None  # [2, C, E]: confident positives, all positives
        self._counts: Tensor | None = None  # [2, C]

    @torch.no_grad()
    def add(self, label_features: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            label_features: h ``[B, C, E]``.
            logits: ``[B, C]``.
            labels: ``[B, C]``; only entries equal to 1 count, so 0 and -1 (ignored) add nothing.
        """
        check_tensor("label_features", label_features, (3,), "[B, C, E]")
        for name, value in (("logits", logits), ("labels", labels)):
            if value.shape != label_features.shape[:2]:
                raise ValueError(
                    f"{name}: expected [B, C]={list(label_features.shape[:2])} as in label_features, "
                    f"got {list(value.shape)}"
                )
        positive = labels.to(logits.device) == 1
        confident = positive & (logits.double().sigmoid() > self.threshold)
        # Selecting instead of multiplying: 0 * inf would be NaN, and only positives are worth reading.
        image, category = positive.nonzero(as_tuple=True)
        rows = label_features[image, category].double()
        sure = confident[image, category]
        sums = rows.new_zeros(2, *label_features.shape[1:])
        sums[0].index_add_(0, category[sure], rows[sure])
        sums[1].index_add_(0, category, rows)
        counts = torch.stack([confident.sum(0), positive.sum(0)])
        if self._sums is None or self._counts is None:
            self._sums, self._counts = sums, counts
        else:
            self._sums += sums
            self._counts += counts

    def merge(self, other: PrototypeSums) -> None:
        """Add what another one has summed."""
        if other._sums is None or other._counts is None:
            return
        if self._sums is None or self._counts is None:
            self._sums, self._counts = other._sums.clone(), other._counts.clone()
        else:
            self._sums += other._sums.to(self._sums)
            self._counts += other._counts.to(self._counts)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle tensors of the CPU: what travels between processes."""
        return {name: value.cpu() if isinstance(value, Tensor) else value for name, value in vars(self).items()}

    def finish(self, generator: torch.Generator | None = None) -> Tensor:
        """The prototypes ``[C, E]``, float32.

        A class without a confident positive takes the mean of all its positives; one without any positive a
        random vector, as long as the others are on average, and a warning names it.

        Args:
            generator: CPU generator for the random vectors; by default a fixed one, so that runs agree.
        """
        if self._sums is None or self._counts is None:
            raise ValueError("prototypes: no batch was added")
        use = torch.where(self._counts[0] > 0, 0, 1)  # [C]
        classes = torch.arange(use.numel(), device=use.device)
        counts = self._counts[use, classes]
        means = self._sums[use, classes] / counts.clamp_min(1)[:, None]
        empty = counts == 0
        absent = empty.nonzero().flatten().tolist()
        if absent:
            warnings.warn(
                f"prototypes: no positive of class {', '.join(map(str, absent))}; taken at random instead",
                stacklevel=3,
            )
            if generator is None:
                generator = torch.Generator().manual_seed(0)
            width = means.shape[1]
            random = torch.randn(len(absent), width, dtype=torch.float64, device="cpu", generator=generator)
            random = random.to(means.device)
            usual = means[~empty].norm(dim=1).mean() if len(absent) < use.numel() else means.new_tensor(width**0.5)
            means[empty] = random / random.norm(dim=1, keepdim=True) * usual
        return means.float()


def build_prototypes(
    model_or_features: nn.Module | Iterable[tuple[Tensor, Tensor, Tensor]],
    loader: Iterable[tuple[Tensor, Tensor]] | None = None,
    *,
    threshold: float = 0.85,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    gather: Callable[[PrototypeSums], Iterable[PrototypeSums]] | None = None,
) -> Tensor:
    """Mean label feature of each class's confidently and correctly recognised positives.

    Args:
        model_or_features: a trained step-1 model (or head) that ``loader``'s first elements can be given to, run
            in eval mode and put back into the mode it was in; or, without a loader, an iterable of
            ``(label_features [B, C, E], logits [B, C], labels [B, C])``.
        loader: batches ``(images or feature maps, labels [B, C])``; anything after the second element is ignored.
        threshold: probability that a positive must exceed.
        device: where to run the model; by default where its parameters are.
        generator: for classes without a positive.
        gather: given this process's sums, returns those of all processes (its own too), each with its part of the
            batches; then all get the same prototypes.

    Returns:
        ``[C, E]`` float32, for :meth:`sadcl.SADCLHead.init_contrastive`.

    Raises:
        ValueError: if there is no batch or shapes do not fit.
        TypeError: if a model comes without a loader.
    """
    sums = PrototypeSums(threshold)
    if not isinstance(model_or_features, nn.Module):
        if loader is not None:
            raise TypeError(f"model_or_features: expected a model, got {type(model_or_features).__name__}")
        for label_features, logits, labels in model_or_features:
            sums.add(label_features, logits, labels)
        return sums.finish(generator)
    model = model_or_features
    if loader is None:
        raise TypeError("loader: expected batches of (images, labels) to run the model on, got None")
    where = torch.device(device) if device is not None else next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for inputs, labels, *_ in loader:
                output = model(move_maps(inputs, where), contrastive=False)
                sums.add(output.label_features, output.logits, labels)
    finally:
        model.train(was_training)
    if gather is not None:
        parts, sums = gather(sums), PrototypeSums(threshold)
        for part in parts:
            sums.merge(part)
    return sums.finish(generator)
