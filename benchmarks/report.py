"""What ``python -m benchmarks --report`` writes: a page that needs nothing else, and its pictures as PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Row, Series
from benchmarks.results import Results
from sadcl.checkpoint import write_atomically
from sadcl.report.html import Html, data_uri, escape, figure, page, section, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER, FLOOR = "#2b6cb0", "#b3bac4", "#c0392b"


def write(results: Results, folder: Path) -> None:
    """Write ``report.html`` and the PNGs that it shows into ``folder``."""
    pictures = {"overview": overview(results.rows)} if results.rows else {}
    pictures |= {_file(row.name): entries(row) for row in results.rows}
    pictures |= {_file(series.name): growth(series) for series in results.series}
    png = {name: _png(picture) for name, picture in pictures.items()}
    for name, content in png.items():
        write_atomically(folder / f"{name}.png", lambda file, content=content: file.write(content))
    text = page("sadcl benchmarks", f"{results.title()}; {results.rates()}", _sections(results, png))
    write_atomically(folder / "report.html", lambda file: file.write(text.encode()))


def _file(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name)


def _image(png: dict[str, bytes], name: str, about: str) -> Html:
    source = data_uri(png[_file(name)], "image/png")
    return figure(Html(f'<img src="{source}" alt="{escape(about)}" loading="lazy">'))


def _sections(results: Results, png: dict[str, bytes]) -> list[Html]:
    head = (
        "Forward and backward unless a row says otherwise; medians of interleaved rounds, every entry checked before "
        "it was timed. The floor is what the processor could do at best with the same operations or bytes, at rates "
        "measured in the same run."
    )
    rows = [_summary(row) for row in results.rows]
    titles = ["work", "ours, ms", "slowest peer", "best peer", "times slower", "share of the floor", "MB, ours"]
    parts = [section("overview", "Overview", head)]
    if results.rows:
        picture = _image(png, "overview", "how many times slower the peers are")
        parts = [section("overview", "Overview", head, picture, table(titles, rows, sortable=True))]
    for row in results.rows:
        columns = ["entry", "median ms", "fastest", "slowest", "times ours", "peak MB beyond the inputs"]
        ours = row.timings["sadcl"].median
        lines: list[Sequence[Any]] = [
            (name, t.median, t.fastest, t.slowest, t.median / ours, row.peak_mb.get(name, "–"))
            for name, t in sorted(row.timings.items(), key=lambda item: item[1].median)
        ]
        if row.floor_ms is not None:
            lines.append((f"floor ({row.bound})", row.floor_ms, "", "", row.floor_ms / ours, ""))
        parts.append(
            section(_file(row.name), row.name, row.about, _image(png, row.name, row.about), table(columns, lines))
        )
    for series in results.series:
        shown = table(list(series.columns), [tuple(f"{x:g}" for x in line) for line in series.lines])
        parts.append(
            section(_file(series.name), series.name, series.about, _image(png, series.name, series.about), shown)
        )
    return parts


def peers(row: Row) -> dict[str, float]:
    """Medians of what is not ours."""
    return {name: t.median for name, t in row.timings.items() if not name.startswith("sadcl")}


def _summary(row: Row) -> tuple[Any, ...]:
    ours, others = row.timings["sadcl"].median, peers(row)
    slow = max(others, key=lambda name: others[name], default="–")
    best = min(others, key=lambda name: others[name], default="–")
    share = row.floor_ms / ours if row.floor_ms is not None else float("nan")
    anchor = Html(f'<a href="#{_file(row.name)}">{escape(row.name)}</a>')
    ratio = others[best] / ours if others else float("nan")
    memory = row.peak_mb.get("sadcl", float("nan"))
    slowest = f"{slow}, {others[slow] / ours:.1f}x" if others else "–"
    return anchor, ours, slowest, best, ratio, share, memory


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.25, linewidth=0.6)
    return made, axes


def _png(made: Figure) -> bytes:
    file = io.BytesIO()
    made.savefig(file, format="png", dpi=110, facecolor="white")
    return file.getvalue()


def overview(rows: Sequence[Row]) -> Figure:
    """How many times slower than ours the best peer is, and where the floor lies, one line a row."""
    made, (axis,) = _figure(9, 1 + 0.32 * len(rows))
    at = {row.name: len(rows) - 1 - i for i, row in enumerate(rows)}
    over = [(row, median / row.timings["sadcl"].median) for row in rows for median in peers(row).values()]
    floors = [(row, row.floor_ms / row.timings["sadcl"].median) for row in rows if row.floor_ms is not None]
    axis.plot([x for _, x in over], [at[row.name] for row, _ in over], "o", color=PEER, label="peers")
    axis.plot([x for _, x in floors], [at[row.name] for row, _ in floors], "|", color=FLOOR, ms=12, label="floor")
    axis.axvline(1, color=OURS, linewidth=2, label="ours")
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axis.set_xlabel("time over ours (log scale; right of the line: slower)")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    return made


def entries(row: Row) -> Figure:
    """Medians with fastest and slowest, the floor as a line; memory beside them where it was measured."""
    names = sorted(row.timings, key=lambda name: -row.timings[name].median)
    made, axes = _figure(9, 0.9 + 0.36 * len(names), 2 if row.peak_mb else 1)
    colours = [OURS if name.startswith("sadcl") else PEER for name in names]
    times = [row.timings[name] for name in names]
    spans = [[t.median - t.fastest for t in times], [t.slowest - t.median for t in times]]
    axes[0].barh(names, [t.median for t in times], color=colours, xerr=spans, error_kw={"linewidth": 0.8})
    if row.floor_ms is not None:
        axes[0].axvline(row.floor_ms, color=FLOOR, linewidth=1.5, linestyle="--", label=f"floor: {row.bound}")
        axes[0].legend(loc="lower right", frameon=False, fontsize=8)
    if max(t.median for t in times) > 20 * min(t.median for t in times):
        axes[0].set_xscale("log")
    axes[0].set_xlabel("ms (median; line: fastest to slowest)")
    if row.peak_mb:
        axes[1].barh(names, [row.peak_mb.get(name, 0.0) for name in names], color=colours)
        axes[1].set_yticks(range(len(names)), [""] * len(names))
        axes[1].set_xlabel("peak MB beyond the inputs")
    return made


def growth(series: Series) -> Figure:
    """Every column over the first."""
    x, *columns = zip(*series.lines, strict=True)
    made, axes = _figure(9, 2.6, len(columns))
    for axis, title, y in zip(axes, series.columns[1:], columns, strict=True):
        axis.plot(x, y, "o-", color=OURS)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(series.columns[0])
        axis.set_title(title, fontsize=10)
    axes[0].set_yscale("log")
    return made
