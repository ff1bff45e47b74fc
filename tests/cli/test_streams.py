"""Consoles that are not there or know few letters, Ctrl-C in the middle of a file, folders that are none."""

from __future__ import annotations

import io
import os
import signal
import stat
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml", "safetensors"):
    pytest.importorskip(needed)

import processes  # noqa: E402

import sadcl.checkpoint  # noqa: E402
from sadcl.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.commands.predict import find_pictures  # noqa: E402
from sadcl.commands.train import train  # noqa: E402
from sadcl.train.config import parse_config  # noqa: E402
from sadcl.train.console import say  # noqa: E402
from sadcl.train.lock import FolderInUse, locked  # noqa: E402

# -- consoles --


def console(encoding: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)


@pytest.fixture
def foreign(trained: Path, tmp_path: Path) -> Path:
    """A checkpoint, a list and a picture with names that few encodings know."""
    save_checkpoint(tmp_path / "猫.pt", {**load_checkpoint(trained / "run" / "step2.pt"), "classes": ["grün", "猫"]})
    (tmp_path / "图.png").write_bytes((trained / "0.png").read_bytes())
    (tmp_path / "list.csv").write_text("图.png,猫;grün\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_letters_that_the_console_lacks_stop_no_command(
    foreign: Path, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, listed = str(foreign / "猫.pt"), str(foreign / "list.csv")
    dry = ["--dry-run", "--data.source=csv", f"--data.train_csv={listed}", f"--data.val_csv={listed}"]
    tiny = ["--model.backbone=timm:test_resnet", "--model.pretrained=false"]
    for arguments, code in (
        (["predict", checkpoint, str(foreign / "图.png"), "--threshold", "0"], 0),
        (["predict", checkpoint, str(foreign / "图.png"), "--json"], 0),
        (["predict", checkpoint, str(foreign / "没有.png")], 1),
        (["train", *dry, *tiny], 0),
    ):
        out, err = console(encoding), console(encoding)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            assert main(arguments) == code, (arguments, err.buffer.getvalue())  # type: ignore[attr-defined]
        said = out.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
        if code == 0:
            assert ("猫" if encoding == "utf-8" and "--json" not in arguments else "\\u732b") in said
        assert out.errors == err.errors == "strict", "the program's own streams are as they were"


def test_lines_of_a_run_stop_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    out = console("ascii")
    monkeypatch.setattr(sys, "stdout", out)
    say("label 猫 a")
    assert out.buffer.getvalue() == b"label \\u732b a\n"  # type: ignore[attr-defined]
    monkeypatch.setattr(sys, "stdout", None)
    say("nobody hears it")


def test_without_a_console_a_run_is_the_same(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--config", str(trained / "config.yaml"), "--output"]
    checkpoint = str(trained / "run" / "step2.pt")
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    train(parse_config([*arguments, str(tmp_path / "a")])[0])  # as a program calls it
    assert main(["eval", checkpoint]) == main(["predict", checkpoint, str(trained / "0.png")]) == 0
    assert main(["predict", checkpoint, "-"]) == main(["predict", checkpoint, str(tmp_path)]) == 2
    assert sys.stdout is None and sys.stderr is None
    model, expected = (load_checkpoint(folder / "step2.pt")["model"] for folder in (tmp_path / "a", trained / "run"))
    assert all(torch.equal(value, expected[name]) for name, value in model.items())


@pytest.mark.parametrize(
    "text",
    [
        b"a.png\r\n\xc3\xa9.png\n",
        "\ufeffa.png\né.png\n".encode(),
        "a.png\r\né.png".encode("utf-16"),
        b"\n-\na.png\n\xc3\xa9.png",
    ],
)
def test_lists_on_stdin(text: bytes) -> None:
    assert list(find_pictures(["x.png", "-"], io.BytesIO(text))) == ["x.png", "a.png", "é.png"]


# -- Ctrl-C --


def interrupt(at: int) -> Callable[..., Any]:
    """A function's stand-in: the ``at``-th call meets Ctrl-C."""
    left = [at]

    def called(real: Callable[..., Any], *args: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*args)

    return called


@pytest.mark.parametrize("at", [1, 2, 5, 12])
def test_interrupted_checkpoint_is_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """torch's writer makes an error of its own out of what stops it."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"weights": torch.zeros(5), "more": [torch.ones(3)]})
    real, called = sadcl.checkpoint._Hashed.write, interrupt(at)
    monkeypatch.setattr(sadcl.checkpoint._Hashed, "write", lambda self, data: called(real, self, data))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, {"weights": torch.ones(5), "more": [torch.ones(3)]})
    assert not load_checkpoint(path)["weights"].any()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "name", ["os.fsync", "os.replace", "sadcl.commands.train.Run", "sadcl.train.data.cached_features"]
)
def test_interrupted_run_says_so(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise RuntimeError("worker exited unexpectedly") from error

    monkeypatch.setattr(name, stopped)
    assert main(["train", "--config", str(trained / "config.yaml"), "--output", str(tmp_path / "run")]) == 130
    err = capsys.readouterr().err
    assert err.strip().splitlines()[-1] == "sadcl train: interrupted" and "Traceback" not in err
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name.endswith(".draft")]


def signalled(number: int, arguments: list[str]) -> int:
    """The command; a signal comes in the middle of its third checkpoint, when last.pt is there already."""
    real, files, writes = sadcl.checkpoint._Hashed.write, set(), [0]

    def write(self: Any, data: Any) -> int:
        files.add(id(self.digest))
        kept.append(self.digest)  # its number is not given to another
        writes[0] += len(files) == 3
        if writes[0] == 10:
            os.kill(os.getpid(), number)
        return real(self, data)

    kept: list[Any] = []
    sadcl.checkpoint._Hashed.write = write  # type: ignore[method-assign]
    return main(arguments)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, -15), (signal.SIGHUP, -1), (signal.SIGINT, 130)])
def test_signal_in_the_middle_of_a_file(trained: Path, tmp_path: Path, number: int, code: int) -> None:
    config = parse_config(["--config", str(trained / "config.yaml"), "--output", str(tmp_path / "run")])[0]
    config.step1.epochs = 50
    assert processes.run(config, function=partial(signalled, number)) == [code], processes.said(config)
    assert "sadcl train: interrupted" in processes.said(config) and "Traceback" not in processes.said(config)
    assert not list((tmp_path / "run").glob(".*")), "half-written"
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] >= 2


@pytest.mark.parametrize(("kind", "name"), [("safetensors", "os.fsync"), ("onnx", "sadcl.commands.export._compare")])
def test_interrupted_export_leaves_the_old_file(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnx")
        monkeypatch.setattr("sadcl.commands.export._trace", lambda *_: None)
        monkeypatch.setattr("sadcl.commands.export._write_onnx", lambda program, path, facts: path.write_bytes(b"new"))
        monkeypatch.setattr("sadcl.commands.export._runner", lambda *_: None)
    path = tmp_path / f"model.{kind}"
    path.write_bytes(b"old")
    monkeypatch.setattr(name, lambda *_: interrupt(1)(print))
    assert main(["export", str(trained / "run" / "step2.pt"), "--format", kind, "--output", str(path)]) == 130
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


# -- folders --


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda path: path.symlink_to(path.parent / "scratch" / "run"), "a link to "),
        (lambda path: path.write_text(""), "a file, expected a folder"),
        (lambda path: path.symlink_to(path), "a link to "),
    ],
)
@pytest.mark.parametrize("below", ["", "deeper"])
def test_output_that_cannot_be_a_folder_is_named(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    made: Callable[[Path], None],
    said: str,
    below: str,
) -> None:
    made(tmp_path / "out")
    output = str(tmp_path / "out" / below)
    assert main(["train", "--config", str(trained / "config.yaml"), "--output", output]) == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'out'}: {said}" in err and err.count("\n") == 1


def test_link_to_a_folder_is_one(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "near").symlink_to(tmp_path / "far")
    with locked(tmp_path / "near"):
        assert (tmp_path / "far" / "lock").exists()


def refuse_others(monkeypatch: pytest.MonkeyPatch, lock: Path, allowed: tuple[int, ...]) -> None:
    """Let the lock file that is there be another user's: to be opened in these ways alone."""
    real, theirs = os.open, os.stat(lock).st_ino

    def opened(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        same = os.path.exists(path) and os.stat(path).st_ino == theirs
        if same and (flags & (os.O_RDONLY | os.O_WRONLY | os.O_RDWR)) not in allowed:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", opened)


def test_left_over_lock_of_another_user_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "lock"
    lock.write_text("process 1 on elsewhere\n")
    refuse_others(monkeypatch, lock, (os.O_RDONLY,))
    with locked(tmp_path):
        assert f"process {os.getpid()} on " in lock.read_text()
    assert not lock.exists()
    lock.write_text("process 1 on elsewhere\n")
    refuse_others(monkeypatch, lock, (os.O_RDONLY,))
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(1, "not yours")))
    with locked(tmp_path):  # a folder in which nobody removes what is another's
        assert lock.read_text() == "process 1 on elsewhere\n"


def test_lock_that_may_not_even_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lock").write_text("")
    refuse_others(monkeypatch, tmp_path / "lock", ())
    with pytest.raises(FolderInUse, match="lock: a lock file of another user"), locked(tmp_path):
        pass


def test_lock_of_another_user_at_work_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:  # POSIX's locks are a process's own
            refuse_others(monkeypatch, tmp_path / "lock", (os.O_RDONLY,))
            try:
                with locked(tmp_path):
                    os._exit(1)
            except FolderInUse as error:
                os._exit(0 if f"in use by process {os.getppid()} on " in str(error) else 2)
            os._exit(3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_folder_that_may_not_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Any, *_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    assert stat.S_ISDIR(tmp_path.stat().st_mode)
    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(ValueError, match="nothing can be written into this folder"), locked(tmp_path):
        pass
