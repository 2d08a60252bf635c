"""The source distribution holds what is in the repository: an extension is built from it without git.

`setuptools.build_meta` makes it of a copy of the tracked files, so that no earlier list of files has a say in it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
# What setuptools writes.
WRITTEN = {"PKG-INFO", "setup.cfg", "metafast.egg-info"}


def tracked() -> set[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no git repository: which files belong to it is not known")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return {name for name in listed.split("\0") if name and (ROOT / name).is_file()}  # one may be deleted just now


def packed(source: Path, to: Path) -> set[str]:
    """The files of the source distribution that is made of a folder."""
    environment = os.environ | {"METAFAST_NO_EXTENSION": "1"}  # which a source distribution does not hang on
    subprocess.run([sys.executable, "-c", MAKE, str(to)], cwd=source, env=environment, check=True, capture_output=True)
    (path,) = to.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        return {"/".join(Path(member.name).parts[1:]) for member in archive.getmembers() if member.isfile()}


def copied(names: set[str], to: Path) -> Path:
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    return to


def test_it_holds_every_tracked_file_and_no_other(tmp_path: Path) -> None:
    names = tracked()
    found = packed(copied(names, tmp_path / "copy"), tmp_path / "dist")
    wanted = {name for name in names if not name.startswith((".ci/", ".git"))}
    assert wanted - found == set()
    assert {name for name in found - wanted if name.split("/")[0] not in WRITTEN} == set()
    for folder, suffixes in (("csrc", {".h", ".cpp", ".cu", ".cuh"}), ("metafast", {".py", ".typed"})):
        assert {Path(name).suffix for name in found if name.startswith(f"{folder}/")} >= suffixes


def test_what_a_build_leaves_is_not_in_it(tmp_path: Path) -> None:
    copy = copied(tracked(), tmp_path / "copy")
    left = ("metafast/_C.cpython-311-x86_64-linux-gnu.so", "metafast/_build_info.json", "tests/__pycache__/nets.pyc")
    for name in left:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_bytes(b"")
    assert packed(copy, tmp_path / "dist") & set(left) == set()
