"""The console script ``sadcl``: train, eval, study, predict, export, bench, fetch, doctor.

Each command imports what it needs when it runs, so that ``sadcl doctor`` works on an install without the
``[train]`` extra. What a user can get wrong ends in one line and exit code 2 (``SADCL_TRACEBACK=1`` shows
where).
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from sadcl._json import dumps

__all__ = ["main"]

COMMANDS = {
    "train": "train the method's two steps and draw what was learned",
    "eval": "measure a checkpoint on its validation images, or on a list of yours",
    "study": "does the method help on these pictures? every arm on paired seeds (an hour; resumes)",
    "predict": "labels, probabilities and attention overlays for pictures, folders, or paths on stdin",
    "export": "backbone and head as one ONNX or torch.export program",
    "bench": "every op on this machine against torch: time and peak memory, after a correctness gate (from a checkout)",
    "fetch": "bring the photo cut-outs for the demo onto this machine (Debian, Ubuntu)",
    "doctor": "which backends work on this machine, and why the others do not",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 (some pictures left out), 2 (the caller's mistake), 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: sadcl COMMAND ...\n")
        print("\n".join(f"  {name:10}{about}" for name, about in COMMANDS.items()))
        print("\n`sadcl COMMAND --help` explains a command.")
        return 0 if arguments else 2
    if arguments[0] == "--version":
        from sadcl import __version__

        print(f"sadcl {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"sadcl: unknown command {name!r}; expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    command = {
        "train": _train,
        "eval": _eval,
        "study": _study,
        "predict": _predict,
        "export": _export,
        "bench": _bench,
        "fetch": _fetch,
        "doctor": _doctor,
    }[name]
    with _ending(), _stream("stdout"), _stream("stderr"):
        try:
            code = command(rest)
            sys.stdout.flush()
            return code
        except BaseException as error:
            excused = _excuse(name, error)
            if excused is None:
                raise
            return excused


def _excuse(name: str, error: BaseException) -> int | None:
    """Say in one line what stopped a command; returns the exit code, or None for what is our own mistake."""
    from sadcl.checkpoint import behind

    if behind(error, KeyboardInterrupt) is not None:  # a library may have made another error of it
        print(f"\nsadcl {name}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # the reader of our output has left: `sadcl predict ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if os.environ.get("SADCL_TRACEBACK"):
        return None
    if isinstance(error, ImportError):
        extras = "train,export" if name == "export" else "train"
        hint = "" if error.name is None or error.name.startswith("sadcl") else f"; try: pip install 'sadcl[{extras}]'"
        print(f"sadcl {name}: error: {error}{hint}", file=sys.stderr)
        return 2
    if isinstance(error, ValueError | OSError | FloatingPointError):
        print(f"sadcl {name}: error{_process()}: {error}", file=sys.stderr)
        return 2
    return None


@contextmanager
def _ending() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, without half-written files; then the signal has its way.

    Not among several processes: one that waits for another could not obey, and torchrun would wait for it.
    """
    came: list[int] = []

    def stop(number: int, frame: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    names = ("SIGTERM", "SIGHUP") if os.environ.get("WORLD_SIZE", "1") == "1" else ()
    ours = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        ours = []
    ours = [number for number in ours if signal.getsignal(number) is signal.SIG_DFL]  # nohup's stays
    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
        if came:
            os.kill(os.getpid(), came[0])


@contextmanager
def _stream(name: str) -> Iterator[None]:
    """Have a text stream of ``sys`` that takes everything, for as long as the context lasts.

    Programs without a console have none (None): nothing is said. What an encoding lacks is escaped: a label's name
    stops no command.
    """
    stream = getattr(sys, name)
    if stream is None:
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            setattr(sys, name, nowhere)
            try:
                yield
            finally:
                setattr(sys, name, None)
    elif getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            with suppress(OSError):  # it flushes, and the reader may have left
                stream.reconfigure(errors="strict")
    else:
        yield


def _process() -> str:
    """Which process this is, if torchrun started several."""
    count = os.environ.get("WORLD_SIZE", "1")
    return "" if count == "1" else f" (process {os.environ.get('RANK')} of {count})"


def _train(arguments: list[str]) -> int:
    from sadcl.train.config import parse_arguments

    asked = parse_arguments(arguments)  # before anything heavy is imported: --help is quick
    if asked.dry_run:
        from sadcl.commands.plan import plan

        if os.environ.get("RANK", "0") == "0":
            print(plan(asked.config))
        return 0
    from sadcl.commands.train import train

    train(asked.config, asked.resume, edited=asked.edited)
    return 0


def _study(arguments: list[str]) -> int:
    if arguments[:1] == ["table"]:
        return _study_table(arguments[1:])
    from sadcl.study.config import parse_study

    config, dry_run = parse_study(arguments)
    from sadcl.commands.study import study

    study(config, dry_run)
    return 0


def _study_table(arguments: list[str]) -> int:
    from sadcl.study.table.config import parse_table_study

    config, dry_run = parse_table_study(arguments)
    from sadcl.commands.study_table import study_table

    study_table(config, dry_run)
    return 0


def _eval(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="sadcl eval", description=COMMANDS["eval"])
    parser.add_argument("checkpoint", help="a .pt file written by sadcl train")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--csv", metavar="FILE", help="measure on this list (lines of path,label;label) instead")
    instead.add_argument(
        "--jsonl", metavar="FILE", help="measure on this list (JSON lines with path and labels) instead"
    )
    instead.add_argument("--coco-json", metavar="FILE", help="measure on the pictures of this COCO-format file instead")
    instead.add_argument("--voc-archive", metavar="FILE", help="measure nothing: write VOC 2012 test's server archive")
    parser.add_argument("--root", help="folder of the pictures, if they have moved since training")
    parser.add_argument("--label-separator", metavar="TEXT", help="what stands between the labels of a cell of --csv")
    parser.add_argument(
        "--threshold",
        "--thresholds",
        type=_threshold,
        default=0.5,
        metavar="P",
        help="probability above which a label counts as given, or `tuned`: the checkpoint's own (default: 0.5)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args(arguments)

    from sadcl.commands.evaluate import evaluate_checkpoint

    if options.voc_archive:
        from sadcl.commands.voc_archive import voc_archive

        path, count, competition = voc_archive(options.checkpoint, options.voc_archive, options.root)
        print(f"{path}: {count} pictures, competition comp{competition}")
        return 0
    source = next((name for name in ("csv", "jsonl", "coco_json") if getattr(options, name)), "csv")
    pictures = getattr(options, source)
    report, about = evaluate_checkpoint(
        options.checkpoint, pictures, options.root, options.threshold, source, options.label_separator
    )
    if options.json:
        print(dumps({**report.as_dict(), "images": about}, indent=1))
        return 0
    print(f"{options.checkpoint} on {about} [{report.protocol}]")
    for name in ("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"):
        print(f"  {name:4} {getattr(report, name):.4f}")
    return 0


def _threshold(text: str) -> float | str:
    from sadcl.commands.predict import parse_threshold

    return parse_threshold(text)


def _predict(arguments: list[str]) -> int:
    from sadcl.commands.predict import main as predict

    return predict(arguments)


def _export(arguments: list[str]) -> int:
    from sadcl.commands.export import main as export

    return export(arguments)


def _bench(arguments: list[str]) -> int:
    if not os.path.isfile(os.path.join("benchmarks", "device.py")):
        raise ValueError("benchmarks are not installed with the package: run this in a checkout's folder")
    sys.path.insert(0, os.getcwd())
    return int(importlib.import_module("benchmarks.device").main(arguments))


def _fetch(arguments: list[str]) -> int:
    from sadcl.data.fetch import main as fetch

    return fetch(arguments)


def _doctor(arguments: list[str]) -> int:
    argparse.ArgumentParser(prog="sadcl doctor", description=COMMANDS["doctor"]).parse_args(arguments)
    import platform

    import torch

    import sadcl

    print(f"sadcl {sadcl.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(f"threads: {torch.get_num_threads()} (torch.get_num_threads), {os.cpu_count()} CPUs")
    print(f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch can use'}")
    print("backends:")
    for name, info in sadcl.backends().items():
        state, why = ("works", info.detail) if info.available else ("no", info.reason)
        print(f"  {name:10} {state:6} {why}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
