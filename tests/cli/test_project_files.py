"""What a repository has beside its code: readable, complete, and in agreement with the code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import sadcl

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".github").is_dir(), reason="away from the sources")


def test_yaml_files_are_read() -> None:
    files = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
    assert len(files) >= 9
    for file in files:
        assert isinstance(yaml.safe_load(file.read_text()), dict), file


def test_workflows_name_what_there_is() -> None:
    """Jobs have steps, a time limit or none to hit, and the commands and folders in them exist."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = file.read_text()
        content = yaml.safe_load(text)
        assert content["permissions"]["contents"] == "read"
        for job in content["jobs"].values():
            assert job["runs-on"] and job["steps"][0]["uses"].startswith("actions/checkout@")
        for target in re.findall(r"make ([a-z]+)", text):
            assert target in targets
        for path in re.findall(r"(?:tests|benchmarks|\.ci)/[\w/.]+", text):
            assert (ROOT / path).exists(), path


def test_citation_names_paper_and_version() -> None:
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert content["cff-version"] == "1.2.0" and content["version"] == sadcl.__version__
    assert content["license"] == "Apache-2.0"
    paper = content["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Ma", "Sun", "Wang", "Zhao", "Luo"]
    assert paper["identifiers"][0]["value"] == "arXiv:2307.09715"


def test_address_of_the_repository_is_in_one_place() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    address = "example.org/" + "sadcl"
    files = [ROOT / name for name in listed.stdout.splitlines() if not name.endswith((".png", ".npz"))]
    assert [f.name for f in files if f.is_file() and address in f.read_text(errors="ignore")] == ["pyproject.toml"]


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_help_names_every_command() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert phony is not None
    # Whoever runs the tests by make hands its flags down.
    alone = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(["make", "help"], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert sorted(line.split()[0] for line in done.stdout.splitlines()) == sorted(phony[1].split())
