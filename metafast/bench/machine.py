"""What a figure was measured on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import torch

from metafast import _native
from metafast.version import __version__

Value = str | int | float | None
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: torch.device | None = None) -> dict[str, Value]:
    """The machine and the versions at hand, as plain JSON values; None for what the system does not tell.

    Args:
        device: the one that computes; its GPU, where it is one, is told of in more words.
    """
    status = _native.status()
    gpu = device if device is not None and device.type == "cuda" else None
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
        "gpu": torch.cuda.get_device_name(gpu) if torch.cuda.is_available() else None,
        **({} if gpu is None else _gpu(gpu)),
        "metafast": __version__,
        "extension": "loaded" if status.available else status.reason,
        "isa": status.isa or None,
        "compiler": status.build.compiler if status.available and status.build else None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _gpu(device: torch.device) -> dict[str, Value]:
    """What a time on a GPU hangs on, besides its name."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        **_nvidia_smi(str(properties.uuid)),
    }


def _nvidia_smi(uuid: str) -> dict[str, Value]:
    """The driver, the highest clock and the power limit of a GPU; None where nvidia-smi is not there or fails."""
    asked = {"driver_version": "gpu_driver", "clocks.max.sm": "gpu_max_clock", "power.limit": "gpu_power_limit"}
    values: list[str | None] = [None] * len(asked)
    if program := shutil.which("nvidia-smi"):
        command = [program, f"--id=GPU-{uuid}", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        answers = [value.strip() for value in done.stdout.split(",")]
        if done.returncode == 0 and len(answers) == len(asked):
            values = [*answers]
    return dict(zip(asked.values(), values))


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
