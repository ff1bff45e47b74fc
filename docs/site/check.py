"""``python docs/site/check.py build/site``: no page of the site loads anything from elsewhere."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADS = {  # tag -> attributes that make a browser ask for something; a link of <a> does so only when it is followed
    "script": ("src",), "img": ("src", "srcset"), "iframe": ("src",), "source": ("src", "srcset"), "video": ("src",),
    "audio": ("src",), "embed": ("src",), "object": ("data",), "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"), "link": ("href",), "form": ("action",),
}  # fmt: skip
NOT_LOADED = {"canonical", "next", "prev", "alternate", "author", "license"}
ELSEWHERE = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_CSS = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag == "link" and set((given.get("rel") or "").split()) <= NOT_LOADED:
            return
        for name in LOADS.get(tag, ()):
            if ELSEWHERE.match(given.get(name) or ""):
                self.found.append(f"<{tag} {name}={given[name]}>")
        self.found += IN_CSS.findall(given.get("style") or "")

    def handle_data(self, data: str) -> None:
        self.found += IN_CSS.findall(data) if self.lasttag == "style" else []


def elsewhere(site: Path) -> list[str]:
    """``file: what it loads`` for everything that comes from another host."""
    said = []
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            page = _Page()
            page.feed(path.read_text())
            said += [f"{path.relative_to(site)}: {what}" for what in page.found]
        elif path.suffix in (".css", ".svg"):
            said += [f"{path.relative_to(site)}: {what}" for what in IN_CSS.findall(path.read_text())]
    return said


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "index.html").is_file():
        sys.exit(f"{folder}: no site is there")
    faults = elsewhere(folder)
    print("\n".join(faults) if faults else f"{len(list(folder.rglob('*.html')))} pages load nothing from elsewhere")
    sys.exit(bool(faults))
