"""Which implementation runs an op: what works here, why not, and the choice for a device.

The probes run once, when this module loads: they import the C++ extension and look up triton's version without
importing it (that, like ``torch._dynamo``, would cost seconds). So a call under ``torch.compile`` only reads a table.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from ._checks import check_choice
from .cuda import _cache, _nvrtc, _small

NAMES = ("cpp", "triton", "cuda", "torch", "reference")
_MIN_TRITON = (3, 6)
# What the launchers know how to ask (ROCm's devices are "cuda" to torch); meta tensors only have their shapes worked
# out. Others (xpu, mps, ...) run portable torch, Triton installed or not.
_TRITON_DEVICES = ("cuda", "meta")
_CUDA_DEVICES = ("cuda", "meta")


@dataclass(frozen=True)
class BackendInfo:
    """One backend as :func:`backends` reports it.

    Attributes:
        available: whether an op can run on it in this process.
        reason: why not; empty when available.
        detail: what it is (instruction set, compiler, version); empty when not available.
        misconfigured: whether the reason is a setting of the user's, which no other backend may hide.
    """

    available: bool
    reason: str = ""
    detail: str = ""
    misconfigured: bool = False


def backends() -> dict[str, BackendInfo]:
    """Say which backends work here and why the others do not.

    Returns:
        A dict from backend name (``"cpp"``, ``"triton"``, ``"cuda"``, ``"torch"``, ``"reference"``) to
        :class:`BackendInfo`.
    """
    found = dict(_FOUND)
    if found["cuda"].available and not torch.cuda.is_available():
        found["cuda"] = BackendInfo(False, reason=f"no GPU that torch can use; its compiler is there: {_cuda_detail()}")
    elif found["cuda"].available:
        found["cuda"] = BackendInfo(True, detail=_cuda_detail())
    if found["triton"].available and not (torch.cuda.is_available() or triton_interprets()):
        found["triton"] = BackendInfo(False, reason="no GPU that torch can use, and TRITON_INTERPRET=1 is not set")
    return found


def _probe_cpp() -> BackendInfo:
    try:
        extension = importlib.import_module("sadcl._C")
        isa, build = extension.isa(), extension.build_info()
    except ValueError as error:  # SADCL_CPU_ISA
        return BackendInfo(False, reason=str(error), misconfigured=True)
    except (ImportError, RuntimeError) as error:
        note = Path(__file__).with_name("_build_error.txt")
        if "libgomp" in str(error):
            why = f"the C++ extension needs OpenMP's library ({error}); on Debian and Ubuntu: apt install libgomp1"
        else:
            why = f"the C++ extension was not built: {note.read_text().strip()}" if note.is_file() else str(error)
        return BackendInfo(False, reason=why)
    built = ", ".join(f"{key} {value}" for key, value in build.items())
    alone = "" if build["openmp"] else "; one thread, so backend=None takes torch where that has several"
    return BackendInfo(True, detail=f"instruction set {isa} ({built}){alone}")


def cpp_is_outnumbered() -> bool:
    """Whether the extension was built without OpenMP, and so has one thread, while torch has several."""
    if not _FOUND["cpp"].available or importlib.import_module("sadcl._C").build_info()["openmp"]:
        return False
    return torch.get_num_threads() > 1


def _probe_triton() -> BackendInfo:
    for package in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-rocm"):
        try:
            version = importlib.metadata.version(package)
            break
        except importlib.metadata.PackageNotFoundError:
            continue
    else:
        return BackendInfo(False, reason="triton is not installed")
    if tuple(int(part) for part in version.split(".")[:2]) < _MIN_TRITON:
        return BackendInfo(False, reason=f"triton {version} is older than {_MIN_TRITON[0]}.{_MIN_TRITON[1]}")
    if importlib.util.find_spec("triton") is None:
        return BackendInfo(False, reason=f"triton {version} is installed but cannot be imported")
    return BackendInfo(True, detail=f"triton {version}")


def _probe_cuda() -> BackendInfo:
    """Looks for files and loads nothing: that takes a quarter of a second."""
    if torch.version.hip:
        return BackendInfo(False, reason="it runs on NVIDIA GPUs, and this torch is for AMD's")
    if _nvrtc.path() is None:
        return BackendInfo(False, reason="NVRTC was not found; it comes with torch's CUDA wheels and the CUDA toolkit")
    return BackendInfo(True, detail="NVRTC")


def _cuda_detail() -> str:
    try:
        major, minor = _nvrtc.version()
    except RuntimeError as error:
        return str(error)
    return f"NVRTC {major}.{minor} ({_nvrtc.path()}), programs are kept in {_cache.folder()}"


_FOUND = {
    "cpp": _probe_cpp(),
    "triton": _probe_triton(),
    "cuda": _probe_cuda(),
    "torch": BackendInfo(True, detail=f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads"),
    "reference": BackendInfo(True, detail="eager float64 oracle, for checking"),
}
# When this module loads, like the probes. No size is asked for: a graph over any number of images must not compare it.
_OUTNUMBERED = cpp_is_outnumbered()


def triton_interprets() -> bool:
    """Whether Triton kernels run in the interpreter, where they accept CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(name: str, device_type: str) -> str:
    """Why backend ``name`` cannot run on a device type; empty when it can."""
    if not _FOUND[name].available:
        return _FOUND[name].reason
    if name == "cpp" and device_type != "cpu":
        return f"it runs on CPU tensors, not on {device_type}"
    if name == "triton" and device_type == "cpu" and not triton_interprets():
        return "it runs on GPU tensors, and on CPU tensors only under TRITON_INTERPRET=1"
    if name == "triton" and device_type not in (*_TRITON_DEVICES, "cpu"):
        return f"it runs on CUDA and ROCm GPUs, not on {device_type}"
    if name == "cuda" and device_type not in _CUDA_DEVICES:
        return f"it runs on NVIDIA GPUs, not on {device_type}"
    return ""


def _refuse_misconfigured(name: str, device_type: str) -> None:
    """Raise what is wrong with the settings of a backend that would run on the device otherwise."""
    if _FOUND[name].misconfigured and device_type == "cpu":
        raise ValueError(_FOUND[name].reason)


def takes_cpp(device: torch.device) -> bool:
    """Whether what has no ``backend`` argument and one kernel alone (metrics) runs the CPU extension on ``device``.

    Raises:
        ValueError: if the extension would, and ``SADCL_CPU_ISA`` is no instruction set that it can run.
    """
    if os.environ.get("SADCL_BACKEND", "") in ("", "cpp"):
        _refuse_misconfigured("cpp", device.type)
    return os.environ.get("SADCL_BACKEND", "") in ("", "cpp") and not _why_not("cpp", device.type)


def _prefers_cuda(op: str, device_type: str, sizes: tuple[int, ...]) -> bool:
    """Whether a call without a backend is one for the CUDA C++ kernels.

    Not where a graph is made: it serves any number of images, so nothing may be compared with that.
    """
    if device_type == "meta" or torch.compiler.is_compiling() or _why_not("cuda", device_type):
        return False
    return _small.is_small(op, sizes)


def by_name(backend: str | None) -> bool:
    """Whether the caller, or ``SADCL_BACKEND`` in its place, asked for one backend."""
    return backend is not None or bool(os.environ.get("SADCL_BACKEND"))


def makes_program() -> bool:
    """Whether torch.export (so torch.onnx.export too) or torch.jit traces, for a program that may run elsewhere.

    What has a form in torch's own operators (attention, classifier, linear layers) then takes it, so that the program
    needs neither this library nor this machine; unless a backend was asked for by name.
    """
    exporting = getattr(torch.compiler, "is_exporting", bool)  # torch 2.6 has none
    return (exporting() or torch.jit.is_tracing()) and not os.environ.get("SADCL_BACKEND")


def resolve_implicit(op: str, device: torch.device, implemented: tuple[str, ...], sizes: tuple[int, ...] = ()) -> str:
    """The backend of a call that has no ``backend`` argument (classifier, bank): ``SADCL_BACKEND`` or the best.

    ``"reference"`` asks the losses for their oracles; here it means ``"torch"``.

    Raises:
        RuntimeError: if the backend that ``SADCL_BACKEND`` names cannot run.
    """
    asked = resolve(None, op, device, implemented, sizes)
    return "torch" if asked == "reference" else asked


def resolve(
    backend: str | None, op: str, device: torch.device, implemented: tuple[str, ...], sizes: tuple[int, ...] = ()
) -> str:
    """Choose the backend of one call.

    Args:
        backend: the caller's wish; ``None`` takes ``SADCL_BACKEND`` and, without it, the best for the device.
        op: name of the op, for the error message.
        device: where the tensors are.
        implemented: the backends that have this op, best first.
        sizes: of the problem; small ones go to "cuda" on a GPU that can run it, whatever is best for large ones.

    Returns:
        One of :data:`NAMES`.

    Raises:
        ValueError: if the name is unknown, or ``SADCL_CPU_ISA`` is no instruction set that this machine can run.
        RuntimeError: if a backend asked for by name cannot run; there is no silent fallback.
    """
    asked = backend if backend is not None else os.environ.get("SADCL_BACKEND") or None
    kind = device.type
    if asked is None:
        if kind == "cpu" and implemented[0] == "cpp" and _FOUND["cpp"].available and not _OUTNUMBERED:
            return "cpp"
        if kind in _CUDA_DEVICES and "cuda" in implemented and _prefers_cuda(op, kind, sizes):
            return "cuda"
        for name in implemented:
            _refuse_misconfigured(name, kind)
            if not _why_not(name, kind) and not (name == "cpp" and _OUTNUMBERED):
                return name
        raise AssertionError(f"op {op} has no portable implementation")
    source = "backend" if backend is not None else "SADCL_BACKEND"
    check_choice(source, asked, NAMES)
    if asked == "reference":
        return asked
    if asked not in implemented:
        have = ", ".join((*implemented, "reference"))
        others = f"; ops with CUDA kernels: {', '.join(_small.implemented())}" if asked == "cuda" else ""
        raise RuntimeError(f"{source}={asked!r}: {op} has no such implementation (it has {have}{others})")
    _refuse_misconfigured(asked, kind)
    why_not = _why_not(asked, kind)
    if why_not:
        raise RuntimeError(f"{source}={asked!r} cannot run {op}: {why_not}")
    return asked
