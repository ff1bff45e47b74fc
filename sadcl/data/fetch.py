"""``sadcl fetch``: bring Debian's photo cut-outs onto this machine through apt.

As root the two packages are installed. Anyone else gets them downloaded (with package lists in a private apt
state, so nothing of the system is touched) and unpacked into the user's cache. Exit codes: 0 there, 3 not
available here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sadcl.data.sources import SourceNotFound, cache_dir, find_source

PACKAGES = ("tuxpaint-stamps-default", "tuxpaint-data")
EXIT_UNAVAILABLE = 3
NEEDED = (
    f"the photo cut-outs are in the packages {' and '.join(PACKAGES)} of Debian and Ubuntu (universe); unpack them "
    "(dpkg-deb -x) and give their usr/share/tuxpaint as `sadcl train --data.source photos --data.root FOLDER`, or "
    "train on drawings: pip install 'sadcl[emoji]'"
)


def _run(command: list[str], cwd: Path | None = None) -> None:
    print("+", " ".join(command), flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(command, check=True, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def fetch_as_root() -> None:
    """Refresh the package lists and install both packages (files only: no recommended packages)."""
    _run(["apt-get", "-q", "update"])
    _run(["apt-get", "-q", "install", "--yes", "--no-install-recommends", *PACKAGES])


def fetch_into(folder: Path) -> None:
    """Download both packages with a private apt state and unpack their pictures to ``folder``."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fetch-") as name:
        scratch = Path(name)
        for part in ("state/lists/partial", "cache/archives/partial", "debs", "root"):
            (scratch / part).mkdir(parents=True)
        private = ["-o", f"Dir::State={scratch}/state", "-o", f"Dir::State::lists={scratch}/state/lists"]
        private += ["-o", "Dir::State::status=/var/lib/dpkg/status", "-o", f"Dir::Cache={scratch}/cache"]
        if os.geteuid() == 0:  # apt would drop to a user that cannot enter a private folder
            private += ["-o", "APT::Sandbox::User=root"]
        _run(["apt-get", "-q", *private, "update"])
        _run(["apt-get", "-q", *private, "download", *PACKAGES], cwd=scratch / "debs")
        for package in sorted((scratch / "debs").glob("*.deb")):
            _run(["dpkg-deb", "-x", str(package), str(scratch / "root")])
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch / "root/usr/share/tuxpaint", folder)


def main(argv: list[str] | None = None) -> int:
    """Fetch the photos unless they are there; say what happened."""
    parser = argparse.ArgumentParser(prog="sadcl fetch", description=__doc__)
    parser.add_argument("--into", type=Path, help="unpack into this folder instead of installing")
    into = parser.parse_args(argv).into
    try:
        source = find_source("photos", into)
        print(f"photos are here: {source.title}, {source.num_objects} objects")
        return 0
    except SourceNotFound:
        pass
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        print(f"no apt (apt-get and dpkg-deb) on this machine: {NEEDED}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    try:
        if into is None and os.geteuid() == 0:
            fetch_as_root()
        else:
            fetch_into(into or cache_dir() / "tuxpaint")
        source = find_source("photos", into)
    except (subprocess.CalledProcessError, OSError, SourceNotFound) as error:
        print(f"the photo cut-outs could not be fetched: {error}\n{NEEDED}", file=sys.stderr)
        return EXIT_UNAVAILABLE
    print(f"fetched: {source.title}, {source.num_objects} objects")
    return 0


if __name__ == "__main__":
    sys.exit(main())
