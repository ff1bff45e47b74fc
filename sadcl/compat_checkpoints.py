"""Reading checkpoints in the released format: names mapped by a table, sizes taken from the tensors."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._files import mistaken_for_checkpoint, unwrapped
from .head import SADCLHead
from .model import SADCL

# Released name, our name; # stands for a layer's number, a final dot for any ending.
_NAMES = (
    ("transformer.encoder.layers.#.self_attn.", "encoder.#.self_attn."),
    ("transformer.encoder.layers.#.linear1.", "encoder.#.ffn.linear1."),
    ("transformer.encoder.layers.#.linear2.", "encoder.#.ffn.linear2."),
    ("transformer.encoder.layers.#.norm1.", "encoder.#.norm1."),
    ("transformer.encoder.layers.#.norm2.", "encoder.#.norm2."),
    ("transformer.decoder.layers.#.multihead_attn.", "decoder.#.cross_attn."),
    ("transformer.decoder.layers.#.linear1.", "decoder.#.ffn.linear1."),
    ("transformer.decoder.layers.#.linear2.", "decoder.#.ffn.linear2."),
    ("transformer.decoder.layers.#.norm2.", "decoder.#.norm1."),
    ("transformer.decoder.layers.#.norm3.", "decoder.#.norm2."),
    ("transformer.decoder.norm.", "decoder_norm."),
    ("input_proj.", "input_proj."),
    ("query_embed.weight", "queries"),
    ("fc.W", "classifier.weight"),
    ("fc.b", "classifier.bias"),
    ("proj_head.layers.", "projection.layers."),
    ("prototype", "prototypes"),
    ("memorybank", "memory_bank.slots"),
)
_BATCHED = ("classifier.weight", "classifier.bias", "prototypes")  # released with a leading dimension of 1
_BODY = "backbone.0.body."
_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    zipfile.BadZipFile,
)
_STATE_KEYS = ("state_dict", "model")


def head_from_released(state_dict: Mapping[str, Tensor], num_heads: int, feature_size: tuple[int, int]) -> SADCLHead:
    """Build a head from a state dict in the released format.

    Keys may have the prefixes of wrappers (``module.``, ``_orig_mod.``, ``model.``, repeated). A missing ``input_proj``
    means the identity. Everything under ``backbone.`` is left aside (position buffers are recomputed). A step-1 dict
    has no ``prototype``, ``memorybank`` and ``proj_head``; the head then has no contrastive outputs.

    Args:
        state_dict: released names to tensors.
        num_heads: attention heads; no tensor tells.
        feature_size: (H, W) of the feature map.

    Returns:
        A :class:`sadcl.SADCLHead` in eval mode, with the sizes of the tensors.

    Raises:
        ValueError: naming the keys that are missing, unexpected, or of the wrong shape.
    """
    ours = _renamed(state_dict)
    head = SADCLHead(num_heads=num_heads, feature_size=feature_size, **_head_sizes(ours))
    _load(head, ours, _released_name)
    return head.eval()


def load_released_checkpoint(
    path: str | os.PathLike[str],
    num_heads: int = 4,
    feature_size: tuple[int, int] | None = None,
    *,
    backbone: str = "resnet101",
    image_size: int = 448,
) -> SADCL:
    """Load a released checkpoint file into a :class:`sadcl.SADCL` in eval mode.

    Args:
        path: the file; read with ``weights_only=True`` (numpy scalars, which released files hold, are
        allowed).
        num_heads: attention heads.
        feature_size: (H, W) of the feature map; by default what the backbone makes of ``image_size``.
        backbone: name of a torchvision ResNet.
        image_size: side of the input images.

    Returns:
        The model, backbone and head filled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is truncated, no checkpoint, or of another model; the message names path and keys.
    """
    state = _read(path)
    try:
        ours = _renamed(state)
        sizes = _head_sizes(ours)
        channels = sizes.pop("in_channels")
        model = SADCL(backbone=backbone, image_size=image_size, feature_size=feature_size, num_heads=num_heads, **sizes)
        if model.head.in_channels != channels:
            raise ValueError(
                f"the head reads {channels} channels, backbone {backbone!r} gives {model.head.in_channels}"
            )
        _load(model.head, ours, _released_name)
        body = {k.removeprefix(_BODY): v for k, v in unwrapped(state).items() if k.startswith(_BODY)}
        _load(model.backbone.body, body, lambda name: _BODY + name)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: not a checkpoint of this model: {error}") from error
    return model.eval()


def _read(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The state dict inside a checkpoint file."""
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"{name}: no such checkpoint file")
    if what := mistaken_for_checkpoint(name):
        raise ValueError(f"{name}: {what}")
    try:
        with torch.serialization.safe_globals(_numpy_scalars()):
            content = torch.load(name, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except _UNREADABLE as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{name}: truncated, or not a PyTorch checkpoint ({reason})") from error
    for key in _STATE_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = isinstance(content, Mapping) and all(isinstance(v, Tensor) for v in content.values())
    if not tensors or not content:
        raise ValueError(f"{name}: holds no state dict (looked for {', '.join(_STATE_KEYS)}, or bare tensors)")
    return content


def _numpy_scalars() -> list[Any]:
    """What unpickling a numpy scalar needs, under numpy 1's module name and numpy 2's."""
    import numpy as np

    core = getattr(np, "_core", None) or np.core  # numpy 2, numpy 1
    scalar = core.multiarray.scalar
    kinds = (np.float16, np.float32, np.float64, np.int32, np.int64)
    return [
        (scalar, "numpy._core.multiarray.scalar"),
        (scalar, "numpy.core.multiarray.scalar"),
        np.dtype,
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _renamed(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head's tensors under our names."""
    ours: dict[str, Tensor] = {}
    unexpected = []
    for key, value in unwrapped(state_dict).items():
        if key.startswith("backbone."):
            continue
        name = _translate(key)
        if name is None:
            unexpected.append(key)
        else:
            ours[name] = value[0] if name in _BATCHED and value.shape[:1] == (1,) else value
    if unexpected:
        raise ValueError(f"state_dict: unexpected keys {_listed(unexpected)}")
    return ours


def _head_sizes(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor arguments of the head, from the shapes of its tensors."""
    needed = ["queries", "decoder.0.ffn.linear1.weight"]
    parts = ("projection.layers.1.weight", "prototypes", "memory_bank.slots")
    contrastive = any(name in ours for name in parts)
    if contrastive:
        needed += parts
    missing = [name for name in needed if name not in ours]
    if missing:
        raise ValueError(f"state_dict: missing {_listed([_released_name(name) for name in missing])}")
    classes, width = ours["queries"].shape
    has_conv = "input_proj.weight" in ours
    return {
        "in_channels": ours["input_proj.weight"].shape[1] if has_conv else width,
        "num_classes": classes,
        "hidden_dim": width,
        "ffn_dim": ours["decoder.0.ffn.linear1.weight"].shape[0],
        "encoder_layers": _count(ours, "encoder"),
        "decoder_layers": _count(ours, "decoder"),
        "proj_dim": ours[parts[0]].shape[0] if contrastive else 1024,
        "contrastive": contrastive,
        "bank_slots": ours[parts[2]].shape[0] if contrastive else 1,
        "input_proj": has_conv,
    }


def _count(ours: Mapping[str, Tensor], part: str) -> int:
    return len({name.split(".")[1] for name in ours if name.startswith(f"{part}.")})


def _load(module: nn.Module, state: Mapping[str, Tensor], released: Callable[[str], str]) -> None:
    """Load strictly, save for counters of batch norms, which frozen ones lack."""
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unexpected = [k for k in state if k not in wanted]
    wrong = [
        f"{released(k)} {list(state[k].shape)} instead of {list(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    problems = [
        f"{what} {_listed(keys)}"
        for what, keys in (
            ("missing keys", [released(k) for k in missing]),
            ("unexpected keys", [released(k) for k in unexpected]),
            ("wrong shapes", wrong),
        )
        if keys
    ]
    if problems:
        raise ValueError(f"state_dict: {'; '.join(problems)}")
    module.load_state_dict(dict(state), strict=False)


def _translate(name: str, back: bool = False) -> str | None:
    """Our name for a released one (or ``back``: the released name for ours), None if the table has none."""
    for row in _NAMES:
        source, target = reversed(row) if back else row
        pattern = re.escape(source).replace(re.escape("#"), r"(\d+)")
        hit = re.match(pattern if source.endswith(".") else pattern + "$", name)
        if hit:
            return target.replace("#", hit.group(1) if hit.groups() else "") + name[hit.end() :]
    return None


def _released_name(name: str) -> str:
    return _translate(name, back=True) or name


def _listed(keys: list[str], most: int = 8) -> str:
    rest = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + rest
