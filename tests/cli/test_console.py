"""Progress: a bar in a terminal, whole lines elsewhere."""

from __future__ import annotations

import io
import sys

import pytest

pytest.importorskip("tqdm")

from sadcl.train import console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def clock(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every look at the clock is so much later."""
    now = [0.0]

    def monotonic() -> float:
        now[0] += seconds
        return now[0]

    monkeypatch.setattr(console.time, "monotonic", monotonic)


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock(monkeypatch, 3.0)
    assert list(console.bar(range(12), desc="features, train", unit="batch")) == list(range(12))
    said = sys.stderr.getvalue()
    assert said.splitlines() == [
        "  features, train: batch 4 of 12, about 24 s left",
        "  features, train: batch 8 of 12, about 12 s left",
    ]
    assert "\r" not in said and "\x1b" not in said


def test_lines_of_steps_that_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock(monkeypatch, 10.0)
    with console.bar(total=6, initial=4, desc="step 1", unit="step") as shown:
        for loss in (3.0, 2.0):
            shown.set_postfix(loss=f"{loss:.1f}", refresh=False)
            shown.update()
    assert sys.stderr.getvalue() == "  step 1: step 5 of 6, about 10 s left, loss 3.0\n"


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    clock(monkeypatch, 0.01)
    assert sum(console.bar(range(100), desc="x", unit="step")) == 4950
    assert sys.stderr.getvalue() == ""


def test_a_stream_may_have_write_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Stream:
        write = staticmethod(said.append)

    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Stream())
    clock(monkeypatch, 6.0)
    assert list(console.bar(range(4), desc="x", unit="step")) == [0, 1, 2, 3]
    console.say("done")
    assert "".join(said) == "  x: step 2 of 4, about 12 s left\ndone\n"


def test_a_bar_in_a_terminal_and_nothing_without_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(console.bar(range(3), desc="x", unit="step", mininterval=0.0)) == [0, 1, 2]
    assert "\r" in sys.stderr.getvalue()
    monkeypatch.setattr(sys, "stderr", None)
    assert list(console.bar(range(3), desc="x", unit="step")) == [0, 1, 2]
