"""``python -m benchmarks``: floors, what is recorded, the page, and the comparison of two runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import compare, harness, report, results, targets
from benchmarks.__main__ import QUICK
from benchmarks.harness import Record, Row, Series, Timing
from benchmarks.results import Results

ROOT = Path(__file__).parents[2]


def made(times: dict[str, dict[str, list[float]]]) -> Results:
    rows = [
        Row(name, "about", {entry: Timing.of(s) for entry, s in entries.items()}, {"sadcl": 1.5}, 1e9, None, 0.5, "FMA")
        for name, entries in times.items()
    ]
    where = {"date": "2026-01-01T00:00+00:00", "commit": "abc", "sadcl": "0", "torch": "2", "processor": "<one & only>"}
    where |= {"threads": 2, "isa": "avx2", "fma_peak": 1e11, "copy_bandwidth": 1e10}
    return Results(where, rows, [Series("growth", "of it", ("N", "ms", "MB"), [(1, 2.0, 3.0), (2, 4.0, 3.0)])])


STEADY = {"a": {"sadcl": [1.0, 1.01, 0.99, 1.0, 1.0], "peer": [3.0, 3.02, 2.99, 3.0, 3.01]},
          "b": {"sadcl": [2.0, 2.01, 1.99, 2.0, 2.0], "peer": [5.0, 5.02, 4.99, 5.0, 5.01]},
          "c": {"sadcl": [4.0, 4.01, 3.99, 4.0, 4.0], "peer": [7.0, 7.02, 6.99, 7.0, 7.01]}}  # fmt: skip


def scaled(times: dict[str, dict[str, list[float]]], by: dict[tuple[str, str], float]) -> Results:
    return made({r: {e: [by.get((r, e), 1.0) * x for x in s] for e, s in es.items()} for r, es in times.items()})


def verdicts(before: Results, after: Results) -> dict[str, str]:
    return {change.row: change.verdict for change in compare.changes(before, after)}


def test_a_change_of_ours_is_seen_and_the_machines_is_not() -> None:
    same = {"a": "same", "b": "same", "c": "same"}
    assert verdicts(made(STEADY), made(STEADY)) == same
    everything = {(row, entry): 1.4 for row in STEADY for entry in STEADY[row]}
    assert verdicts(made(STEADY), scaled(STEADY, everything)) == same
    after = scaled(STEADY, {**everything, ("b", "sadcl"): 1.4 * 1.1, ("c", "sadcl"): 1.4 / 1.2})
    assert verdicts(made(STEADY), after) == {"a": "same", "b": "slower", "c": "faster"}
    assert verdicts(made(STEADY), scaled(STEADY, {("a", "sadcl"): 1.02})) == same  # below the threshold


def test_noise_widens_the_interval_until_nothing_is_claimed() -> None:
    noisy = {row: {e: [0.6 * s[0], s[0], 1.5 * s[0], 0.8 * s[0], 1.3 * s[0]] for e, s in es.items()}
             for row, es in STEADY.items()}  # fmt: skip
    assert verdicts(made(noisy), scaled(noisy, {("a", "sadcl"): 1.15})) == {"a": "same", "b": "same", "c": "same"}
    # Peers that moved apart say that single ratios of these two runs mean little.
    restless = {("a", "peer"): 1.5, ("b", "peer"): 1.0, ("c", "peer"): 0.7, ("a", "sadcl"): 1.15}
    assert verdicts(made(STEADY), scaled(STEADY, restless))["a"] == "same"


def test_command_ends_with_one_where_something_became_slower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, run in zip(paths, (made(STEADY), scaled(STEADY, {("b", "sadcl"): 1.3})), strict=True):
        results.save(Record(run.rows, run.series), path)
    assert compare.main([str(paths[0]), str(paths[0])]) == 0
    assert compare.main([str(path) for path in paths]) == 1
    shown = [line for line in capsys.readouterr().out.splitlines() if line.endswith(("same", "slower", "faster"))]
    assert shown[-3].startswith("b") and shown[-3].endswith("slower")


def test_what_is_saved_is_what_is_read(tmp_path: Path) -> None:
    run = made(STEADY)
    results.save(Record(run.rows, run.series), tmp_path / "deep" / "run.json")
    again = results.load(tmp_path / "deep" / "run.json")
    assert again.rows == run.rows and again.series == run.series
    content = json.loads((tmp_path / "deep" / "run.json").read_text())
    assert content["rows"][0]["timings"]["sadcl"]["samples"] == STEADY["a"]["sadcl"]
    for wrong in ("[]", "{}", "no json", json.dumps({**content, "format": 99})):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"wrong\.json: expected the JSON of python -m benchmarks"):
            results.load(tmp_path / "wrong.json")


def test_table_holds_ours_against_the_fastest_peer_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    linear = {"MKL": [10.0], "oneDNN": [8.0], "sadcl, auto": [1.0], "sadcl": [9.0]}
    run = made({"linear 2048 x 2048": linear, "unknown": {"peer": [3.0], "sadcl": [2.0]}})
    results.save(Record(run.rows, run.series), tmp_path / "run.json")
    targets.main([str(tmp_path / "run.json")])
    shown = capsys.readouterr().out
    assert "| linear layer, 2048 to 2048 | 9 ms | oneDNN: 8 ms | **0.89x** | 0.97x | 0.5 ms |" in shown
    assert shown.count("\n| ") == 2 and "Not in this run: asl, " in shown


def test_readmes_table_is_printed_and_its_picture_can_read_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {of.row: {"sadcl": [2.0], "sadcl torch": [4.0], **{key: [900.0] for key in of.naive},
                     **{name: [5.0 + i] for i, name in enumerate(of.best)}} for of in targets.README}  # fmt: skip
    run = made({**rows, "unknown": {"sadcl": [1.0]}})
    results.save(Record(run.rows, run.series), tmp_path / "run.json")
    targets.main([str(tmp_path / "run.json"), "--readme"])
    shown = capsys.readouterr().out
    assert "Not in this run" not in shown and shown.count("\n| ") == 1 + len(targets.README)
    coco = "(`bench_sscl coco`) | 2 ms | dense N x N: 900 ms, **450x** | compacted: 5 ms, **2.50x** | 0.5 ms |"
    assert coco in shown and '| ... `backend="torch"` | 4 ms |' in shown
    pictures = _pictures()
    drawn = pictures.ratios("## Speed\n\n" + shown[shown.index("| work") :] + "\n\n## Next")
    assert ("SSCL, coco", 2.5) in drawn and len(drawn) == sum(not of.work.startswith("...") for of in targets.README)


def _pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_pictures", ROOT / "docs" / "site" / "pictures.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_name_entries_that_the_benches_have() -> None:
    optional = {"pytorch-metric-learning", "scikit-learn", "timm", "torchmetrics"}
    made_of = {row: {name, *names} for row, name, names in (
        *((t.row, t.entry, (t.peer,) if isinstance(t.peer, str) else t.peer) for t in targets.TARGETS),
        *((of.row, of.entry, (*of.naive, *of.best)) for of in targets.README))}  # fmt: skip
    checked = 0
    for row, names in made_of.items():
        bench = importlib.import_module(f"benchmarks.bench_{row.split()[0]}")
        known = set(getattr(bench, "ENTRIES", getattr(bench, "NAMES", ())))
        if known and "float16" not in row:
            assert names <= known | optional, row
            checked += 1
    assert checked >= 10
    assert set(QUICK) >= {row.split()[0] for row in made_of}


def test_page_needs_nothing_else_and_shows_every_row(tmp_path: Path) -> None:
    run = made(STEADY)
    report.write(dataclasses.replace(run, rows=[*run.rows, dataclasses.replace(run.rows[0], name="alone", peak_mb={},
                 timings={"sadcl": run.rows[0].timings["sadcl"]}, floor_ms=None)]), tmp_path)  # fmt: skip
    text = (tmp_path / "report.html").read_text()
    assert "&lt;one &amp; only&gt;" in text and "http://" not in text and "https://" not in text
    for name in ("a", "b", "c", "alone", "growth", "overview"):
        assert f'<section id="{name}">' in text
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    report.write(Results(run.about, [], []), tmp_path / "empty")
    assert (tmp_path / "empty" / "report.html").is_file()


def test_compare_measures_the_floor_that_binds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "RECORD", Record(memory=True))
    monkeypatch.setattr(harness, "fma_peak", lambda: 1e9)
    monkeypatch.setattr(harness, "copy_bandwidth", lambda traffic=0.0: 1e6)
    entries = {"sadcl": lambda: sum(range(100)), "peer": lambda: sum(range(1000))}
    row = harness.compare("x", "y", entries, flops=2e6, traffic=1e3, rounds=2, warmup=1)
    assert (row.floor_ms, row.bound) == (2.0, "FMA peak") and set(row.peak_mb) == {"sadcl", "peer"}
    row = harness.compare("x", "y", entries, flops=1e5, traffic=1e3, rounds=2, warmup=1)
    assert (row.floor_ms, row.bound) == (1.0, "copy bandwidth") and len(row.timings["sadcl"].samples) == 2
    assert harness.RECORD.rows[-1] is row
    assert harness.compare("x", "y", entries, rounds=1, warmup=1).floor_ms is None
