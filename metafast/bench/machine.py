"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from metafast import _native
from metafast.version import __version__

Value = str | int | float | None
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> dict[str, Value]:
    """The machine and the versions at hand, as plain JSON values; None for what the system does not tell."""
    status = _native.status()
    return {
        "cpu": _cpu_name(),
        "cores": _physical_cores(),
        "logical_cpus": _usable_cpus(),
        "memory_gib": _memory_gib(),
        "governor": _read(_GOVERNOR),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "metafast": __version__,
        "extension": "loaded" if status.available else status.reason,
        "isa": status.isa or None,
        "compiler": status.build.compiler if status.available and status.build else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    names = _cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _physical_cores() -> int | None:
    """Cores of all sockets, hyperthreads counted once; None where /proc/cpuinfo does not say."""
    return len(set(zip(_cpuinfo("physical id"), _cpuinfo("core id")))) or None


def _usable_cpus() -> int | None:
    """Logical processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_gib() -> float | None:
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


def _cpuinfo(key: str) -> list[str]:
    """The values of a key of /proc/cpuinfo, a processor each; empty where there is none."""
    pairs = (line.partition(":") for line in (_read(_CPUINFO) or "").splitlines())
    return [value.strip() for name, _, value in pairs if name.strip() == key]


def _read(path: Path) -> str | None:
    return path.read_text().strip() if path.is_file() and os.access(path, os.R_OK) else None
