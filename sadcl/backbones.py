"""Backbones by name: torchvision or timm networks behind one interface, giving NCHW feature maps."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone_networks import IMAGENET_MEAN, IMAGENET_STD, Features, create, last_map
from .backbone_weights import PACKAGED, load_weights, read_weights


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
    are dropped and its grid restored. Frozen parts stay in eval mode under ``train()``. With several ``strides``
    it gives a tuple of such maps, the finest first.

    Attributes:
        body: the network; its parameter names are the source library's.
        channels: of the feature map; of several maps a tuple, one number each.
        feature_size: (H, W) of the feature map, the finest one, at the preprocessing's size.
        preprocessing: what the input has to go through.
        strides: of the maps; None: the last one, whatever its stride.
    """

    def __init__(
        self,
        body: nn.Module,
        features: Features,
        preprocessing: Preprocessing,
        frozen: Sequence[str],
        freeze_norm: bool,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.body = body
        self.preprocessing = preprocessing
        self.freeze_norm = freeze_norm
        self.frozen = tuple(frozen)
        self.strides = strides
        self._features = features
        self._freeze()
        raw = self._probe(features, preprocessing.size)
        *finer, raw = raw if strides and len(strides) > 1 else (raw,)
        if not isinstance(raw, Tensor) or raw.dim() not in (3, 4):
            what = list(raw.shape) if isinstance(raw, Tensor) else f"a {type(raw).__name__}"
            raise ValueError(f"backbone: {type(body).__name__} gives {what}, expected one feature map or its tokens")
        shape = tuple(raw.shape)
        self._channels_last = len(shape) == 4 and self._is_channels_last(shape)
        channels = shape[1] if len(shape) == 4 and not self._channels_last else shape[-1]
        self.channels = (*(one.shape[1] for one in finer), channels) if finer else channels
        if len(shape) == 4:
            self.feature_size = shape[1:3] if self._channels_last else shape[2:]
        else:
            self._find_grid(shape[1])
        if finer:
            self.feature_size = tuple(finer[0].shape[2:])
        for name in self._unused() if "" not in self.frozen else ():
            body.get_parameter(name).requires_grad_(False)
        self.train(self.training)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Feature map ``[B, channels, H', W']``, or a tuple of them, of preprocessed ``[B, 3, H, W]``.

        Raises:
            ValueError: images of another shape, or of a size that the network cannot take.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        if torch.compiler.is_compiling():
            return self._maps(self.body, images)
        try:
            return self._maps(self.body, images)
        except Exception:
            size = (images.shape[-2], images.shape[-1])
            if size != self.preprocessing.size:
                self.check_size(size)
            raise

    def check_size(self, size: tuple[int, int]) -> None:
        """Require that images of a size can be taken; nothing is computed where the meta device can tell.

        Args:
            size: (H, W).

        Raises:
            ValueError: they cannot, and why.
        """
        self._probe(self._maps, size)

    def _maps(self, body: nn.Module, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        features = self._features(body, images)
        if isinstance(features, Tensor):
            return self._as_map(features, images)
        return (*features[:-1], self._as_map(features[-1], images))

    def _as_map(self, features: Tensor, images: Tensor) -> Tensor:
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
            maps = self._probe(last_map, size)
        except ValueError:
            return None
        return (maps.shape[2], maps.shape[3]) if isinstance(maps, Tensor) and maps.dim() == 4 else None

    @torch.no_grad()
    def _probe(self, features: Features, size: tuple[int, int]) -> Any:
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

    def _unused(self) -> list[str]:
        """Trained parameters that the maps do not depend on (poolings, heads): nothing would ever come to them, which
        DistributedDataParallel takes for a mistake."""
        trained = {
            k: v.detach().to("meta").requires_grad_() for k, v in self.body.named_parameters() if v.requires_grad
        }
        state = {k: v.detach().to("meta") for k, v in [*self.body.named_parameters(), *self.body.named_buffers()]}
        raw = _Raw(self.body, self._features)
        modes = {module: module.training for module in self.body.modules()}
        self.body.eval()
        try:
            given = {f"body.{k}": v for k, v in {**state, **trained}.items()}
            with torch.enable_grad():
                maps = torch.func.functional_call(
                    raw, given, (torch.empty(1, 3, *self.preprocessing.size, device="meta"),)
                )
                total = torch.stack([part.sum() for part in ((maps,) if isinstance(maps, Tensor) else maps)]).sum()
            gradients = torch.autograd.grad(total, list(trained.values()), allow_unused=True)
            return [name for name, gradient in zip(trained, gradients, strict=True) if gradient is None]
        except Exception:  # a network that the meta device cannot run
            return []
        finally:
            for module, mode in modes.items():
                module.training = mode


class _Raw(nn.Module):
    """The network with its feature function as forward, for functional_call."""

    def __init__(self, body: nn.Module, features: Features) -> None:
        super().__init__()
        self.body = body
        self.features = features

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.features(self.body, images)


def build_backbone(
    name: str,
    pretrained: bool | str | os.PathLike[str] = False,
    image_size: int | tuple[int, int] = 448,
    *,
    frozen: str | Sequence[str] = "default",
    freeze_norm: bool = True,
    strides: Sequence[int] | None = None,
) -> Backbone:
    """Build a backbone by name.

    Args:
        name: ``efficientnet_lite2``, ``efficientnet_lite0``; a ResNet of torchvision (``resnet101``); any timm model
            whose ``forward_features`` gives one feature map, or tokens whose grid it tells; ``timm:NAME`` or
            ``torchvision:NAME`` to say from where.
        pretrained: False; True for weights that a package carries (``efficientnet_lite2`` and ``0``); or a path to a
            state dict under the source library's names. Nothing is ever downloaded.
        image_size: side or (H, W) of the input.
        frozen: ``"default"`` (torchvision ResNets: stem and layer1, as published; others: nothing), ``"all"``,
            ``"none"``, or prefixes of parameter names.
        freeze_norm: keep batch norms in eval mode and untrained.
        strides: of the maps of a timm network that are wanted, the finest first and its last one at the end, such as
            ``(16, 32)``; None: the last map (of ``efficientnet_lite2`` these two).

    Raises:
        ImportError: if the library the name belongs to is missing.
        ValueError: if the name or the weights are unknown, or the network takes no images of this size or gives no map.
    """
    height, breadth = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = (int(height), int(breadth))
    if min(size) < 1:
        raise ValueError(f"image_size: expected >= 1, got {image_size}")
    network = create(name, size, strides)
    if isinstance(frozen, str):
        choices: dict[str, Sequence[str]] = {"default": network.frozen, "all": ("",), "none": ()}
        if frozen not in choices:
            raise ValueError(f"frozen: expected default, all, none or a list of prefixes, got {frozen!r}")
        frozen = choices[frozen]
    if pretrained is True:
        if name not in PACKAGED:
            raise ValueError(
                f"pretrained=True: no package carries weights for {name!r}, and nothing is downloaded; "
                f"pass a path, or take one of {', '.join(PACKAGED)}"
            )
        load_weights(network.body, PACKAGED[name].weights(), f"the package {PACKAGED[name].package}")
    elif pretrained is not False:
        load_weights(network.body, read_weights(os.fspath(pretrained)), os.fspath(pretrained))
    preprocessing = Preprocessing(size, network.mean, network.std)  # type: ignore[arg-type]
    return Backbone(network.body, network.features, preprocessing, frozen, freeze_norm, network.strides)


@torch.no_grad()
def folded(backbone: Backbone) -> Backbone:
    """A copy for prediction, in which a convolution has taken up the batch norm that follows it; the original is left.

    A third of a mobile network's time on a CPU goes to its norms (EfficientNet-Lite2 at 256 pixels, Zen 4, one thread:
    58 ms of processor time an image, 37 without). Which norm follows which convolution is read off their order in the
    network, so the copy is held against the original on noise; where they differ, the original is returned.
    """
    fast = copy.deepcopy(backbone).eval()
    if not _fold(fast.body):
        return backbone
    noise = torch.randn(1, 3, *backbone.preprocessing.size, generator=torch.Generator().manual_seed(0), device="cpu")
    noise = noise.to(next(backbone.parameters()).device)
    mode = backbone.training
    pairs = [(one,) if isinstance(one, Tensor) else one for one in (backbone.eval()(noise), fast(noise))]
    backbone.train(mode)
    same = all(float((a - b).abs().max()) <= 1e-3 * float(a.abs().max()) for a, b in zip(*pairs, strict=True))
    return fast if same else backbone


def _fold(module: nn.Module) -> int:
    """How many norms were taken up."""
    count, before = 0, None
    for name, child in list(module.named_children()):
        plain = type(child) is nn.BatchNorm2d
        if isinstance(before, nn.Conv2d) and (plain or type(child).__name__ == "BatchNormAct2d"):  # timm's: and an act
            norm: Any = child
            before.weight, before.bias = nn.utils.fuse_conv_bn_weights(
                before.weight, before.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            )
            setattr(module, name, nn.Identity() if plain else nn.Sequential(norm.drop, norm.act))
            count += 1
        else:
            count += _fold(child)
        before = child
    return count
