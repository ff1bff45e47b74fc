"""Every example runs, from another folder, and says what it promises; most with fewer steps than by default."""

from __future__ import annotations

import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SHORT = {
    "one_import/before.py": ["4"],
    "one_import/after.py": ["4"],
    "yeast.py": ["--epochs", "20", "--weightings", "mulsupcon"],
    "label_attention.py": ["--epochs", "1", "--pictures", "64"],
    "text_queries.py": ["--epochs", "5", "--pictures", "400"],
    "momentum_queue.py": ["--steps", "60"],
    "two_processes.py": [],
    "thresholds_and_export.py": ["--epochs", "1"],
}
# What `python PATH ARGUMENTS` does.
AS_A_SCRIPT = """
import os, runpy, sys
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="away from the sources")


def run(name: str, folder: Path, *arguments: str) -> str:
    """What an example prints, run in ``folder``."""
    path, given = str(EXAMPLES / name), arguments or SHORT[name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if name == "two_processes.py":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master-port=0"]
        command += ["--standalone", path, *given]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    else:
        done = forks.run(AS_A_SCRIPT, path, *given, environment=environment, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_all_examples_are_here() -> None:
    found = {str(path.relative_to(EXAMPLES)) for path in EXAMPLES.rglob("*.py")}
    assert found - {"generated.py", "one_import/plain_loss.py"} == set(SHORT)


def test_one_import_makes_the_difference(tmp_path: Path) -> None:
    texts = [(EXAMPLES / "one_import" / name).read_text().split('"""')[2] for name in ("before.py", "after.py")]
    pair = [[line for line in text.splitlines() if line] for text in texts]
    changed = [line for line in difflib.ndiff(*pair) if line[0] in "+-"]
    assert changed == ["- from plain_loss import SampleContrastiveLoss", "+ from sadcl import SampleContrastiveLoss"]
    printed = [run(f"one_import/{name}.py", tmp_path) for name in ("before", "after")]
    losses = [[float(value) for value in re.findall(r"loss (\S+)", text)] for text in printed]
    assert len(losses[0]) == 2
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    assert losses[0][1] < losses[0][0]


def test_notebook_runs() -> None:
    """Its cells in order, but for the one that installs."""
    notebook = json.loads((EXAMPLES / "one_import" / "one_import.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell for cell in cells if cell.startswith("%")] == ["%pip install -q sadcl"]
    names: dict[str, object] = {}
    for cell in cells[1:]:
        exec(compile(cell, "one_import.ipynb", "exec"), names)
    assert isinstance(names["difference"], float) and names["difference"] < 1e-3


def test_yeast(tmp_path: Path) -> None:
    """The generated table, and the same from a file."""
    printed = run("yeast.py", tmp_path)
    scores = {name: float(value) for name, value in re.findall(r"(\w[\w ]*): mAP (\S+)", printed)}
    assert scores.keys() == {"raw features", "mulsupcon"}
    assert scores["mulsupcon"] > scores["raw features"] + 0.02
    rows = [f"{i / 9:.3f},{-i}," + ",".join(["TRUE", "FALSE"][(i + c) % 2] for c in range(3)) for i in range(40)]
    (tmp_path / "own.csv").write_text("\n".join(["a,b,x,y,z", *rows]))
    printed = run("yeast.py", tmp_path, "--csv", "own.csv", "--labels", "3", "--epochs", "1", "--weightings", "overlap")
    assert printed.startswith("40 rows, 2 features, 3 labels, 1.5 labels a row")


def test_label_attention(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    printed = run("label_attention.py", tmp_path)
    assert 0.0 < float(re.search(r"mAP on held-out pictures: (\S+)", printed)[1]) <= 1.0  # type: ignore[index]
    assert "looked at most in row" in printed


def test_text_queries(tmp_path: Path) -> None:
    printed = run("text_queries.py", tmp_path)
    (unseen,) = re.findall(r"blue square: AP (\S+) \(chance (\S+)\)  <- not in any training picture", printed)
    assert float(unseen[0]) > float(unseen[1]) + 0.05
    assert len(printed.splitlines()) == 9


def test_momentum_queue(tmp_path: Path) -> None:
    losses = re.findall(r"loss (\S+), (\d+) keys", run("momentum_queue.py", tmp_path))
    assert losses[0] == ("0.0000", "32")
    assert losses[-1][1] == "512"


def test_two_processes(tmp_path: Path) -> None:
    """Rarely, on a loaded machine, torch aborts when Python has ended and all is done: then once more."""
    try:
        printed = run("two_processes.py", tmp_path)
    except AssertionError as error:
        if "terminate called without an active exception" not in str(error):
            raise
        printed = run("two_processes.py", tmp_path)
    assert "weights are the same in every process: True" in printed
    losses = [float(value) for value in re.findall(r"mean loss of 2 processes (\S+)", printed)]
    assert losses[-1] < losses[0]


def test_thresholds_and_export(tmp_path: Path) -> None:
    for needed in ("timm", "onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    printed = run("thresholds_and_export.py", tmp_path, "--epochs", "1", "--output", "model.onnx")
    assert printed.count("CF1") == 2 and printed.count("found [") == 2
    facts = json.loads((tmp_path / "model.onnx.json").read_text())
    assert len(facts["classes"]) == len(facts["thresholds"]["tuned"]) == 9
