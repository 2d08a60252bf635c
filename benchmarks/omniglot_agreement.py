"""Omniglot against the reference in float64, all along the training, and how far float32 trainings part by themselves.

    export METAFAST_DATA=FOLDER
    python benchmarks/omniglot_agreement.py                  # all four learners
    python benchmarks/omniglot_agreement.py --resume         # those that are not there yet

For the row of omniglot.py of each learner that has a reference beside it:

- gradients: at every tenth step of metafast's float64 training the reference's meta-gradient at the same weights and
  tasks; the largest relative error. It agrees up to 1e-10.
- float64: the same training by metafast and by ``metafast.reference``, from the same seed over the same tasks, then the
  same test. How far their weights are apart at the end, relative, and whether the accuracies agree, that is differ by
  no more than both intervals together. Training may amplify roundings: LOMAML's, whose optimiser sees logarithms
  and signs of gradients, doubles them at each of its first meta-steps, and ends elsewhere even in float64.
- float32: metafast's training again from initial weights off by about one rounding, each multiplied by 1 - 2^-23, 1 or
  1 + 2^-23 at random, several times. The accuracies' spread is what float32 leaves open for this recipe, whoever
  computes it.

A convolution's bias before a batch norm has gradient 0 and no influence. The reference gets rounding noise there, which
Adam makes steps of; those biases are left out of the distance.

benchmarks/results/omniglot-agreement.json is written after every part. Exits with 1 if parts are left, for want of time
(--minutes), or gradients or float64 accuracies do not agree.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import omniglot
import torch
from omniglot import Reference, arguments_of, recipe_of
from torch import Tensor, nn

from metafast.checks.compare import flat_gradient, relative_error
from metafast.cli.recipe import AnyLearner, Tasks
from metafast.episodes import Episodes, Outcome

RESULT = omniglot.RESULT.with_name("omniglot-agreement.json")
ROWS = omniglot.WITH_REFERENCE
BAR = 1e-10
EVERY = 10
TRAININGS = 4


class Float64(Tasks):
    """The same tasks, in float64."""

    def sample(self, tasks: int, generator: torch.Generator) -> Episodes:
        return super().sample(tasks, generator).to(dtype=torch.float64)


class Watched(Reference):
    """A learner that is compared with the reference at every so many of its steps."""

    def __init__(self, learner: AnyLearner, every: int) -> None:
        super().__init__(learner)
        self.every, self.calls, self.errors = every, 0, list[float]()

    def forward(self, episodes: Episodes) -> Outcome:
        found: Outcome = self.learner(episodes)
        return found

    def accumulate_grad(self, episodes: Episodes) -> Outcome:
        found = self.learner.accumulate_grad(episodes)
        if self.calls % self.every == 0:
            weights = list(self.learner.parameters())
            exact = torch.autograd.grad(self._outcome(episodes).loss, weights, materialize_grads=True)
            self.errors.append(relative_error(flat_gradient(weights), _flat(exact)))
        self.calls += 1
        return found


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


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
        _flat(weight for name, weight in side.named_parameters() if name not in idle) for side in (first, second)
    )
    return relative_error(one, other)


class Row:
    """A learner's parts, each as plain JSON values."""

    def __init__(self, row: str, root: Path, trainings: int) -> None:
        self.recipe, self.lengths = recipe_of(row)
        self.root, self.trainings = root, trainings

    def settings(self) -> dict[str, Any]:
        return {"recipe": self.recipe.plain(), **self.lengths}

    def gradients(self) -> dict[str, Any]:
        watched: list[Watched] = []

        def watch(learner: AnyLearner) -> Watched:
            watched.append(Watched(learner.double(), EVERY))
            return watched[0]

        self._train(Float64, watch)
        largest = max(watched[0].errors)
        return {"steps": len(watched[0].errors), "largest_error": float(f"{largest:.2e}"), "agrees": largest <= BAR}

    def float64(self) -> dict[str, Any]:
        ours, found = self._train(Float64, lambda learner: learner.double())
        theirs, expected = self._train(Float64, lambda learner: Reference(learner.double()))
        return {
            "metafast": found,
            "reference": expected,
            "weights_apart": float(f"{weights_apart(ours, theirs):.2e}"),
            "agrees": omniglot.agrees(found, expected),
        }

    def float32(self) -> list[dict[str, Any]]:
        return [self._train(Tasks, functools.partial(nudged, seed=seed))[1] for seed in range(self.trainings)]

    def _train(self, kind: type[Tasks], by: Callable[[AnyLearner], Any]) -> tuple[AnyLearner, dict[str, Any]]:
        tasks = omniglot.tasks_of(self.recipe, self.root, kind)
        learner, found = omniglot.train_and_test(self.recipe, self.lengths, *tasks, by)
        return learner, {"accuracy": found["accuracy"]}  # nobody compares times here


PARTS: dict[str, Callable[[Row], Any]] = {
    "gradients": Row.gradients,
    "float64": Row.float64,
    "float32": Row.float32,
}


def words(part: str, found: Any) -> str:
    """A part in a line."""
    if part == "gradients":
        return f"errors of at most {found['largest_error']:.1e} at {found['steps']} steps"
    if part == "float32":
        return ", ".join(omniglot.percent(one["accuracy"]) for one in found)
    sides = " and ".join(omniglot.percent(found[side]["accuracy"]) for side in ("metafast", "reference"))
    return f"{sides}, weights {found['weights_apart']:.1e} apart"


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; 1 if some are left or do not agree, 2 for bad input."""
    parser = arguments_of("Omniglot in float64 against the reference, and float32's own spread.", 22.0, "part")
    parser.add_argument("--trainings", type=int, default=TRAININGS, help="in float32")
    options = parser.parse_args(arguments)
    rows = omniglot.rows_of(parser, options, ROWS)
    document = omniglot.begun(parser, options, RESULT)
    began, left = time.monotonic(), []
    for name in rows:
        row = Row(name, Path(options.data_root), options.trainings)
        done = document["rows"].get(name)
        if not (options.resume and done is not None and omniglot.same(done, row.recipe.plain() | row.lengths)):
            done = document["rows"][name] = row.settings()
        for part, work in PARTS.items():
            if part in done:
                continue
            if time.monotonic() - began > 60 * options.minutes:
                left.append(f"{name}: {part}")
                continue
            done[part] = work(row)
            print(f"{name}: {part}: {words(part, done[part])}", flush=True)
            omniglot.save(document, RESULT)
    checked = [(name, part) for name in rows for part in ("gradients", "float64") if part in document["rows"][name]]
    apart = [f"{name}: {part}" for name, part in checked if not document["rows"][name][part]["agrees"]]
    if left:
        print(f"no time was left for {', '.join(left)}; to go on: --resume")
    if apart:
        print(f"the reference does not agree on {', '.join(apart)}")
    return int(bool(left or apart))


if __name__ == "__main__":
    sys.exit(main())
