"""``sadcl predict``: files, folders, stdin; what cannot be read is named and the rest predicted."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from sadcl.cli import main  # noqa: E402
from sadcl.commands.predict import find_pictures  # noqa: E402


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> str:
    """A checkpoint that has left the folder it was trained in."""
    (tmp_path / "moved.pt").write_bytes((trained / "run" / "step2.pt").read_bytes())
    return str(tmp_path / "moved.pt")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Pictures, a broken one, and what is no picture, in folders with names people use."""
    folder = tmp_path / "my pictures"
    (folder / "été" / "deep").mkdir(parents=True)
    (folder / ".cache").mkdir()
    Image.new("L", (90, 70), 80).save(folder / "gray photo.jpg")
    Image.new("CMYK", (30, 90), (0, 200, 200, 0)).save(folder / "été" / "Ünï & <b>.JPEG")
    Image.new("P", (50, 50), 3).save(folder / "été" / "deep" / "gray photo.png")
    (folder / "été" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    Image.new("RGB", (9, 9)).save(folder / ".cache" / "hidden.png")
    Image.new("RGB", (9, 9)).save(folder / "._junk.png")
    (folder / "notes.txt").write_text("no picture")
    return folder


def lines(capsys: pytest.CaptureFixture[str]) -> tuple[list[dict[str, Any]], str]:
    captured = capsys.readouterr()
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_folder_is_searched_and_the_broken_picture_named(
    checkpoint: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = tmp_path / "shown"
    assert main(["predict", checkpoint, str(tree), "--json", "--batch-size", "2", "--output", str(shown)]) == 1
    entries, err = lines(capsys)
    names = [os.path.relpath(entry["image"], tree) for entry in entries]
    assert names == ["gray photo.jpg", "été/cut.png", "été/Ünï & <b>.JPEG", "été/deep/gray photo.png"]
    assert "cannot" in entries[1]["error"] or "not a picture" in entries[1]["error"]
    assert f"{tree / 'été' / 'cut.png'}: {entries[1]['error']}" in err and "1 of 4 pictures" in err
    for entry in entries[:1] + entries[2:]:
        assert set(entry["top"]) == {"green", "red"} and all(0 <= p <= 1 for p in entry["top"].values())
        assert all(p > 0.5 for p in entry["labels"].values())
        with Image.open(entry["overlay"]) as overlay:
            assert min(overlay.size) > 100
    assert len({entry["overlay"] for entry in entries if "overlay" in entry}) == 3, "two pictures share a name"


def test_one_at_a_time_is_the_same(checkpoint: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", checkpoint, str(tree), "--json"])
    together, _ = lines(capsys)
    main(["predict", checkpoint, str(tree), "--json", "--batch-size", "1"])
    alone, _ = lines(capsys)
    for one, other in zip(together, alone, strict=True):
        assert one["image"] == other["image"]
        assert one.get("top") == pytest.approx(other.get("top"), abs=2e-4) or "error" in one


def test_stdin_lists_paths(
    checkpoint: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = [str(tree / "gray photo.jpg"), "", str(tree / "none.jpg"), str(tree / "été" / "deep")]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\r\n".join(listed).encode())))
    assert main(["predict", checkpoint, "-", "--json"]) == 1
    entries, err = lines(capsys)
    assert [Path(entry["image"]).name for entry in entries] == ["gray photo.jpg", "none.jpg", "gray photo.png"]
    assert entries[1]["error"] == "no such picture file" and "none.jpg: no such picture file" in err


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    given = os.fsencode(tmp_path) + b"/caf\xe9.png"
    (found,) = find_pictures(["-"], io.BytesIO(given + b"\n"))
    assert os.fsencode(found) == given


def test_table_for_people(
    checkpoint: str, tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tree)
    pictures = ["gray photo.jpg", "été/Ünï & <b>.JPEG"]
    assert main(["predict", checkpoint, *pictures, "--threshold", "0"]) == 0
    rows = capsys.readouterr().out.splitlines()
    wide = max(map(len, pictures))
    for row, picture in zip(rows, pictures, strict=True):
        assert row.startswith(f"{picture:{wide}}  ") and "green 0." in row and "red 0." in row
    assert main(["predict", checkpoint, pictures[0], "--threshold", "1"]) == 0
    assert "no label  (next: " in capsys.readouterr().out


def test_tuned_thresholds_come_from_the_checkpoint(
    checkpoint: str, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = str(tree / "gray photo.jpg")
    main(["predict", checkpoint, picture, "--json"])
    ((entry,), _) = lines(capsys)
    content = load_checkpoint(checkpoint)
    chances = [entry["top"][name] for name in content["classes"]]
    own = str(tmp_path / "own.pt")
    save_checkpoint(Path(own), {**content, "thresholds": [chances[0] - 0.01, chances[1] + 0.01]})
    assert main(["predict", own, picture, "--json", "--thresholds", "tuned"]) == 0
    ((entry,), _) = lines(capsys)
    assert set(entry["labels"]) == {content["classes"][0]}
    save_checkpoint(Path(own), {**content, "thresholds": None})
    assert main(["predict", own, picture, "--thresholds", "tuned"]) == 2
    assert "holds no tuned ones" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["predict", own, picture, "--threshold", "1.5"])
    assert "expected a probability" in capsys.readouterr().err


def test_reader_that_leaves_is_no_traceback(
    checkpoint: str, trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``sadcl predict ... | head``."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as gone, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", gone)
        assert main(["predict", checkpoint, str(trained), "--json"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sadcl predict: passed over")


def test_every_suffix_that_pillow_reads_is_found_and_the_rest_counted(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    made = {
        "a.jfif": "JPEG",
        "b.JPE": "JPEG",
        "c.tga": "TGA",
        "d.apng": "PNG",
        "e.ico": "ICO",
        "f.dib": "DIB",
        "g.png": "PNG",
    }
    for name, kind in made.items():
        Image.new("RGB", (32, 32)).save(folder / name, kind)
    for name in ("notes.txt", "more.TXT", "README", "h.jpg.part", ".hidden", "film.mpg"):
        (folder / name).write_bytes(b"x")
    assert main(["predict", checkpoint, str(folder), "--json"]) == 0
    entries, err = lines(capsys)
    assert [Path(entry["image"]).name for entry in entries] == list(made)
    assert "passed over, no pictures: 5 files (.txt 2, " in err
    assert all(f"{kind} 1" in err for kind in ("no suffix", ".part", ".mpg"))
    (passed_over := Counter[str]()).update([])
    assert list(find_pictures([str(folder / "README")], io.BytesIO(), passed_over)) == [str(folder / "README")]
    assert not passed_over, "what is named is not passed over"


def test_a_byte_order_mark_on_stdin(tmp_path: Path) -> None:
    listed = b"\xef\xbb\xbf" + os.fsencode(tmp_path / "a.png") + b"\r\n"
    assert list(find_pictures(["-"], io.BytesIO(listed))) == [str(tmp_path / "a.png")]
