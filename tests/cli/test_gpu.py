"""``make gpu``: its gate sees what is wrong, a stopped run goes on, and the table says what was measured."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import device, gpu, gpu_table
from benchmarks.gpu import Step
from sadcl.ops._library import OPS

CPU = torch.device("cpu")


def _of_torch(monkeypatch: pytest.MonkeyPatch, name: str, spoil: float) -> None:
    """Let portable torch stand in for ``name``'s Triton kernels, its first result off by a factor."""
    op = OPS[name]
    right = op.runs["torch"]

    def wrong(x: Any) -> Any:
        out = right(x)
        return out._replace(**{op.outputs._fields[0]: out[0] * spoil})

    monkeypatch.setitem(op.runs, "triton", wrong)
    monkeypatch.setattr("sadcl.ops._library.OPS", {name: op})
    monkeypatch.setattr(gpu, "OPS", {name: op})
    # Past the dispatcher, whose table of implementations is not op.runs; gradients are the kernels' own tests'.
    monkeypatch.setattr(type(op), "__call__", lambda self, inputs, backend: self.run(inputs, backend))


@pytest.mark.parametrize("spoil", [1.0, 1.0 + 1e-4])
def test_gate_sees_a_fault_of_four_digits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], spoil: float
) -> None:
    _of_torch(monkeypatch, "compact", 1.0)
    assert gpu.gate(torch.float32, CPU) == 0
    _of_torch(monkeypatch, "zlpr", spoil)
    monkeypatch.setattr(torch.autograd, "grad", lambda total, leaves, **_: [torch.zeros_like(x) for x in leaves])
    assert gpu.gate(torch.float32, CPU) == (0 if spoil == 1.0 else 1)
    shown = capsys.readouterr().out
    assert "right compact by triton, example 0" in shown and (("WRONG zlpr" in shown) == (spoil != 1.0))


def test_a_run_goes_on_where_it_was(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()

    def command(name: str, code: str) -> list[str]:
        return [sys.executable, "-c", f"open({str(marks / name)!r}, 'a').write('x'); {code}"]

    def some(code: str) -> list[Step]:
        return [Step("first", command("first", "")), Step("second", command("second", code)), Step("never", [], "why")]

    output = tmp_path / "gpu.json"
    arguments = ["--dry", "--output", str(output)]
    monkeypatch.setattr(gpu, "steps", lambda *_: iter(some("print('no good'); raise SystemExit(3)")))
    assert gpu.main(arguments) == 1
    assert "second failed:\nno good" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "steps", lambda *_: iter(some("")))
    assert gpu.main(arguments) == 0
    states = {name: step["state"] for name, step in json.loads(output.read_text())["steps"].items()}
    assert states == {"first": "passed", "second": "passed", "never": "left out"}
    assert (marks / "first").read_text() == "x" and (marks / "second").read_text() == "xx"
    assert gpu.main([*arguments, "--minutes", "0"]) == 0  # nothing is left


def test_what_ran_out_of_time_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = Step("slow", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(gpu, "steps", lambda *_: iter([slow, Step("after", [sys.executable, "-c", ""])]))
    assert gpu.main(["--dry", "--output", str(tmp_path / "gpu.json"), "--minutes", "0.1"]) == 1
    steps = json.loads((tmp_path / "gpu.json").read_text())["steps"]
    assert steps["slow"]["state"] == "out of time" and "after" not in steps


def test_what_ran_out_of_time_comes_last(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And with it ends what it started, which would keep the GPU."""
    child, end = "import time; time.sleep(3); open('alive', 'w')", "import time; time.sleep(60)"
    start = (
        f"import os, subprocess, sys; os.chdir({str(tmp_path)!r}); subprocess.Popen([sys.executable, '-c', {child!r}])"
    )
    code = f"{start}; {end}"
    slow, after = Step("slow", [sys.executable, "-c", code], share=0.1), Step("after", [sys.executable, "-c", ""])
    monkeypatch.setattr(gpu, "steps", lambda *_: iter([slow, after]))
    output = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--output", str(output), "--minutes", "0.2"]) == 1
    states = {name: step["state"] for name, step in json.loads(output.read_text())["steps"].items()}
    assert states == {"slow": "out of time", "after": "passed"}
    asked: list[str] = []

    def run(step: Step, *_: Any) -> dict[str, Any]:
        asked.append(step.name)
        return {"state": "passed", "seconds": 0.0, "output": ""}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "steps", lambda *_: iter([slow, Step("other", [])]))
    assert gpu.main(["--dry", "--output", str(output)]) == 0
    assert asked == ["other", "slow"]
    time.sleep(3)
    assert not (tmp_path / "alive").exists()


def test_nothing_runs_where_nothing_was_built_and_other_sources_begin_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = Step("build", [sys.executable, "-c", "raise SystemExit(1)"])
    monkeypatch.setattr(gpu, "steps", lambda *_: iter([build, Step("after", [sys.executable, "-c", ""])]))
    output = tmp_path / "gpu.json"
    assert gpu.main(["--dry", "--output", str(output)]) == 1
    content = json.loads(output.read_text())
    assert [*content["steps"]] == ["build"]
    content["steps"]["after"] = {"state": "passed"}
    content["versions"]["sources"] = "others"
    output.write_text(json.dumps(content))
    assert gpu.main(["--dry", "--output", str(output)]) == 1
    assert [*json.loads(output.read_text())["steps"]] == ["build"]


def test_a_compiler_that_gives_up_on_one_op_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class CompilationError(Exception):
        pass

    def give_up(x: Any) -> Any:
        raise CompilationError("no registers left")

    _of_torch(monkeypatch, "compact", 1.0)
    monkeypatch.setitem(OPS["compact"].runs, "triton", give_up)
    count = gpu.gate(torch.float32, CPU)
    shown = capsys.readouterr().out.splitlines()
    assert count > 1 and shown[-1].startswith("WRONG compact by triton, example ")
    assert shown[-1].endswith("CompilationError: no registers left")


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit, match="torch finds no GPU here; DRY=1"):
        gpu.main([])


def test_table_is_of_a_gpu_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"op": "pscl", "shape": "[32, 80, 1024]", "backend": "", "peak_mb": 11.0, "error": None}
    content = {
        "dry": False, "gpu": "NVIDIA H100 80GB, sm_90", "versions": {"torch": "2.14"},
        "steps": {"gate float32": {"state": "passed"}, "time pscl": {"state": "passed"}},
        "rows": [{**row, "entry": "sadcl", "median_ms": 0.05}, {**row, "entry": "sadcl torch", "median_ms": 0.01},
                 {**row, "entry": "vectorised", "median_ms": 0.4}, {**row, "entry": "loop", "median_ms": 9.0}],
    }  # fmt: skip
    text = gpu_table.table(content)
    assert "| pscl | [32, 80, 1024] | 0.050 ms | vectorised: 0.400 ms | 8.00x | 11, 11 |" in text
    assert "gate float32: passed" in text and "time pscl" not in text and "% reached" in text
    for wrong in ({**content, "dry": True}, {**content, "rows": []}):
        (tmp_path / "gpu.json").write_text(json.dumps(wrong))
        with pytest.raises(SystemExit, match=r"gpu\.json: expected what make gpu timed"):
            gpu_table.main([str(tmp_path / "gpu.json")])
    (tmp_path / "gpu.json").write_text(json.dumps(content))
    gpu_table.main([str(tmp_path / "gpu.json")])
    assert "vectorised" in capsys.readouterr().out


def test_steps_are_all_there() -> None:
    names = [step.name for step in gpu.steps(True, [], Path("rows"))]
    assert names[0] == "build" and {"gate float32", "gate bfloat16", "gate float16", *gpu.SANITIZERS} <= set(names)
    timed = {name.removeprefix("time ") for name in names if name.startswith("time ")}
    assert {"sscl", "pscl", "asl", "mlc", "label_attention", "bank_update"} <= timed


@pytest.mark.parametrize("before", [None, "torch"])
def test_an_entry_is_timed_by_the_backend_that_it_names(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    if before is None:
        monkeypatch.delenv("SADCL_BACKEND", raising=False)
    else:
        monkeypatch.setenv("SADCL_BACKEND", before)
    assert device._by("cuda", lambda suffix: os.environ["SADCL_BACKEND"] + suffix, "!") == "cuda!"
    assert os.environ.get("SADCL_BACKEND") == before
