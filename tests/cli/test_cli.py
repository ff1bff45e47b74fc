"""The command line: what it prints, its exit codes, one clear line for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sadcl
from sadcl.cli import main
from tests import forks


def test_doctor_names_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name, info in sadcl.backends().items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert (" works " in line) == info.available
        assert (info.detail if info.available else info.reason) in line
    assert f"threads: {torch.get_num_threads()}" in out


def test_doctor_needs_torch_alone() -> None:
    """No extra is imported: the command exists to say what is missing."""
    code = (
        "import sys\n"
        "for name in ('timm', 'torchvision', 'matplotlib', 'jsonargparse', 'tqdm', 'PIL', 'sklearn', 'yaml'):\n"
        "    sys.modules[name] = None\n"
        "from sadcl.cli import main\n"
        "assert main(['doctor']) == 0\n"
        "sys.exit(main(['train', '--seed', '1']))\n"
    )
    ran = forks.run(code)
    assert ran.returncode == 2, ran.stderr
    assert "sadcl[train]" in ran.stderr and "Traceback" not in ran.stderr


def test_help_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert all(name in capsys.readouterr().out for name in ("train",))
    assert main([]) == 2
    assert main(["dance"]) == 2
    assert "unknown command 'dance'" in capsys.readouterr().err
    assert main(["--version"]) == 0
    assert sadcl.__version__ in capsys.readouterr().out


def test_eval_measures_the_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = json.loads((trained / "run" / "metrics.json").read_text())
    capsys.readouterr()
    assert main(["eval", str(trained / "run" / "step2.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["mAP"] == pytest.approx(recorded["mAP"], abs=1e-9)
    assert main(["eval", str(trained / "run" / "step1.pt"), "--csv", str(trained / "list.csv")]) == 0
    out = capsys.readouterr().out
    assert "mAP" in out and "voc_area" in out


def test_eval_at_the_tuned_thresholds(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from sadcl.checkpoint import load_checkpoint

    checkpoint = str(trained / "run" / "step1.pt")
    capsys.readouterr()
    main(["eval", checkpoint, "--json"])
    plain = json.loads(capsys.readouterr().out)
    assert main(["eval", checkpoint, "--json", "--thresholds", "tuned"]) == 0
    tuned = json.loads(capsys.readouterr().out)
    thresholds = load_checkpoint(checkpoint)["thresholds"]
    assert tuned["protocol"]["threshold"] == pytest.approx(thresholds, abs=1e-6) and len(thresholds) == 2
    assert tuned["CF1"] >= plain["CF1"] and tuned["mAP"] == plain["mAP"]
    assert "optimistic" in tuned["images"] and "optimistic" not in plain["images"]
    main(["eval", checkpoint, "--csv", str(trained / "list.csv"), "--threshold", "tuned"])
    assert "optimistic" not in capsys.readouterr().out


def test_mistakes_end_in_one_line_and_code_2(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(trained / "run" / "step2.pt")
    picture = trained / "0.png"
    cut_checkpoint = tmp_path / "cut.pt"
    (tmp_path / "empty").mkdir()
    cut_checkpoint.write_bytes(Path(checkpoint).read_bytes()[:5000])
    missing = str(tmp_path / "none")
    cases = [
        (["predict", checkpoint, str(tmp_path / "empty")], "no pictures"),
        (["predict", checkpoint, str(picture), "--device", "abacus"], "abacus"),
        (["export", checkpoint, "--images", missing], missing),
        (["predict", str(cut_checkpoint), str(picture)], str(cut_checkpoint)),
        (["predict", missing, str(picture)], missing),
        (["eval", str(cut_checkpoint)], str(cut_checkpoint)),
        (["eval", checkpoint, "--csv", missing], missing),
    ]
    capsys.readouterr()
    for arguments, named in cases:
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert named in error and "error" in error
        assert "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_picture_that_breaks_in_the_middle_of_training_is_named(
    trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
) -> None:
    for path in trained.glob("*.png"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "list.csv").write_text((trained / "list.csv").read_text())
    (tmp_path / "5.png").write_bytes(b"\x89PNG but no more")
    lists = [f"--data.train_csv={tmp_path}/list.csv", f"--data.val_csv={tmp_path}/list.csv"]
    arguments = ["train", "--config", str(trained / "config.yaml"), *lists, "--output", str(tmp_path / "run")]
    assert main([*arguments, f"--data.workers={workers}"]) == 2
    error = capfd.readouterr().err
    assert f"sadcl train: error: {tmp_path / '5.png'}: " in error and "Traceback" not in error


def test_config_key_that_does_not_exist(tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    (tmp_path / "c.yaml").write_text("modle: {hidden_dim: 8}\n")
    module = "import runpy\nrunpy.run_module('sadcl.train', run_name='__main__', alter_sys=True)"
    ran = forks.run(module, "--config", str(tmp_path / "c.yaml"))
    assert ran.returncode == 2
    assert "modle" in ran.stderr and "Traceback" not in ran.stderr
