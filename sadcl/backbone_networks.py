"""Networks by name, from torchvision or timm, and what of them gives the feature map or maps."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from .backbone_weights import PACKAGED

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RESNET = re.compile(r"^(resnet|resnext|wide_resnet)\d+(_|$)")

Features = Callable[[nn.Module, Tensor], Tensor | tuple[Tensor, ...]]


class Network(NamedTuple):
    """A network and how it is used: ``features(body, images)`` gives its last map or tokens, or with ``strides`` a
    tuple of NCHW maps and, as the last of it, these."""

    body: nn.Module
    features: Features
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    frozen: tuple[str, ...] = ()
    strides: tuple[int, ...] | None = None


def create(name: str, size: tuple[int, int], strides: Sequence[int] | None) -> Network:
    """Build a network with random weights.

    Args:
        name: see :func:`sadcl.backbones.build_backbone`.
        size: (H, W) of its input.
        strides: of the maps that are wanted; None: the last one, or what a packaged network has by default.

    Raises:
        ImportError: if the library the name belongs to is missing.
        ValueError: if there is no such network, or it has no such maps.
    """
    source, _, plain = name.rpartition(":")
    if source not in ("", "timm", "torchvision"):
        raise ValueError(f"backbone: expected NAME, timm:NAME or torchvision:NAME, got {name!r}")
    if source == "torchvision" or (source == "" and _RESNET.match(plain)):
        if strides is not None:
            raise ValueError(
                f"strides: torchvision's {plain!r} gives its last map alone; expected None, or timm:{plain}"
            )
        return _torchvision(plain, size)
    if packaged := PACKAGED.get(name):
        body = _timm_model(packaged.body, size)
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
        strides = packaged.strides if strides is None else strides
    else:
        body = _timm_model(plain, size)
        config = getattr(body, "pretrained_cfg", None) or {}
        mean, std = tuple(config.get("mean", IMAGENET_MEAN)), tuple(config.get("std", IMAGENET_STD))
    wanted, indices = _stages(body, strides)
    features = partial(_several, indices) if len(indices) > 1 else _forward_features
    return Network(body, features, mean, std, (), wanted)


def _stages(body: nn.Module, strides: Sequence[int] | None) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """Strides of the maps, and which stages of a timm network give them."""
    if strides is None:
        return None, ()
    info = getattr(body, "feature_info", None) or ()
    info = info.get_dicts() if hasattr(info, "get_dicts") else info
    has = {stage["reduction"]: index for index, stage in enumerate(info)}  # of each stride the last stage
    wanted = tuple(strides)
    if not has or not hasattr(body, "forward_intermediates"):
        raise ValueError(f"strides: {type(body).__name__} does not tell its stages; expected None, got {list(wanted)}")
    if not wanted or list(wanted) != sorted(set(wanted)) or not set(wanted) <= set(has) or wanted[-1] != max(has):
        raise ValueError(
            f"strides: expected some of {sorted(has)}, which {type(body).__name__} has, the finest first and "
            f"{max(has)} at the end, got {list(wanted)}"
        )
    return wanted, tuple(has[stride] for stride in wanted)


def _forward_features(body: nn.Module, images: Tensor) -> Tensor:
    return body.forward_features(images)  # type: ignore[operator]


def _several(indices: tuple[int, ...], body: nn.Module, images: Tensor) -> tuple[Tensor, ...]:
    # The last stage is asked for, though not used: some networks stop after the last that is.
    last, maps = body.forward_intermediates(images, indices=list(indices))  # type: ignore[operator]
    return (*maps[:-1], last)


def last_map(body: nn.Module, images: Tensor) -> Tensor:
    """The last tokens of a timm network as it arranges them itself."""
    return body.forward_intermediates(images, indices=1, intermediates_only=True)[-1]  # type: ignore[operator]


def _call(body: nn.Module, images: Tensor) -> Tensor:
    return body(images)


def _torchvision(name: str, size: tuple[int, int]) -> Network:
    models = _require("torchvision").models
    try:
        network = models.get_model(name, weights=None)
    except ValueError as error:
        raise ValueError(f"backbone: torchvision has no model {name!r}") from error
    if _RESNET.match(name):
        body = nn.Sequential()  # keeps the parameter names
        for child, module in network.named_children():
            if child not in ("avgpool", "fc"):
                body.add_module(child, module)
        return Network(body, _call, frozen=("conv1.", "bn1.", "layer1."))
    if not hasattr(network, "features"):
        raise ValueError(f"backbone: torchvision's {name!r} gives no feature map; try timm:{name}")
    body = network.features
    if hasattr(network, "permute") and hasattr(network, "norm"):  # Swin: NHWC until its permute
        body = nn.Sequential(body, network.norm, network.permute)
    return Network(body, _call)


def _timm_model(name: str, size: tuple[int, int]) -> nn.Module:
    timm = _require("timm")
    if not timm.is_model(name):
        close = ", ".join(timm.list_models(f"*{name}*")[:5])
        raise ValueError(f"backbone: timm has no model {name!r}" + (f"; near: {close}" if close else ""))
    # Transformers take the image size, convolutional networks do not.
    extras: tuple[dict[str, Any], ...] = (
        {"img_size": size, "dynamic_img_size": True},
        {"img_size": size},
        {},
    )
    for extra in extras:
        try:
            body = timm.create_model(name, pretrained=False, num_classes=0, **extra)
            break
        except TypeError as error:
            if not extra:
                raise ValueError(f"backbone: timm cannot build {name!r}: {error}") from error
        except Exception as error:
            where = f"images of {size[0]} x {size[1]}"
            raise ValueError(
                f"backbone: timm cannot build {name!r} for {where}: {type(error).__name__} {error}"
            ) from error
    if not hasattr(body, "forward_features"):
        raise ValueError(f"backbone: timm's {name!r} has no forward_features")
    return body


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this backbone needs {package}: pip install 'sadcl[train]'") from error
