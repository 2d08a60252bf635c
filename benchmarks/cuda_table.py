"""Registers, spills, shared memory and theoretical occupancy of every CUDA kernel, on each architecture.

``make cuda-check`` runs this after its build, and fails where the kernels got worse than benchmarks/cuda_kernels.json
has them; ``make cuda-table`` writes that file. Nothing here runs a kernel: the numbers are ptxas's, the occupancy
NVIDIA's formula.

    python benchmarks/cuda_table.py             compare, and write build/cuda-check/kernels.{json,txt}
    python benchmarks/cuda_table.py --accept    write benchmarks/cuda_kernels.json as well
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "cuda_kernels.json"
CHECKED = ROOT / "build" / "cuda-check"
ACCEPT = "If this is meant: `make cuda-table`, and commit benchmarks/cuda_kernels.json."

# Registers are given to warps by eights a thread: fewer than that more change nothing.
REGISTER_MARGIN = 8
# Every kernel is hot, and may not spill, but these: a pattern of the name, and why.
MAY_SPILL: dict[str, str] = {}


@dataclass(frozen=True)
class Limits:
    """What a multiprocessor of an architecture has: the CUDA programming guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes
    granularity: int  # of a block's shared memory, bytes
    reserved: int = 1024  # of a block's shared memory, by CUDA, bytes
    registers: int = 65536


_KIB = 1024
LIMITS = {
    "sm_75": Limits(32, 16, 64 * _KIB, 256, reserved=0),
    "sm_80": Limits(64, 32, 164 * _KIB, 128),
    "sm_86": Limits(48, 16, 100 * _KIB, 128),
    "sm_89": Limits(48, 24, 100 * _KIB, 128),
    "sm_90": Limits(64, 32, 228 * _KIB, 128),
    "sm_100": Limits(64, 32, 228 * _KIB, 128),
    "sm_120": Limits(48, 24, 100 * _KIB, 128),
}


@dataclass(frozen=True)
class Usage:
    """What a kernel takes on an architecture; spills are bytes stored and loaded, ``stack`` holds them and arrays."""

    registers: int
    spills: int
    shared: int
    stack: int


@dataclass(frozen=True)
class Kernel:
    """A kernel: usage by architecture, its ``__launch_bounds__`` (0: none), and whether a launch gives it memory."""

    threads: int
    dynamic_shared: bool
    usage: dict[str, Usage]


def parse_ptxas(text: str) -> dict[tuple[str, str], Usage]:
    """What ``ptxas -v`` said, by mangled name and architecture; functions that were not inlined count to the kernel."""
    found: dict[tuple[str, str], Usage] = {}
    for part in re.split(r"^ptxas info\s*: Compiling entry function ", text, flags=re.M)[1:]:
        name = re.match(r"'(\S+)' for '(sm_\d+)\w*'", part)
        used = re.search(r"Used (\d+) registers", part)
        if name is None or used is None:
            raise ValueError(f"ptxas: expected a kernel's name and registers, got {part.splitlines()[0]!r}")
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name[1], name[2]] = Usage(
            int(used[1]),
            sum(int(stores) + int(loads) for _, stores, loads in frames),
            int(shared[1]) if shared else 0,
            max((int(stack) for stack, _, _ in frames), default=0),
        )
    return found


def parse_ptx(text: str) -> dict[str, tuple[int, bool]]:
    """Threads of a block (0: not said) and whether there is dynamic shared memory, by mangled name of a kernel."""
    dynamic = re.findall(r"^\.extern \.shared [^;]*?(\w+)\[\];", text, re.M)
    found = {}
    for part in re.split(r"^\.(?:visible |weak )?\.?entry ", text, flags=re.M)[1:]:
        head, _, body = part.partition("{")
        bound = re.search(r"\.maxntid (\d+)(?:, ?(\d+))?(?:, ?(\d+))?", head)
        threads = 0
        if bound is not None:
            threads = int(bound[1]) * int(bound[2] or 1) * int(bound[3] or 1)
        found[head.partition("(")[0].strip()] = threads, any(re.search(rf"\b{name}\b", body) for name in dynamic)
    return found


def occupancy(usage: Usage, threads: int, limits: Limits, dynamic_shared: int = 0) -> float:
    """The share of a multiprocessor's warps that can be resident, by the formula of NVIDIA's occupancy calculator."""
    warps = -(-threads // 32)
    each = -(-usage.registers * 32 // 256) * 256
    # A multiprocessor's four parts each hold a quarter of the registers.
    by_registers = limits.registers // max(each, 1) // 4 * 4 // warps
    shared = usage.shared + dynamic_shared + limits.reserved
    shared = -(-shared // limits.granularity) * limits.granularity
    by_shared = limits.shared // shared if shared else limits.blocks
    return min(limits.blocks, limits.warps // warps, by_registers, by_shared) * warps / limits.warps


def readable(names: Iterable[str]) -> dict[str, str]:
    """``metafast::cuda::f<float, 4>`` without the namespaces and parameters, by mangled name."""
    names = sorted(set(names))
    done = subprocess.run(["c++filt"], input="\n".join(names), check=True, stdout=subprocess.PIPE, text=True)
    short = {}
    for name, whole in zip(names, done.stdout.splitlines()):
        text = re.sub(r"^void ", "", whole).replace("(anonymous namespace)::", "").replace("metafast::cuda::", "")
        # The parameters follow the last angle bracket that is not inside one of theirs: cut where the depth is 0.
        depth = 0
        for at, character in enumerate(text):
            depth += {"<": 1, ">": -1}.get(character, 0)
            if character == "(" and depth == 0:
                text = text[:at]
                break
        short[name] = text
    if len(set(short.values())) != len(short):
        twice = sorted({text for text in short.values() if list(short.values()).count(text) > 1})
        raise ValueError(f"kernels: expected names of their own, got several of {', '.join(twice)}")
    return short


def kernels_of(files: Iterable[tuple[str, str]]) -> dict[str, Kernel]:
    """The table of a build by readable name: what ptxas said, and the PTX, of each file."""
    usages: dict[tuple[str, str], Usage] = {}
    bounds: dict[str, tuple[int, bool]] = {}
    for said, ptx in files:
        usages |= parse_ptxas(said)
        bounds |= parse_ptx(ptx)
    short = readable(name for name, _ in usages)
    kernels: dict[str, Kernel] = {}
    for name in sorted(short, key=lambda name: short[name]):
        archs = {arch: usage for (one, arch), usage in usages.items() if one == name}
        threads, dynamic = bounds[name]
        kernels[short[name]] = Kernel(threads, dynamic, dict(sorted(archs.items(), key=lambda a: int(a[0][3:]))))
    return kernels


def problems(found: Mapping[str, Kernel], committed: Mapping[str, Mapping[str, list[int]]]) -> list[str]:
    """What is wrong with the kernels, and where they are worse than the committed table; empty: nothing."""
    lines = []
    for name, kernel in found.items():
        if kernel.threads == 0:
            lines.append(f"{name}: expected __launch_bounds__, without which nothing can be said of its occupancy")
        if not any(re.search(pattern, name) for pattern in MAY_SPILL):
            spilling = [f"{u.spills} bytes on {arch}" for arch, u in kernel.usage.items() if u.spills]
            if spilling:
                lines.append(f"{name}: a hot kernel may not spill registers: {', '.join(spilling)}")
        if name not in committed:
            lines.append(f"{name}: not in the committed table")
            continue
        before = committed[name]
        if set(before) != set(kernel.usage):
            lines.append(f"{name}: expected architectures {', '.join(before)}, got {', '.join(kernel.usage)}")
        for arch in (arch for arch in kernel.usage if arch in before):
            usage, (registers, spills, shared) = kernel.usage[arch], before[arch]
            for what, now, then, margin in (
                ("registers", usage.registers, registers, REGISTER_MARGIN),
                ("bytes of spills", usage.spills, spills, 0),
                ("bytes of shared memory", usage.shared, shared, 0),
            ):
                if now > then + margin:
                    lines.append(f"{name}: {now} {what} on {arch}, the committed table has {then}")
    lines += [f"{name}: in the committed table, and not in the build" for name in committed if name not in found]
    lines += [
        f"MAY_SPILL: no kernel is named like {pattern!r}"
        for pattern in MAY_SPILL
        if not any(re.search(pattern, name) for name in found)
    ]
    return lines


def committed_text(found: Mapping[str, Kernel], nvcc: str) -> str:
    """The committed file: a line a kernel, [registers, spills, shared] for each architecture."""
    lines = [
        f"  {json.dumps(name)}: "
        + json.dumps({arch: [u.registers, u.spills, u.shared] for arch, u in kernel.usage.items()})
        for name, kernel in found.items()
    ]
    return f'{{"nvcc": {json.dumps(nvcc)}, "kernels": {{\n' + ",\n".join(lines) + "\n}}\n"


def rows(found: Mapping[str, Kernel]) -> list[dict[str, Any]]:
    """The whole table as plain values, a row a kernel and architecture.

    ``occupancy`` is without the shared memory that launches give, None without launch bounds; with
    ``dynamic_shared`` it falls once a launch gives a block more than ``dynamic_shared_free`` bytes.
    """
    table: list[dict[str, Any]] = []
    for name, kernel in found.items():
        for arch, usage in kernel.usage.items():
            row = {"kernel": name, "arch": arch, **asdict(usage), "threads": kernel.threads or None}
            row |= {"occupancy": None, "dynamic_shared": kernel.dynamic_shared, "dynamic_shared_free": None}
            if kernel.threads:
                limits = LIMITS[arch]
                row["occupancy"] = share = occupancy(usage, kernel.threads, limits)
                if kernel.dynamic_shared and share > 0:
                    blocks = round(share * limits.warps) // -(-kernel.threads // 32)
                    each = limits.shared // blocks // limits.granularity * limits.granularity
                    row["dynamic_shared_free"] = each - limits.reserved - usage.shared
            table.append(row)
    return table


def text_of(table: list[dict[str, Any]]) -> str:
    """The table for people."""
    header = ("kernel", "arch", "registers", "spills", "stack", "shared", "threads", "occupancy")
    lines = [header]
    for row in table:
        share = "-" if row["occupancy"] is None else f"{100 * row['occupancy']:.0f} %"
        if row["dynamic_shared_free"] is not None:
            share += f" up to {row['dynamic_shared_free']:,} B a launch"
        numbers = (str(row[key]) for key in ("registers", "spills", "stack", "shared"))
        lines.append((row["kernel"], row["arch"], *numbers, str(row["threads"] or "-"), share))
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in lines) + "\n"


def built(site: Path) -> tuple[Path, str]:
    """The folder that setup.py compiled in, and nvcc's release, of the package in ``site``."""
    info = json.loads((site / "metafast" / "_build_info.json").read_text())
    if not info["cuda"]:
        raise SystemExit(f"cuda_table: {site} was built without CUDA: {info['cuda_reason']}")
    major, minor = info["python"].split(".")[:2]
    parts = [f"native-cp{major}{minor}", info["torch"], *info["sanitizers"]]
    return ROOT / "build" / "-".join(parts), info["cuda"]


def read(folder: Path) -> dict[str, Kernel]:
    """The kernels of a build, from what ptxas left beside the objects and from the objects' PTX."""
    cuobjdump = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "cuobjdump")
    csrc, files = ROOT / "csrc", []
    for source in sorted(csrc.rglob("*.cu")):
        target = folder / f"{source.relative_to(csrc)}.o"
        said = target.with_name(f"{target.name}.ptxas").read_text()
        dump = subprocess.run([cuobjdump, "--dump-ptx", target], check=True, stdout=subprocess.PIPE, text=True)
        files.append((said, dump.stdout))
    return kernels_of(files)


def main(arguments: list[str] | None = None) -> int:
    """Write the table, and compare or accept it; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accept", action="store_true", help="write benchmarks/cuda_kernels.json")
    accept = parser.parse_args(arguments).accept
    folder, nvcc = built(CHECKED / "site")
    found = read(folder)
    table = rows(found)
    CHECKED.mkdir(parents=True, exist_ok=True)
    (CHECKED / "kernels.json").write_text(json.dumps({"format": 1, "nvcc": nvcc, "kernels": table}, indent=1) + "\n")
    (CHECKED / "kernels.txt").write_text(text_of(table))
    print(f"{len(found)} kernels on {len({row['arch'] for row in table})} architectures: {CHECKED}/kernels.txt")
    if accept:
        COMMITTED.write_text(committed_text(found, nvcc))
    committed = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {"nvcc": nvcc, "kernels": {}}
    wrong = problems(found, committed["kernels"])
    if committed["nvcc"] != nvcc:
        wrong.append(f"nvcc: the committed table is of {committed['nvcc']}, this build of {nvcc}")
    for line in wrong:
        print(line, file=sys.stderr)
    if wrong:
        print(ACCEPT, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
