"""Why two float32 trainings of one recipe part, and that two float64 ones do not: Omniglot against the reference.

    export METAFAST_DATA=FOLDER
    python benchmarks/omniglot_agreement.py                  # all four learners
    python benchmarks/omniglot_agreement.py --resume         # those that are not there yet

For the row of omniglot.py of each learner that has a reference beside it:

- float64: the same training by metafast and by ``metafast.reference``, from the same seed over the same tasks, then the
  same test. How far their weights are apart at the end, relative, and whether the accuracies agree, that is differ by
  no more than both intervals together.
- float32: metafast's training again from initial weights off by about one rounding, each multiplied by 1 - 2^-23, 1 or
  1 + 2^-23 at random, several times. The accuracies' spread is what float32 leaves open for this recipe, whoever
  computes it.

A convolution's bias before a batch norm has gradient 0 and no influence. The reference gets rounding noise there, which
Adam makes steps of; those biases are left out of the distance.

benchmarks/results/omniglot-agreement.json is written after every learner. Exits with 1 if learners are left, for want
of time (--minutes), or some do not agree in float64.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import omniglot
import torch
from omniglot import CPU, Reference, opened, recipe_of
from torch import nn

from metafast.bench.machine import describe_machine
from metafast.cli.evaluation import recipe_to_test
from metafast.cli.recipe import AnyLearner, Tasks
from metafast.episodes import Episodes

RESULT = omniglot.RESULT.with_name("omniglot-agreement.json")
ROWS = omniglot.WITH_REFERENCE
# Weights of float64 trainings that are the same but for roundings; hundreds of meta-steps make them grow.
BAR = 1e-6
TRAININGS = 4


class Float64(Tasks):
    """The same tasks, in float64."""

    def sample(self, tasks: int, generator: torch.Generator) -> Episodes:
        return super().sample(tasks, generator).to(dtype=torch.float64)


def nudged(learner: AnyLearner, seed: int) -> AnyLearner:
    """The learner with every weight off by one rounding or none."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in learner.parameters():
            sign = torch.randint(-1, 2, weight.shape, generator=generator)
            weight.mul_(1 + torch.finfo(weight.dtype).eps * sign)
    return learner


def weights_apart(first: nn.Module, second: nn.Module) -> float:
    """|first - second| / |second| over all weights that have influence."""
    idle = {
        f"{prefix}{'.' if prefix else ''}{conv}.bias"
        for prefix, module in first.named_modules()
        if isinstance(module, nn.Sequential)
        for (conv, before), (_, after) in zip(module.named_children(), list(module.named_children())[1:])
        if isinstance(before, nn.Conv2d) and isinstance(after, nn.BatchNorm2d)
    }
    one, other = (
        torch.cat([weight.detach().flatten() for name, weight in side.named_parameters() if name not in idle])
        for side in (first, second)
    )
    return float((one - other).norm() / other.norm())


def run(row: str, root: Path, trainings: int, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything a learner has, as plain JSON values."""
    recipe, lengths = recipe_of(row)
    result: dict[str, Any] = {
        "recipe": recipe.plain(),
        **lengths,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    assert recipe.source is not None
    data = {split: opened(root, recipe.source, split) for split in ("train", "test")}

    def tasks(kind: type[Tasks]) -> tuple[Tasks, Tasks]:
        return (
            kind(recipe, test=False, root=root, device=CPU, data=data["train"]),
            kind(recipe_to_test(recipe), test=True, root=root, device=CPU, data=data["test"]),
        )

    train = functools.partial(omniglot.train_and_test, recipe, lengths)
    ours, found = train(*tasks(Float64), lambda learner: learner.double())
    theirs, expected = train(*tasks(Float64), lambda learner: Reference(learner.double()))
    apart, by = weights_apart(ours, theirs), omniglot.agrees(found, expected)
    result["float64"] = {
        "metafast": found,
        "reference": expected,
        "weights_apart": float(f"{apart:.2e}"),
        "agrees": by and apart <= BAR,
    }
    say(f"{row}: float64 {omniglot.words(found)}, reference {omniglot.words(expected)}, weights {apart:.1e} apart")
    result["float32"] = []
    for seed in range(trainings):
        _, found = train(*tasks(Tasks), functools.partial(nudged, seed=seed))
        result["float32"].append(found)
        say(f"{row}: float32, weights off by a rounding, {omniglot.words(found)}")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run learners; 1 if some are left or do not agree in float64, 2 for bad input."""
    parser = argparse.ArgumentParser(description="Omniglot in float64 against the reference, and float32's own spread.")
    parser.add_argument("rows", nargs="*", metavar="ROW", help="one of omniglot.py's with a reference; all when none")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("METAFAST_DATA"), help="or METAFAST_DATA")
    parser.add_argument("--minutes", type=float, default=22.0, help="no learner is begun after so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--trainings", type=int, default=TRAININGS, help="in float32")
    parser.add_argument("--resume", action="store_true", help="leave the learners that are there")
    options = parser.parse_args(arguments)
    rows = options.rows or ROWS
    if unknown := [row for row in rows if row not in ROWS]:
        parser.error(f"ROW: expected some of {', '.join(ROWS)}; got {', '.join(unknown)}")
    if options.data_root is None:
        parser.error("--data-root: expected the folder of Omniglot's files (or METAFAST_DATA)")
    torch.set_num_threads(options.threads)
    document = omniglot.load(RESULT) if options.rows or options.resume else {"rows": {}}
    document |= {"machine": describe_machine(), "threads": options.threads}
    done = document["rows"]
    began, left = time.monotonic(), []
    for row in rows:
        recipe, lengths = recipe_of(row)
        if options.resume and row in done and omniglot.same(done[row], recipe.plain() | lengths):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            left.append(row)
            continue
        done[row] = run(row, Path(options.data_root), options.trainings, functools.partial(print, flush=True))
        document["minutes"] = round((time.monotonic() - began) / 60, 2)
        omniglot.save(document, RESULT)
    apart = [row for row in rows if row in done and not done[row]["float64"]["agrees"]]
    if left:
        print(f"no time was left for {', '.join(left)}; to go on: --resume")
    if apart:
        print(f"the reference does not agree in float64 on {', '.join(apart)}")
    return int(bool(left or apart))


if __name__ == "__main__":
    sys.exit(main())
