"""``sadcl bench``: gate first, then times; JSON and table; what is wrong is named and not timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import device
from benchmarks.device import Workload, main, measure, table
from sadcl.testing import make_features
from tests import forks

CPU = torch.device("cpu")


def square(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(-1)


def test_what_is_wrong_is_not_timed() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    x = make_features(4, 5)
    entries = {
        "right": square,
        "wrong value": lambda x: square(x) + 1,
        "wrong gradient": lambda x: square(x.detach()) + 0 * x.sum(-1),
        "cannot run": broken,
        "sadcl": lambda x: (x * x).sum(-1),
    }
    rows = {r.entry: r for r in measure(Workload("square", "[4, 5]", (x,), 1, square, entries), CPU, rounds=2)}
    assert rows["right"].median_ms > 0 and rows["sadcl"].median_ms > 0 and rows["right"].error is None
    assert rows["sadcl"].backend == "cpp" and rows["right"].peak_mb is not None
    for name in ("wrong value", "wrong gradient", "cannot run"):
        assert rows[name].median_ms is None and rows[name].error, name
    assert "out of memory" in rows["cannot run"].error
    text = table(list(rows.values()))
    assert "| square | [4, 5] | cannot run | not timed: out of memory |" in text and "| sadcl |" in text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
def test_command_writes_json_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new folder" / "bench.json"
    options = ["--device", "cpu", "--quick", "--rounds", "1", "--ops", "bank_update", "label_attention"]
    assert main([*options, "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert {row["op"] for row in content["rows"]} == {"bank_update", "label_attention"}
    ours = [row for row in content["rows"] if row["entry"] == "sadcl"]
    assert len(ours) == 2 and all(row["median_ms"] > 0 and row["error"] is None for row in ours)
    assert content["about"]["torch"] == torch.__version__
    assert "| bank_update | [6, 8, 32] | sadcl |" in capsys.readouterr().out


def test_every_op_has_a_workload_with_ours_in_it() -> None:
    chosen = device.workloads(CPU, quick=True)
    assert {w.name for w in chosen} >= {"sscl", "pscl", "supcon", "label_attention", "bank_update"}  # see the registry
    for work in chosen:
        want = device.step(work, "oracle")()
        device.check(work, "sadcl", want)


def test_label_attention_is_timed_with_its_parameters_gradients() -> None:
    """What ``python -m benchmarks label_attention`` times: one definition of the work."""
    (work,) = (w for w in device.workloads(CPU, quick=True) if w.name == "label_attention")
    for name in (*work.entries, "oracle"):
        assert len(device.step(work, name)()) == 1 + 2 + 4, name  # value; query, memory; weights and biases


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--ops: expected some of sscl.*, got nothing"):
        main(["--device", "cpu", "--quick", "--ops", "nothing"])
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device cuda: torch finds no CUDA device"):
            main(["--device", "cuda"])
    module = "import runpy\nrunpy.run_module('sadcl.cli', run_name='__main__', alter_sys=True)"
    done = forks.run(module, "bench", cwd=tmp_path)
    assert done.returncode == 2 and "run this in a checkout's folder" in done.stderr
