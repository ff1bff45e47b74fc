"""The report of a run: what it counts, and the page that a real browser makes of it."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

for needed in ("PIL", "timm", "jsonargparse", "tqdm", "matplotlib", "sklearn", "yaml"):
    pytest.importorskip(needed)

from PIL import Image  # noqa: E402

from sadcl.cli import main  # noqa: E402
from sadcl.metrics import average_precision, multilabel_report  # noqa: E402
from sadcl.report.analysis import (  # noqa: E402
    cooccurrence_confusion,
    precision_recall,
    prototype_similarity,
    similarity_order,
)
from sadcl.report.html import Html, escape, page, section, table  # noqa: E402
from sadcl.report.page import Shown, _stages  # noqa: E402

NAMES = ["<script>alert(1)</script>", 'Ünï & "quoted"', "$x^$ _y", "_日本", "a" * 70]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run over labels with names that break what does not escape them; the last one never occurs."""
    folder = tmp_path_factory.mktemp("report")
    generator = torch.Generator().manual_seed(0)
    lines = []
    for number in range(12):
        Image.new("RGB", (40, 40), tuple(torch.randint(0, 256, (3,), generator=generator).tolist())).save(
            folder / f"{number}.png"
        )
        chosen = [name for i, name in enumerate(NAMES[:4]) if (number + i) % 2 or number == i]
        quoted = ";".join(chosen + NAMES[4:] * (number == 0)).replace('"', '""')
        lines.append(f'{number}.png,"{quoted}"\n')
    (folder / "train.csv").write_text("".join(lines), encoding="utf-8")
    (folder / "val.csv").write_text("".join(lines[1:]), encoding="utf-8")
    (folder / "config.yaml").write_text(
        "batch_size: 6\ncontrol: false\n"
        f"data: {{source: csv, train_csv: {folder}/train.csv, val_csv: {folder}/val.csv, image_size: 40, workers: 0}}\n"
        "model: {backbone: 'timm:test_resnet', pretrained: false, hidden_dim: 8, num_heads: 2, "
        "ffn_dim: 16, proj_dim: 4}\n"
        "step1: {epochs: 2}\nstep2: {epochs: 1}\n"
    )
    assert main(["train", "--config", str(folder / "config.yaml"), "--output", str(folder / "run")]) == 0
    return folder / "run"


def test_metrics_are_json_though_a_label_never_occurs(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(f"bare {name}"))
    absent = metrics["classes"].index(NAMES[4])
    assert [stage["ap"][absent] for stage in metrics["stages"].values()] == [None, None]


class Reader(html.parser.HTMLParser):
    """Collects tags, ids, addresses and the text of the per-class table; checks that tags close."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.addresses += [values[key] or "" for key in ("src", "href", "xlink:href", "action") if key in values]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_nothing_else(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    read = Reader(text)
    assert len(read.ids) == len(set(read.ids)), "ids of two figures meet"
    assert all(address.startswith(("data:", "#")) for address in read.addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert {"main", "header", "section", "figure", "figcaption", "table", "details"} <= read.tags
    sections = ("stages", "curves", "classes", "precision-recall", "confusion", "attention")
    assert {*sections, "embeddings", "prototypes", "origin", "per-class"} <= set(read.ids)
    assert text.count("<script>") == 1 and "<script>alert" not in text, "a label name became code"
    for name in NAMES:
        assert escape(name) in text
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{metrics['mAP']:.3f}" in text and "voc_area" in text and torch.__version__ in text
    assert "optimistic" in text


def test_report_is_logged_too(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["run", "epoch", "epoch", "epoch"]
    assert [row["step"] for row in rows] == [0, 2, 4, 6] and rows[-1]["stage"] == "step2"


# -- in a browser --


def browse(path: Path, profile: Path) -> tuple[str, list[str]]:
    """The DOM after scripts ran, and every line that reached the console."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--enable-logging=stderr", "--log-level=0", "--virtual-time-budget=5000"]
    ran = subprocess.run([*command, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, [line for line in ran.stderr.splitlines() if "CONSOLE" in line]


def test_browser_shows_it_without_complaint_and_sorts(run: Path, tmp_path: Path) -> None:
    """A script appended to a copy clicks on titles of the table, and notes the order of rows after each."""
    text = (run / "report.html").read_text(encoding="utf-8")
    clicks = """<script>
    const rows = () => [...document.querySelectorAll("#per-class tbody th")].map(cell => cell.textContent);
    const seen = [];
    for (const title of ["AP", "AP", "label"]) {
      [...document.querySelectorAll("#per-class button")].find(b => b.textContent === title).click();
      seen.push(rows());
    }
    document.body.dataset.seen = JSON.stringify(seen);
    document.body.dataset.wide = document.documentElement.scrollWidth <= window.innerWidth;
    </script></body>"""
    (tmp_path / "clicked.html").write_text(text.replace("</body>", clicks), encoding="utf-8")
    dom, console = browse(tmp_path / "clicked.html", tmp_path / "profile")
    assert console == []
    found = re.search(r'data-seen="([^"]*)"', dom)
    assert found is not None, "the page's script did not run"
    falling, rising, by_name = json.loads(html.unescape(found[1]))
    metrics = json.loads((run / "metrics.json").read_text())
    ap = dict(zip(metrics["classes"], metrics["stages"]["step2"]["ap"], strict=True))
    absent = NAMES[4]
    assert sorted(by_name) == sorted(NAMES) and falling[-1] == rising[-1] == absent, "a label without AP comes last"
    ranks = [ap[name] for name in falling[:-1]]
    assert ranks == sorted(ranks, reverse=True) and [ap[name] for name in rising[:-1]] == sorted(ranks)
    assert by_name != falling
    assert 'data-wide="true"' in dom, "the page is wider than the window"
    assert dom.count("<svg") >= 8 and dom.count("data:image/jpeg;base64,") >= 5


def test_browser_would_have_complained(tmp_path: Path) -> None:
    """The test above can fail: errors and what the page's own policy refuses do reach the console."""
    part = section("x", "x", Html('<img src="https://example.org/x.png"><script>nothing.here()</script>'))
    (tmp_path / "bad.html").write_text(page("bad", "", [part]))
    _, console = browse(tmp_path / "bad.html", tmp_path / "profile")
    assert any("nothing is not defined" in line for line in console)
    assert any("Content Security Policy" in line for line in console)


# -- what it counts --


def test_precision_recall_is_the_curve_of_the_ap() -> None:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(-1, 2, (400,), generator=generator)
    scores = torch.rand(400, generator=generator) + 0.3 * (labels == 1)
    recall, precision = precision_recall(scores, labels, points=10_000)
    area = float((np.diff(recall) * precision[1:]).sum())
    assert area == pytest.approx(average_precision(scores, labels, "sklearn"), abs=1e-9)
    thin_recall, thin = precision_recall(scores, labels, points=30)
    assert len(thin) <= 30 and thin_recall[0] == 0 and thin_recall[-1] == 1
    assert set(zip(thin_recall, thin, strict=True)) <= set(zip(recall, precision, strict=True))
    assert precision_recall(scores, torch.zeros(400))[0].size == 0


def test_confusion_counts_by_hand() -> None:
    labels = torch.tensor([[1, 0, 0], [1, 0, 1], [1, -1, 0], [0, 1, 0]])
    scores = torch.tensor([[0.9, 0.8, 0.1], [0.9, 0.3, 0.9], [0.9, 0.9, 0.6], [0.7, 0.9, 0.2]])
    confusion = cooccurrence_confusion(scores, labels)
    assert confusion.of.tolist() == [[0, 2, 2], [1, 0, 1], [0, 1, 0]]
    assert confusion.wrong.tolist() == [[0, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert confusion.base.tolist() == [1.0, 0.5, pytest.approx(1 / 3)]
    assert confusion.rate[0, 1] == 0.5 and confusion.rate[0, 0].isnan()
    strict = cooccurrence_confusion(scores, labels, torch.tensor([0.5, 0.85, 0.5]))
    assert strict.wrong[0].tolist() == [0, 0, 1]


def test_prototypes_that_are_alike_lie_together() -> None:
    from sadcl import SADCLHead

    head = SADCLHead(8, 6, num_heads=2, encoder_layers=0, decoder_layers=1, ffn_dim=8, proj_dim=4, bank_slots=1)
    assert head.prototypes is not None
    with torch.no_grad():
        head.prototypes.copy_(torch.randn(3, 8).repeat(2, 1) + 0.01 * torch.randn(6, 8))  # 0 and 3, 1 and 4, 2 and 5
    similarity = prototype_similarity(head)
    assert similarity is not None and torch.allclose(similarity.diagonal(), torch.ones(6, dtype=torch.float64))
    order = similarity_order(similarity)
    assert sorted(order) == list(range(6))
    assert {frozenset(order[i : i + 2]) for i in (0, 2, 4)} == {frozenset((i, i + 3)) for i in range(3)}
    assert similarity_order(similarity[:2, :2]) == [0, 1]
    assert prototype_similarity(SADCLHead(8, 2, num_heads=2, ffn_dim=8, contrastive=False)) is None


def test_other_sizes_and_speed_are_shown() -> None:
    scores, labels = torch.rand(20, 3), torch.randint(0, 2, (20, 3))
    report = multilabel_report(scores, labels)
    speed = {"images_per_second": 123.4, "data": 0.25, "forward": 0.75}
    history = [{"stage": "step1", "epoch": 3, "speed": speed}]
    metrics = {"history": history, "at_576": {"step1": {**report.as_dict(), "mAP": 0.8771}}}
    outputs: Any = SimpleNamespace(scores=scores, labels=labels)
    text = _stages(Shown("run", metrics, {"step1": report}, outputs, [], None, ""))
    assert "the same at 576 pixels" in text and "0.877" in text
    assert ">123<" in text and ">25%<" in text and ">75%<" in text


def test_table_cells() -> None:
    text = table(["name", "x"], [["<b>", float("nan")], ["b", (Html("<i>2</i>"), 2.0)]], sortable=True, anchor="t")
    assert '<th scope="row">&lt;b&gt;</th>' in text and 'data-value="">–<' in text
    assert '<td class="number" data-value="2.0"><i>2</i></td>' in text
