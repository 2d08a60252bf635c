"""The sinusoid experiment of the MAML paper: 70,000 meta-steps of 25 tasks by ``metafast train``, then unseen waves.

    python benchmarks/paper_sinusoid.py

Finn, Abbeel & Levine 2017, table 2: the 5-shot error after 1, 5 and 10 steps is 0.67, 0.38 and 0.35. Trains with one
inner step and 5 or 10 support points on two threads; writes the time and the errors of 600 unseen tasks to
``benchmarks/results/sinusoid-paper.json``, and exits with 1 if a 5-shot error is above the paper's.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from metafast.bench.machine import describe_machine

RESULT = Path(__file__).parent / "results" / "sinusoid-paper.json"
PAPER = {1: 0.67, 5: 0.38, 10: 0.35}
STEPS = max(PAPER)


def run(shots: int, folder: Path) -> dict[str, Any]:
    """Train and test; seconds of training and the errors by inner steps."""
    metafast = [sys.executable, "-m", "metafast"]
    settings = {"shots": shots, "steps": 1, "lr": 0.01, "meta-lr": 0.001, "iterations": 70000, "threads": 2}
    options = [f"--{name}={value}" for name, value in settings.items()]
    command = ["train", "maml", "--data=sinusoid", *options, "--log-every=1000", f"--out={folder}"]
    subprocess.run([*metafast, *command], check=True)
    tested = folder / "tested"
    subprocess.run(
        [*metafast, "eval", str(folder / "checkpoint.pt"), f"--steps={STEPS}", f"--out={tested}"], check=True
    )
    last = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    result = json.loads((tested / "result.json").read_text(encoding="utf-8"))
    return {"settings": settings, "train_seconds": json.loads(last)["seconds"], **result}


def main() -> int:
    """Both runs; 1 if the errors are not the paper's."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        runs = {f"{shots}-shot": run(shots, Path(folder, str(shots))) for shots in (5, 10)}
    document = {"machine": describe_machine(), "paper": PAPER, "runs": runs}
    RESULT.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    errors = {row["steps"]: row["mean"] for row in runs["5-shot"]["losses"]}
    for steps, bar in PAPER.items():
        print(f"5-shot, after {steps}: {errors[steps]:.3f}, the paper's {bar}")
    return int(any(errors[steps] > bar for steps, bar in PAPER.items()))


if __name__ == "__main__":
    sys.exit(main())
