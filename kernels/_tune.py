"""Which of a table's tiles is taken: the default, or with ``SADCL_AUTOTUNE=1`` the fastest of the list.

A search times every row of the list once per problem size, says so on stderr, and keeps the winner in a file
(``SADCL_TUNE_CACHE``, else ``~/.cache/sadcl/tiles.json``).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from . import _tiles
from ._launch import Part
from ._tiles import Tile


def choose(op: str, part: Part, kind: str, size: tuple[int, ...], run: Callable[[Tile], None]) -> Tile:
    """The tile to use: the default, or the fastest of the list with ``SADCL_AUTOTUNE=1``.

    Args:
        op: key of :data:`._tiles.TABLES`.
        part: where it runs.
        kind: kind of operand.
        size: what the best choice depends on; rounded up to powers of two in the cache's key.
        run: runs the op with a tile; only called by a search.
    """
    rows = _tiles.candidates(op, part, kind)
    if os.environ.get("SADCL_AUTOTUNE") != "1" or len(rows) == 1 or part.arch == "interpret":
        return rows[0]
    rounded = "x".join(str(1 << max(n - 1, 0).bit_length()) for n in size)
    key = f"{op}/{part.name or part.arch}/{kind}/{rounded}"
    cache = _read_cache()
    if key not in cache:
        cache[key] = asdict(_search(key, rows, run))
        _write_cache(cache)
    return Tile(**cache[key])


def _search(key: str, rows: tuple[Tile, ...], run: Callable[[Tile], None]) -> Tile:
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    print(f"sadcl: tuning {key}: {len(rows)} tiles, once; the result is kept in {_cache_path()}", file=sys.stderr)
    best, best_ms = rows[0], float("inf")
    for index, tile in enumerate(rows, 1):
        try:
            ms = do_bench(lambda tile=tile: run(tile), return_mode="median")
        except OutOfResources as error:
            print(f"sadcl:   {index}/{len(rows)} {tile}: {error}", file=sys.stderr)
            continue
        print(f"sadcl:   {index}/{len(rows)} {tile}: {ms:.3f} ms", file=sys.stderr)
        if ms < best_ms:
            best, best_ms = tile, ms
    return best


def _cache_path() -> Path:
    return Path(os.environ.get("SADCL_TUNE_CACHE") or Path.home() / ".cache" / "sadcl" / "tiles.json")


_cache: dict[str, dict[str, int]] | None = None


def _read_cache() -> dict[str, dict[str, int]]:
    global _cache
    if _cache is None:
        try:
            _cache = json.loads(_cache_path().read_text())
        except (OSError, ValueError):  # none yet, or not ours: search again
            _cache = {}
    return _cache


def _write_cache(cache: dict[str, dict[str, int]]) -> None:
    path = _cache_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(cache, indent=1, sort_keys=True))
        scratch.replace(path)  # other processes see the old file or the new one
    except OSError as error:
        print(f"sadcl: cannot keep the tuning result in {path}: {error}", file=sys.stderr)
