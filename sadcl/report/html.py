"""``report.html`` as text: one file that needs nothing else, from a network or beside it.

Every name that comes from outside goes through :func:`escape`. What is already HTML is marked as :class:`Html`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["Html", "bar", "data_uri", "escape", "figure", "page", "section", "sparkline", "table"]


class Html(str):
    """Text that is HTML already."""


def escape(value: Any) -> Html:
    """A value as HTML: text escaped, floats with three decimals (NaN as a dash), HTML as it is."""
    if isinstance(value, Html):
        return value
    if isinstance(value, float):
        return Html("–" if value != value else f"{value:.3f}")
    return Html(html.escape(str(value)))


def page(title: str, subtitle: str, sections: Iterable[Html]) -> str:
    """The whole document. The policy in its head lets the browser refuse anything from outside."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n"
        f"<main>\n{''.join(sections)}</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def section(anchor: str, title: str, *content: Html | str) -> Html:
    """A part of the page under its heading."""
    body = "\n".join(escape(part) if isinstance(part, Html) else f"<p>{escape(part)}</p>" for part in content)
    return Html(f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>\n')


def table(
    head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "", sortable: bool = False, anchor: str = ""
) -> Html:
    """A table whose first column names the rows.

    Args:
        head: column titles.
        rows: cells; floats are formatted, text is escaped. A cell (shown, number) sorts by the number.
        caption: what the table shows.
        sortable: titles are buttons that sort.
        anchor: id of the table.
    """
    titles = "".join(
        f'<th scope="col">{f"<button type=button>{escape(t)}</button>" if sortable and t else escape(t)}</th>'
        for t in head
    )
    lines = (f'<th scope="row">{escape(first)}</th>{"".join(map(_cell, rest))}' for first, *rest in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    name = f' id="{anchor}"' if anchor else ""
    kind = ' class="sortable"' if sortable else ""
    inner = f"<table{name}{kind}><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"
    above = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f'<figure>{above}<div class="scroll" tabindex="0">{inner}</div></figure>')


def _cell(cell: Any) -> str:
    shown, value = cell if isinstance(cell, tuple) else (cell, cell)
    if not isinstance(value, int | float):
        return f"<td>{escape(shown)}</td>"
    return f'<td class="number" data-value="{value if value == value else ""}">{escape(shown)}</td>'


def figure(content: Html, caption: str = "") -> Html:
    """Something to look at, and what it is."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(f"<figure>{content}{below}</figure>")


def bar(value: float) -> Html:
    """A fraction as a bar, for a table's cell."""
    width = 0.0 if value != value else 100 * min(max(value, 0.0), 1.0)
    return Html(f'<span class="bar"><span style="width:{width:.1f}%"></span></span>{escape(float(value))}')


def sparkline(xs: Iterable[float], ys: Iterable[float], about: str) -> Html:
    """A small curve on the unit square."""
    points = " ".join(f"{60 * x:.1f},{30 - 28 * y:.1f}" for x, y in zip(xs, ys, strict=True))
    if not points:
        return Html("–")
    return Html(
        f'<svg class="spark" viewBox="0 0 60 31" role="img" aria-label="{escape(about)}">'
        f'<polyline points="{points}" fill="none" stroke="currentColor" stroke-width="1.5"/></svg>'
    )


def data_uri(content: bytes, kind: str = "image/jpeg") -> Html:
    """Bytes as an address."""
    return Html(f"data:{kind};base64,{base64.b64encode(content).decode()}")


STYLE = """
:root{color-scheme:light dark;--ink:#222;--ground:#fff;--soft:#f3f4f6;--line:#d5d8dd;--mute:#5b616b;--bar:#2b6cb0}
@media (prefers-color-scheme:dark){
:root{--ink:#e6e6e6;--ground:#15181c;--soft:#20252b;--line:#3a414a;--mute:#a0a7b1;--bar:#63a0e0}}
body{margin:0 auto;max-width:70rem;padding:1rem;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--ground)}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;border-bottom:1px solid var(--line);margin-top:2.2rem}
header p,figcaption{color:var(--mute)}
h1,h2,th,td,p,figcaption{overflow-wrap:break-word}
.scroll{overflow:auto;max-height:40rem}
table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:left;font-weight:normal}
thead th{font-weight:600;position:sticky;top:0;background:var(--ground)}
tbody th{min-width:7rem;max-width:20rem}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer;text-decoration:underline dotted}
th[aria-sort=ascending] button::after{content:" \\25B2"}th[aria-sort=descending] button::after{content:" \\25BC"}
.bar{display:inline-block;width:5rem;height:.7rem;margin-right:.5rem;background:var(--soft)}
.bar span{display:block;height:100%;background:var(--bar)}
.spark{width:3.75rem;height:1.9rem;display:block}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr));gap:1rem}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(8.5rem,1fr));gap:.5rem;margin:1.5rem 0}
figure{margin:.5rem 0}figure svg,figure img{max-width:100%;height:auto}.strip img{width:100%;display:block}
svg text{fill:currentColor}.strip figcaption{font-size:.85rem}
pre{background:var(--soft);padding:.8rem;overflow-x:auto;font-size:.85rem}
.yes{color:#2e7d32}.no{color:#c0392b}
@media (prefers-color-scheme:dark){.yes{color:#7fc784}.no{color:#f08a80}}
""".strip()

# Sorting of tables by a click on a title: numbers by value, text by the reader's language, empty cells last.
SCRIPT = """
"use strict";
for (const button of document.querySelectorAll("table.sortable thead button")) {
  button.addEventListener("click", () => {
    const title = button.closest("th"), body = title.closest("table").tBodies[0];
    const column = title.cellIndex, numeric = body.querySelector("td.number") &&
      [...body.rows].some(row => row.cells[column].classList.contains("number"));
    const down = title.getAttribute("aria-sort") === "descending" ? false :
      title.getAttribute("aria-sort") === "ascending" ? true : Boolean(numeric);
    for (const other of title.parentNode.cells) other.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => {
      const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent;
      return numeric ? (text === "" ? NaN : Number(text)) : text;
    };
    const compare = (a, b) => {
      if (!numeric) return a.localeCompare(b) * (down ? -1 : 1);
      if (Number.isNaN(a) || Number.isNaN(b)) return Number.isNaN(a) - Number.isNaN(b);
      return (a - b) * (down ? -1 : 1);
    };
    const keyed = [...body.rows].map(row => [key(row), row]);
    keyed.sort((a, b) => compare(a[0], b[0]));
    body.append(...keyed.map(pair => pair[1]));
  });
}
""".strip()
