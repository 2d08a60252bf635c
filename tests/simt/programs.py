"""Programs of the emulator and kernels, compiled as setup.py compiles kernels: watched, or under AddressSanitizer."""

from __future__ import annotations

import fcntl
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.test_build import CSRC, setup

FOLDER = Path(__file__).parent
CXX = setup.find_cxx()
needs_compiler = pytest.mark.skipif(not CXX, reason="no C++ compiler")


@dataclass
class Program:
    """A compiled program; each case of it is a process."""

    path: Path

    def run(self, case: str) -> tuple[int, str]:
        """Exit status and all that it printed."""
        command = [str(self.path), case]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
        return done.returncode, done.stdout


def compiled(
    factory: pytest.TempPathFactory,
    worker: str,
    name: str,
    kernels: Sequence[Path],
    host: Sequence[Path] = (),
    *,
    sanitized: bool,
) -> Program:
    """The program of files with kernels and of others, compiled once for all of pytest-xdist's workers."""
    folder = factory.getbasetemp()
    folder = folder if worker == "master" else folder.parent
    program = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            flags = ["-std=c++20", "-O1", *setup.WARNINGS, *["-fsanitize=address"] * sanitized]
            instrument = [] if sanitized else setup.SIMT_WATCHED
            objects = [folder / f"{name}-{source.name}.o" for source in kernels]
            for source, target in zip(kernels, objects):
                run([*CXX, *flags, *setup.SIMT, *instrument, "-c", source, "-o", target])
            run([*CXX, *flags, *sorted(CSRC.glob("simt/*.cpp")), *host, *objects, "-o", program])
    return Program(program)


def run(command: list[str | Path]) -> None:
    """A compiler, which must have nothing to say."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{shlex.join(str(c) for c in command)}\n{done.stdout}"
