"""``metafast info``: what is installed, what was built and what is in force."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

import metafast
from metafast import _native
from metafast.backend import BACKENDS, current_backend
from metafast.cli.tables import show
from metafast.data._cache import cache_folder
from metafast.version import __version__

Fact = tuple[str, str]


def info() -> None:
    """Print the version, what was built and what not, and why; backends, threads, settings and the cache folder."""
    show("metafast", ("what", "value"), facts())


def facts() -> list[Fact]:
    """What there is to say, a name and a value each."""
    folder = cache_folder()
    return [
        ("metafast", f"{__version__} in {Path(metafast.__file__).parent}"),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("GPU", _gpu()),
        *_extension(_native.status()),
        ("backend", f"{current_backend()} (of {', '.join(BACKENDS)})"),
        ("threads", f"{torch.get_num_threads()} of torch's, on {os.cpu_count()} processors"),
        ("cache", f"{folder}{'' if folder.is_dir() else ', not there yet'}"),
        *(_variables() or [("METAFAST_*", "none set")]),
    ]


def _extension(status: _native.Status) -> list[Fact]:
    found = f"loaded, for {' and '.join(status.backends)}" if status.available else f"no: {status.reason}"
    built = status.build
    if built is None:
        return [("extension", found)]
    rows = [
        ("extension", found),
        ("built for", f"torch {built.torch or 'none'}, python {built.python}, {built.machine}"),
    ]
    if not built.extension:
        return rows
    cuda = f"nvcc {built.cuda} for {', '.join(built.cuda_archs)}" if built.cuda else f"no: {built.cuda_reason}"
    return [
        *rows,
        ("compiler", built.compiler),
        ("instruction sets", f"built {', '.join(built.isas)}; here {', '.join(status.isas) or 'none'}"),
        ("in use", status.isa or "none"),
        ("sanitizers", ", ".join(built.sanitizers) or "none"),
        ("CUDA kernels", cuda),
    ]


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{', '.join(names)}; CUDA {torch.version.cuda}"


def _variables() -> list[Fact]:
    return sorted((name, value) for name, value in os.environ.items() if name.startswith("METAFAST_"))
