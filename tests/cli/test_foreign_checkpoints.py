"""Checkpoints as others leave them: of wrapped modules, a page or a pointer in the place of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sadcl import SADCLHead
from sadcl._files import unwrapped
from sadcl.checkpoint import CheckpointError, load_checkpoint, restore_model
from sadcl.cli import main
from sadcl.compat import head_from_released, load_released_checkpoint
from sadcl.compat_checkpoints import _BATCHED, _translate

PREFIXES = [
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "module.module.",
    "model._orig_mod.",
    "_fsdp_wrapped_module.",
    "model._forward_module._fsdp_wrapped_module.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_own_checkpoint_of_a_wrapped_model(trained: Path, prefix: str) -> None:
    content = load_checkpoint(trained / "run" / "step2.pt")
    wrapped = {**content, "model": {prefix + name: value for name, value in content["model"].items()}}
    for name, value in restore_model(wrapped).state_dict().items():
        assert torch.equal(value, content["model"][name]), name


def test_own_checkpoint_of_which_a_part_was_wrapped(trained: Path) -> None:
    content = load_checkpoint(trained / "run" / "step2.pt")
    model = restore_model(content)
    model.head, model.backbone = torch.compile(model.head), torch.compile(nn.DataParallel(model.backbone))  # type: ignore
    state = model.state_dict()
    assert any(name.startswith("head._orig_mod.") for name in state)
    again = restore_model({**content, "model": state}).state_dict()
    assert again.keys() == content["model"].keys()
    assert all(torch.equal(value, content["model"][name]) for name, value in again.items())


def test_released_head_of_wrapped_modules() -> None:
    """torch's own wrappers, one in the other: compiled, averaged, and only a part of it compiled."""
    head = SADCLHead(32, 5, 32, 4, 64, 1, 2, 16, (4, 4), input_proj=False).eval()

    def released(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = {}
        for name, value in state.items():
            prefix = name[: -len(own)] if (own := next((o for o in head.state_dict() if name.endswith(o)), "")) else ""
            if theirs := _translate(own, back=True):
                found[prefix + theirs] = value[None] if own in _BATCHED else value
            elif not own:
                found[name] = value
        return found

    images = torch.randn(2, 32, 4, 4)
    wanted = head(images).logits
    averaged = torch.optim.swa_utils.AveragedModel(torch.compile(head))  # type: ignore[arg-type]
    assert "n_averaged" in averaged.state_dict()
    for wrapped in (torch.compile(head), nn.DataParallel(nn.DataParallel(head)), averaged):
        state = released(wrapped.state_dict())  # type: ignore[attr-defined]
        assert torch.equal(head_from_released(state, 4, (4, 4))(images).logits, wanted)


def test_names_that_are_right_stay_and_collisions_are_named() -> None:
    assert unwrapped({"model.weight": 1}, {"model.weight"}) == {"model.weight": 1}
    assert unwrapped({"module.a.module.b": 1, "a.model.c": 2, "module": 3}) == {"a.b": 1, "a.model.c": 2, "module": 3}
    checkpointed = {"head._checkpoint_wrapped_module.weight": 1, "head.decoder.0._fsdp_wrapped_module.bias": 2}
    assert unwrapped(checkpointed) == {"head.weight": 1, "head.decoder.0.bias": 2}
    with pytest.raises(ValueError, match="several keys are weight"):
        unwrapped({"module.weight": 1, "_orig_mod.weight": 2})


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-lfs pointer"),
        ("<html><body>404</body></html>", "web page"),
        ("\ufeff\n<!DOCTYPE HTML>\n", "web page"),
        ("<!-- moved --><html></html>", "web page"),
        ('{"error": "not found"}\n', """a text, not a checkpoint: it begins with '{"error": """),
        ("", "an empty file"),
    ],
)
def test_what_is_no_checkpoint_is_named(
    tmp_path: Path, text: str, said: str, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path)
    with pytest.raises(ValueError, match=said):
        load_released_checkpoint(path)
    assert main(["eval", str(path)]) == 2
    err = capsys.readouterr().err
    assert said in err and str(path) in err and err.count("\n") == 1
