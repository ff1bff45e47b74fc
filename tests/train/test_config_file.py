"""Config files as people write them: words that YAML takes for something else, empty sections, other encodings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

for needed in ("jsonargparse", "yaml", "tqdm"):
    pytest.importorskip(needed)

from sadcl.study.config import StudyConfig, parse_study  # noqa: E402
from sadcl.train.config import TrainConfig, parse_config  # noqa: E402


def parsed(folder: Path, text: str | bytes, *more: str) -> TrainConfig:
    (folder / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    return parse_config(["--config", str(folder / "c.yaml"), *more])[0]


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        *((f"amp: {word}", "amp", "off") for word in ("off", "no", "false", "Off", "OFF", "'off'", '"off"')),
        ("amp: bf16", "amp", "bf16"),
        ("model: {frozen: none}", "model.frozen", "none"),
        *((f"output: {word}", "output", word) for word in ("007", "1e3", "2024-01-05", "off", "null", "12:30", "0x1f")),
        ("data: {root: 2014}", "data.root", "2014"),
        ("data: {root: ~}", "data.root", None),
        ("data:\n  root: null", "data.root", None),
        ("data: {empty_images: null}", "data.empty_images", None),
        ("control: no", "control", False),
        ("control: on", "control", True),
        ("model: {pretrained: yes}", "model.pretrained", True),
        ("model: {pretrained: weights.pt}", "model.pretrained", "weights.pt"),
        ("step1: {learning_rate: 5e-5}", "step1.learning_rate", 5e-5),
        ("step1: &s {epochs: 3, schedule: cosine}\nstep2: {<<: *s, epochs: 4}", "step2.schedule", "cosine"),
    ],
)  # fmt: skip
def test_values_are_what_was_meant(tmp_path: Path, text: str, key: str, expected: Any) -> None:
    value: Any = parsed(tmp_path, text)
    for part in key.split("."):
        value = getattr(value, part)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "---\n", "# nothing\n", "{}", "null", "step1:\n", "step1:\nstep2: ~\ndata:\n", "step1:\n  augment:\n"],
)
def test_nothing_given_changes_nothing(tmp_path: Path, text: str) -> None:
    assert parsed(tmp_path, text) == TrainConfig()
    assert parsed(tmp_path, text, "--seed", "4").seed == 4


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_encodings_and_line_ends(tmp_path: Path, encoding: str, end: str) -> None:
    text = end.join(["output: läufe/é", "step1:", "  epochs: 3", ""])
    config = parsed(tmp_path, text.encode(encoding))
    assert config.output == "läufe/é" and config.step1.epochs == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("step1:\n\tepochs: 3\n", "c.yaml: line 2, column 1"),
        ("step1: {epochs: 3\n", "c.yaml: line"),
        ("- a\n- b\n", "c.yaml: expected lines of `key: value`, got a seq"),
        ("hello", "c.yaml: expected lines of `key: value`, got a str"),
        ("seed: 1\nstep1: {epochs: 3}\nseed: 2\n", "c.yaml: line 3: seed stands there twice"),
        ("data:\n  root: a\n  root: b\n", "c.yaml: line 3: root stands there twice"),
        ("data: 5\n", "c.yaml: line 1: expected keys with values, got '5'"),
        ("seed: 1\nstep1: []\n", "c.yaml: line 2: expected keys with values, got 'nothing'"),
        ("model: ''\n", "c.yaml: line 1: expected keys with values"),
        ("step1: {learning_rate: .inf}", "step1.learning_rate: expected a number > 0, got inf"),
        ("step2: {weight_decay: -1}", "step2.weight_decay: expected 0 or more, got -1"),
        ("amp: on", "amp"),
        ("amp: yes", "amp"),
        ("step1: {epochs: 2.5}", "epochs"),
        (b"output: \xff\xfe\xfa", "c.yaml: "),
    ],
)
def test_what_cannot_be_meant_is_named(
    tmp_path: Path, text: str | bytes, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(tmp_path, text)
    assert stopped.value.code == 2
    assert named in capsys.readouterr().err.partition("error:")[2]


def test_written_config_reads_back(tmp_path: Path) -> None:
    config = TrainConfig(output="1e3", amp="off")
    config.data.root = "0123"
    assert parsed(tmp_path, config.as_yaml()) == config


def test_files_in_their_order_and_with_an_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("seed: 1\nbatch_size: 3\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    config = parse_config([f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml", "--step1.epochs", "7"])[0]
    assert (config.seed, config.batch_size, config.step1.epochs) == (2, 3, 7)


def test_study_files_too(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("output: 007\nfrozen: {arms: [sarl, all-paper], step1: }\nfinetuned:\n")
    config = parse_study(["--config", str(tmp_path / "c.yaml")])[0]
    assert config.output == "007" and config.frozen.arms == ["sarl", "all-paper"]
    assert config.frozen.step1 == StudyConfig().frozen.step1 and config.finetuned == StudyConfig().finetuned
