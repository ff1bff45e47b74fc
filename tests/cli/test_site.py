"""The site: every page is reached, every picture is drawn, and nothing is loaded from elsewhere."""

from __future__ import annotations

import functools
import html
import http.server
import importlib
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest

import sadcl

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
pytestmark = pytest.mark.skipif(not (ROOT / "mkdocs.yml").is_file(), reason="away from the sources")
LOSSES = [name for name in sadcl.losses.__all__ if name.endswith("Loss")]


def part(name: str) -> ModuleType:
    """A file of docs/site as a module."""
    sys.path.insert(0, str(DOCS / "site"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(DOCS / "site"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly."""
    pytest.importorskip("mkdocs", reason="no mkdocs: `make docs` installs it")
    pytest.importorskip("mkdocstrings", reason="no mkdocstrings: `make docs` installs it")
    if not (ROOT / "build" / "katex" / "node_modules").is_dir():
        pytest.skip("no KaTeX: `make docs` fetches it")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert there <= named
    assert named - there <= {"scaling.md"}  # left out where there is none


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_a_page(name: str) -> None:
    """With an equation, a picture, a call, what it costs, when to use it, and a link to its reference."""
    pages = {page.stem: page.read_text() for page in (DOCS / "losses").glob("*.md") if page.stem != "index"}
    (text,) = [text for text in pages.values() if f"(../api/losses.md#sadcl.losses.{name})" in text]
    assert "\n\\[" in text and "<!-- picture: " in text
    assert re.findall(r"^## (.*)$", text, re.MULTILINE)[0] == "Call"
    assert "\n## Cost and memory" in text or "\n## Weights" in text
    assert f"{name}(" in text
    assert "When to use it" in text or name == "DualContrastiveLoss"


def test_calls_on_the_loss_pages_run() -> None:
    """The first block of code of each page, on tensors of the shapes that it names."""
    import torch

    b, c, d = 4, 3, 8
    for page in sorted((DOCS / "losses").glob("*.md")):
        if page.stem in ("index", "dual"):
            continue
        logits = page.stem in ("asl", "zlpr", "two_way")
        wide = {"sscl": (b, 2, c, d), "pscl": (b, c, d), "multilabel": (b, d), "supcon": (b, 2, d)}
        names = {
            "features": torch.randn(wide.get(page.stem, (1,))),
            "labels": torch.arange(b) % 2 if page.stem == "supcon" else (torch.rand(b, c) < 0.6).float(),
            "prototypes": torch.randn(c, d),
            "logits": torch.randn(b, c) if logits else None,
            "keys": torch.randn(5, d),
            "key_labels": torch.ones(5, c),
        }
        code = re.search(r"^```python\n(.*?)```", page.read_text(), re.MULTILINE | re.DOTALL)
        assert code is not None
        exec(compile(code[1], str(page), "exec"), names)
        assert torch.as_tensor(names["loss"]).isfinite(), page


def test_pictures_are_drawn_in_the_colour_of_the_text() -> None:
    pytest.importorskip("matplotlib")
    pictures = part("pictures")
    asked = {name for page in DOCS.rglob("*.md") for name in re.findall(r"<!-- picture: (\w+) \|", page.read_text())}
    assert asked == set(pictures.PICTURES)
    for name in asked:
        svg = pictures.draw(name, ROOT)
        assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>") and "viewBox" in svg
        assert "currentColor" in svg and pictures.TEXT not in svg
        assert len(svg) < 100_000


def test_speed_picture_reads_the_table() -> None:
    pytest.importorskip("matplotlib")
    pictures = part("pictures")
    rows = pictures.ratios((ROOT / "README.md").read_text())
    assert len(rows) >= 5 and all(0.2 < ratio < 200 for _, ratio in rows)
    assert len({name for name, _ in rows}) == len(rows)
    table = "## Speed\n\n| - | ours | best torch form |\n|---|---|---|\n| A, big (`bench_a x`) | 1 | 2 **1,200x** |\n"
    assert pictures.ratios(f"{table}| ... more | 1 | 3x |\n| B | 1 | - |\n\n") == [("A, x", 1200.0)]


@pytest.mark.parametrize(
    ("page", "found"),
    [
        ('<script src="https://a.b/c.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.x/css">', True),
        ('<link rel="preconnect" href="https://a.b">', True),
        ('<img src="HTTP://a.b/c.png">', True),
        ("<style>@import url(https://a.b/c.css);</style>", True),
        ('<div style="background: url(https://a.b/c.png)"></div>', True),
        ('<link rel="canonical" href="https://a.b"><a href="https://a.b">there</a>', False),
        ('<script src="assets/c.js"></script><img src="data:image/png;base64,//8=">', False),
    ],
)
def test_what_is_loaded_from_elsewhere_is_noticed(tmp_path: Path, page: str, found: bool) -> None:
    (tmp_path / "index.html").write_text(page)
    assert bool(part("check").elsewhere(tmp_path)) == found


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    assert part("check").elsewhere(site) == []
    assert (site / "assets" / "katex" / "katex.min.js").is_file()
    assert list((site / "assets" / "katex" / "fonts").glob("*.woff2"))


def test_built_pages_have_their_pictures_and_reference(site: Path) -> None:
    text = (site / "losses" / "sscl.html").read_text()
    assert "<svg role=" in text and "<!-- picture" not in text
    assert 'id="sadcl.losses.MultiLabelSupConLoss"' in (site / "api" / "losses.html").read_text()
    text = (site / "api" / "functional.html").read_text()
    assert ":func:" not in text and '(<a href="../faithfulness.html">faithfulness</a>)' in text
    assert "<table>" in (site / "benchmarks.html").read_text() or "<img" in (site / "benchmarks.html").read_text()


# Shows every page at a phone's width, one by one, and writes down what each loaded, its width and its formulas.
PROBE = """<!doctype html><body><script>
const said = [];
const show = (page) => new Promise((done) => {
  const frame = document.createElement("iframe");
  frame.style = "width: 390px; height: 800px; border: 0";
  frame.src = page;
  frame.onload = () => setTimeout(() => {
    const view = frame.contentWindow, root = view.document.documentElement;
    said.push({page, loaded: view.performance.getEntriesByType("resource").map((entry) => entry.name),
      width: root.scrollWidth, formulas: view.document.querySelectorAll(".katex").length,
      wrong: view.document.querySelectorAll(".katex-error").length});
    frame.remove();
    done();
  }, 300);
  document.body.append(frame);
});
(async () => {
  for (const page of PAGES) await show(page);
  document.body.textContent = JSON.stringify(said);
})();
</script></body>"""


def test_pages_in_a_browser_that_has_no_network(site: Path) -> None:
    """They load from their own host alone, fit a phone, and their formulas are set."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    pages = sorted(str(page.relative_to(site)) for page in site.rglob("*.html") if page.name != "404.html")
    assert len(pages) > 30
    (site / "probe.html").write_text(PROBE.replace("PAGES", json.dumps(pages)))
    handler = functools.partial(Quiet, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}/"
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-dev-shm-usage"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1", "--virtual-time-budget=60000"]
        done = subprocess.run(
            [*command, "--dump-dom", f"{here}probe.html"], capture_output=True, text=True, timeout=240
        )
        server.shutdown()
    (site / "probe.html").unlink()
    found = json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))  # type: ignore[index]
    assert [entry["page"] for entry in found] == pages
    for entry in found:
        assert entry["loaded"] and all(name.startswith(here) for name in entry["loaded"]), entry
        assert entry["width"] <= 390, entry
        assert entry["wrong"] == 0
    formulas = {entry["page"]: entry["formulas"] for entry in found}
    fonts = [name for entry in found for name in entry["loaded"] if "/katex/fonts/" in name]
    assert formulas["losses/sscl.html"] >= 3 and formulas["kernels.html"] >= 5 and fonts


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files and says nothing."""

    def log_message(self, *_: object) -> None:
        pass


def test_benchmarks_page_takes_the_report_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="no mkdocs: `make docs` installs it")
    hooks = part("hooks")
    monkeypatch.setattr(hooks, "RESULTS", tmp_path / "nothing")
    assert "| work | ours |" in hooks._speed() and "](docs/" not in hooks._speed()
    for name in ("asl.png", "overview.png", "report.html", "benchmarks.json", "notes.txt"):
        (tmp_path / name).touch()
    monkeypatch.setattr(hooks, "RESULTS", tmp_path)
    assert re.findall(r"\(benchmarks/(.*?)\)", hooks._speed()) == [
        "benchmarks.json", "report.html", "overview.png", "asl.png",
    ]  # fmt: skip


def test_data_page_names_every_source() -> None:
    from typing import get_args, get_type_hints

    from sadcl.train.data_config import DataConfig

    named = set(re.findall(r"`(\w+)`", (DOCS / "data.md").read_text()))
    assert set(get_args(get_type_hints(DataConfig)["source"])) <= named
