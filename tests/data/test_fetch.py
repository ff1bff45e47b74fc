"""The demo's pictures where they cannot be fetched: it is said what is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("PIL")

from sadcl.data import fetch
from sadcl.data.sources import SourceNotFound


@pytest.fixture(autouse=True)
def nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any) -> None:
        raise SourceNotFound("none")

    monkeypatch.setattr(fetch, "find_source", none)


def test_without_apt_the_packages_and_the_way_around_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch.shutil, "which", lambda name: None)
    assert fetch.main([]) == fetch.EXIT_UNAVAILABLE
    said = capsys.readouterr().err
    assert said.startswith("no apt (apt-get and dpkg-deb) on this machine: ")
    for part in ("tuxpaint-stamps-default", "tuxpaint-data", "--data.root", "pip install 'sadcl[emoji]'"):
        assert part in said


def test_an_apt_that_fails_is_quoted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(command: list[str], **_: Any) -> None:
        raise subprocess.CalledProcessError(100, command)

    monkeypatch.setattr(fetch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(fetch.subprocess, "run", refused)
    assert fetch.main(["--into", str(tmp_path / "cache" / "tuxpaint")]) == fetch.EXIT_UNAVAILABLE
    said = capsys.readouterr().err
    assert "could not be fetched" in said and "exit status 100" in said and "tuxpaint-stamps-default" in said
    assert not list((tmp_path / "cache").iterdir())
