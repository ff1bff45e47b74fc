"""What the site has beside its pages: pictures drawn in place, KaTeX, the benchmarks' report, and scaling.md or not.

A page says ``<!-- picture: sscl | what it shows -->``; the SVG stands in the page itself and takes the text's colour.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import pictures  # noqa: E402

KATEX = ROOT / "build" / "katex" / "node_modules" / "katex" / "dist"
RESULTS = ROOT / "benchmarks" / "results"
ROLE = re.compile(r":(?:func|class|mod|meth|attr|data):(?=<code>)")
NAMED = re.compile(r"(?<![\w/\">.])docs/(\w+)\.md(?![\w\"<])")
PICTURE = re.compile(r"<!-- picture: (\w+) \| (.*?) -->", re.DOTALL)


def on_config(config: Any) -> Any:
    """Leave out of the navigation what is not there (a page of its own that a checkout may lack)."""
    docs = Path(config["docs_dir"])

    def there(entry: Any) -> bool:
        return not isinstance(entry, dict) or not all(
            isinstance(page, str) and not (docs / page).is_file() and page == "scaling.md" for page in entry.values()
        )

    config["nav"] = [entry for entry in config["nav"] if there(entry)]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add KaTeX with its fonts, and the benchmarks' results where a run has left some."""
    if not (KATEX / "katex.min.js").is_file():
        raise PluginError(f"{KATEX} is missing: `make docs` fetches KaTeX from npm")
    wanted = {"katex.min.js": "", "katex.min.css": "", "contrib/auto-render.min.js": ""}
    wanted |= {f"fonts/{font.name}": "fonts/" for font in (KATEX / "fonts").glob("*.woff2")}
    found = {f"assets/katex/{folder}{Path(name).name}": KATEX / name for name, folder in wanted.items()}
    for path in sorted(RESULTS.glob("*")) if RESULTS.is_dir() else []:
        if path.suffix in (".html", ".png", ".svg", ".json"):
            found[f"benchmarks/{path.name}"] = path
    for address, path in found.items():
        files.append(File.generated(config, address, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill the benchmarks page: the report where there is one, README's table where not."""
    return markdown.replace("<!-- speed -->", _speed()) if page.file.src_uri == "benchmarks.md" else markdown


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Draw the pictures, take off the roles that docstrings have before names (``:func:``), and link the pages that
    they name (``docs/lists.md``)."""
    up = "../" * page.file.src_uri.count("/")

    def link(match: re.Match[str]) -> str:
        there = (ROOT / match[0]).is_file()
        return f'<a href="{up}{match[1]}.html">{match[1].replace("_", " ")}</a>' if there else match[0]

    return PICTURE.sub(_drawn, NAMED.sub(link, ROLE.sub("", content)))


def _drawn(match: re.Match[str]) -> str:
    about = " ".join(match[2].split())
    svg = pictures.draw(match[1], ROOT)
    label = html.escape(re.sub(r"[*`]", "", about), quote=True)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
    return f'<figure class="drawn">{svg}<figcaption>{html.escape(about)}</figcaption></figure>'


def _speed() -> str:
    """What ``python -m benchmarks --report benchmarks/results`` left, the overview first; or README's table."""
    left = sorted(RESULTS.glob("*"), key=lambda path: (path.stem != "overview", path.name)) if RESULTS.is_dir() else []
    kinds = {".html": "The whole report", ".json": "Its data"}
    links = [f"- {kinds[path.suffix]}: [{path.name}](benchmarks/{path.name})" for path in left if path.suffix in kinds]
    shown = [f"![{path.stem.replace('_', ' ')}](benchmarks/{path.name})" for path in left if path.suffix == ".png"]
    if not shown and not links:
        return speed_section((ROOT / "README.md").read_text())
    return "\n\n".join(["\n".join(links), *shown])


def speed_section(readme: str) -> str:
    """The part of README under ``## Speed``, up to the next heading."""
    section = re.search(r"^## Speed\n(.*?)(?=^#|\Z)", readme, re.MULTILINE | re.DOTALL)
    if section is None:
        raise PluginError("README.md has no section Speed, and benchmarks/results no report")
    return re.sub(r"\]\(docs/", "](", section[1])
