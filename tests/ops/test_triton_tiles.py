"""Tile tables and the search among them, without a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from sadcl.kernels import _launch, _tiles, _tune

KINDS = ("half", "single", "tf32", "double")


@pytest.mark.parametrize("arch", _launch.PARTS)
@pytest.mark.parametrize("op", _tiles.TABLES)
def test_every_part_has_tiles_whose_operands_fit(op: str, arch: str) -> None:
    part = _launch.PARTS[arch]
    for kind, size in zip(KINDS, (2, 4, 4, 8), strict=True):
        if arch == "sm_75" and kind == "tf32":  # refused by name, see test_precision_is_a_documented_choice
            continue
        for tile in _tiles.candidates(op, part, kind):
            stages = max(tile.num_stages - 1, 1)  # the last stage's operands are in flight, not in shared memory
            assert (tile.block_m + tile.block_n) * tile.block_d * size * stages <= part.shared_bytes
            assert tile.panel * tile.block_n % tile.block_d == 0


def test_unknown_parts_take_a_table_that_fits() -> None:
    small = _tiles.candidates("sscl", _launch.Part("sm_88", 40, 100 << 10), "half")
    assert small == _tiles.SSCL["small"]["half"]
    assert _tiles.candidates("sscl", _launch.Part("sm_110", 20, 227 << 10), "half") == _tiles.SSCL["sm_80"]["half"]
    assert _tiles.candidates("sscl", _launch.Part("gfx1100", 96, 64 << 10), "half") == _tiles.SSCL["gfx942"]["half"]


@pytest.mark.parametrize("op", _tiles.TABLES)
def test_older_triton_keeps_exact_products_off_the_tensor_cores_of_sm_100(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version, part, exact in (((3, 7), "sm_100", True), ((3, 8), "sm_100", False), ((3, 6), "sm_90", False)):
        monkeypatch.setattr(_tiles, "_TRITON", version)
        rows = _tiles.candidates(op, _launch.PARTS[part], "single")
        assert (rows == (_tiles._EXACT,)) == exact
        assert _tiles._EXACT not in _tiles.candidates(op, _launch.PARTS[part], "half")


def test_precision_is_a_documented_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    h100, t4, amd = (_launch.PARTS[arch] for arch in ("sm_90", "sm_75", "gfx942"))
    assert _tiles.precision(torch.float32, h100) == "ieee"
    monkeypatch.setenv("SADCL_TRITON_PRECISION", "tf32x3")
    assert _tiles.precision(torch.float32, h100) == "tf32x3"
    assert _tiles.precision(torch.bfloat16, h100) == _tiles.precision(torch.float32, amd) == "ieee"
    with pytest.raises(RuntimeError, match="tf32 needs sm_80"):
        _tiles.precision(torch.float32, t4)
    monkeypatch.setenv("SADCL_TRITON_PRECISION", "half")
    with pytest.raises(ValueError, match="SADCL_TRITON_PRECISION"):
        _tiles.precision(torch.float32, h100)


@pytest.mark.parametrize(
    "capability, shared_kb, dtype, expected",
    [
        ((8, 0), 163, torch.bfloat16, _tiles.SSCL["sm_80"]["half"]),
        ((8, 6), 99, torch.bfloat16, _tiles.SSCL["small"]["half"]),  # smaller tiles, not a fault at the launch
        ((8, 9), 99, torch.float32, _tiles.SSCL["small"]["single"]),
        ((7, 5), 64, torch.float16, _tiles.SSCL["sm_75"]["half"]),
        ((7, 5), 64, torch.bfloat16, "bfloat16 needs sm_80 or later, this GPU is sm_75; use float16"),
        ((7, 0), 96, torch.float16, "Some GPU is sm_70, older than the sm_75 that Triton needs"),
        ((6, 1), 48, torch.float32, "Some GPU is sm_61, older than the sm_75 that Triton needs"),
    ],
    ids=str,
)
def test_the_choice_follows_the_properties_of_the_device(
    capability: tuple[int, int], shared_kb: int, dtype: torch.dtype, expected: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old parts and small shared memory: a smaller tile, or the reason; properties as torch would give them."""
    properties = SimpleNamespace(
        major=capability[0], minor=capability[1], shared_memory_per_block_optin=shared_kb << 10,
        multi_processor_count=40, name="Some GPU",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_launch, "_probe", _launch._probe.__wrapped__)

    def choose() -> tuple[_tiles.Tile, ...]:
        part = _launch.part_of(torch.device("cuda", 0))
        _launch.require_dtype(part, dtype)
        assert part.shared_bytes == shared_kb << 10
        return _tiles.candidates("sscl", part, _tiles.kind_of(dtype, _tiles.precision(dtype, part)))

    if isinstance(expected, str):
        with pytest.raises(RuntimeError, match=expected):
            choose()
    else:
        assert choose() == expected


def test_bfloat16_on_a_part_without_it_is_named() -> None:
    with pytest.raises(RuntimeError, match="bfloat16 needs sm_80"):
        _launch.require_dtype(_launch.PARTS["sm_75"], torch.bfloat16)


@pytest.mark.parametrize("device, hip, expected", [("cuda", None, 168), ("cuda", "6.2", None), ("cpu", None, None)])
def test_a_bound_on_registers_is_given_where_the_compiler_takes_one(
    device: str, hip: str | None, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, object] = {}

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            return lambda *args, **options: seen.update(options)

    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.version, "hip", hip)
    _launch.launch(Kernel(), 1, (SimpleNamespace(device=torch.device(device)),), registers=168, BLOCK=4)
    assert seen.get("maxnreg") == expected and seen["BLOCK"] == 4 and "registers" not in seen


def test_search_says_so_and_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, size = _launch.PARTS["sm_90"], (5120, 1024)
    rows = _tiles.candidates("sscl", part, "half")
    ran: list[_tiles.Tile] = []
    assert _tune.choose("sscl", part, "half", size, ran.append) == rows[0] and not ran

    def timed(run: object, return_mode: str) -> float:
        run()  # type: ignore[operator]
        return 1.0 if ran[-1] == rows[2] else 2.0

    monkeypatch.setenv("SADCL_AUTOTUNE", "1")
    monkeypatch.setenv("SADCL_TUNE_CACHE", str(tmp_path / "tiles.json"))
    monkeypatch.setattr(_tune, "_cache", None)
    monkeypatch.setattr("triton.testing.do_bench", timed)
    assert _tune.choose("sscl", part, "half", size, ran.append) == rows[2]
    assert ran == list(rows) and "tuning sscl/H100/half/8192x1024" in capsys.readouterr().err
    monkeypatch.setattr(_tune, "_cache", None)  # another process
    assert _tune.choose("sscl", part, "half", size, ran.append) == rows[2]
    assert len(ran) == len(rows)
