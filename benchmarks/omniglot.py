"""Real Omniglot: the recipes of recipes/omniglot, trained on one background small set, tested on the other's alphabets.

    export METAFAST_DATA=FOLDER
    python benchmarks/omniglot.py                           # all rows, in the place of what is there
    python benchmarks/omniglot.py --resume                  # the rows that are not there yet
    python benchmarks/omniglot.py small/maml-5way-1shot     # this row anew
    python benchmarks/omniglot.py --list                    # the rows and their commands

A row is a source and a recipe. "small" trains on images_background_small1 and tests on the alphabets of small2 that it
lacks, "small-swapped" the other way round. Training and the first test are those of ``metafast train --recipe``, to the
same bits; then the learner is tested on

- transductive: the queries of a task share their batch statistics (the command's own test);
- inductive, what a query is told does not hang on the others. MAML and its like: each query goes through the adapted
  network together with the support set alone. ProtoNets: running statistics, which the encoder collects over training
  tasks after its training.
- within alphabet (20-way 1-shot): all classes of a task are of one alphabet, of those with 20 characters or more, the
  same number of tasks of each.

For one row of each learner, ``metafast.reference`` does the same training from the same seed, over the same tasks, and
the same transductive test. Accuracies are means over tasks with 95 % intervals; they agree when they differ by no more
than both intervals together. Two float32 trainings may part by more, for no other reason than roundings:
omniglot_agreement.py shows that float64 ones do not. benchmarks/results/omniglot.json is written after every row. Exits
with 1 if rows are left, for want of time (--minutes).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import metafast as mf
from metafast import reference
from metafast.bench.machine import describe_machine
from metafast.cli.evaluation import Estimate, evaluate, recipe_to_test
from metafast.cli.recipe import AnyLearner, Recipe, Tasks
from metafast.cli.recipe_file import read_recipe
from metafast.cli.trainer import Trainer
from metafast.data import Omniglot
from metafast.episodes import Outcome

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "omniglot.json"
RECIPES = ROOT / "recipes" / "omniglot"
SOURCES = ("small", "small-swapped")
LEARNERS = ("maml", "fomaml", "lomaml", "protonets")
TASKS = ("5way-1shot", "5way-5shot", "20way-1shot", "20way-5shot")
ROWS = [f"{source}/{learner}-{task}" for source in SOURCES for learner in LEARNERS for task in TASKS]
WITH_REFERENCE = [f"small/{learner}-5way-1shot" for learner in LEARNERS]
CPU = torch.device("cpu")
# Support samples and query together that the inductive test has of a task, about; and its tasks.
_INDUCTIVE_SAMPLES = 500
_INDUCTIVE_TASKS = 200
_AT_ONCE = 10
_STATISTICS_TASKS = 50


def recipe_of(row: str) -> tuple[Recipe, dict[str, Any]]:
    """A row's recipe, and the lengths of its training and its test."""
    source, name = row.split("/")
    given = read_recipe(RECIPES / f"{name}.yaml") | {"source": source}
    lengths = {name: given.pop(name) for name in ("iterations", "eval_tasks")}
    return Recipe.of(given.pop("learner"), given.pop("data"), given), lengths


def command(row: str) -> str:
    """What trains and tests a row by the command line."""
    source, name = row.split("/")
    return f"metafast train --recipe recipes/omniglot/{name}.yaml --source {source}"


@functools.cache
def opened(root: Path, source: str, split: str) -> Omniglot:
    return Omniglot(root, split, source=source)


def tasks_of(recipe: Recipe, root: Path, kind: type[Tasks] = Tasks) -> tuple[Tasks, Tasks]:
    """The tasks to train on, and the unseen ones to test on."""
    assert recipe.source is not None
    train, test = (opened(root, recipe.source, split) for split in ("train", "test"))
    return (
        kind(recipe, test=False, root=root, device=CPU, data=train),
        kind(recipe_to_test(recipe), test=True, root=root, device=CPU, data=test),
    )


class Reference(nn.Module):
    """A learner's parameters and settings, its mathematics by ``metafast.reference``."""

    def __init__(self, learner: AnyLearner) -> None:
        super().__init__()
        self.learner = learner
        self.steps = 0 if isinstance(learner, mf.ProtoNets) else learner.steps

    def forward(self, episodes: mf.Episodes) -> Outcome:
        """The detached outcome."""
        with torch.enable_grad():
            return self._outcome(episodes).detach()

    def accumulate_grad(self, episodes: mf.Episodes) -> Outcome:
        """As a learner's."""
        out = self._outcome(episodes)
        out.loss.backward()
        return out.detach()

    def _outcome(self, episodes: mf.Episodes) -> Outcome:
        learner = self.learner
        if isinstance(learner, mf.ProtoNets):
            return reference.protonets(learner.encoder, episodes)
        options: dict[str, Any] = {
            "lr": learner.rule.lr,
            "steps": learner.steps,
            "first_order": learner.first_order,
        }
        if isinstance(learner, mf.LOMAML):
            return reference.lomaml(learner.model, learner.optimizer, episodes, **options)
        return reference.maml(learner.model, episodes, **options)


def run(row: str, root: Path, with_reference: bool, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything a row has, as plain JSON values."""
    recipe, lengths = recipe_of(row)
    result: dict[str, Any] = {
        "recipe": recipe.plain(),
        **lengths,
        "command": command(row),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load_average": round(os.getloadavg()[0], 2),
    }
    training, unseen = tasks_of(recipe, root)
    learner, result["metafast"] = train_and_test(recipe, lengths, training, unseen)
    say(f"{row}: {words(result['metafast'])}")
    if with_reference:
        _, found = train_and_test(recipe, lengths, training, unseen, Reference)
        found["agrees"] = agrees(found, result["metafast"])
        result["reference"] = found
        say(f"{row}: reference {words(found)}; {'agrees' if found['agrees'] else 'DOES NOT AGREE'}")
    judge = _inductive(learner, training)
    result["inductive"] = _tested(_batches(unseen, _inductive_queries(recipe), _INDUCTIVE_TASKS), judge)
    say(f"{row}: inductive {percent(result['inductive'])}")
    if (recipe.ways, recipe.shots) == (20, 1):
        whole = functools.partial(_accuracy, learner)
        tables = list(_alphabets(root, recipe).values())
        inside = [Tasks(unseen.recipe, test=True, root=root, device=CPU, data=table) for table in tables]
        result["within_alphabet"] = {
            "alphabets": list(_alphabets(root, recipe)),
            "transductive": _tested(_in_turns(inside, unseen.recipe.queries, lengths["eval_tasks"]), whole),
            "inductive": _tested(_in_turns(inside, _inductive_queries(recipe), _INDUCTIVE_TASKS), judge),
        }
        say(f"{row}: within alphabet {percent(result['within_alphabet']['transductive'])}")
    return result


def train_and_test(
    recipe: Recipe,
    lengths: dict[str, int],
    training: Tasks,
    unseen: Tasks,
    by: Callable[[AnyLearner], Any] = lambda learner: learner,
) -> tuple[AnyLearner, dict[str, Any]]:
    """Train by the command's own trainer and test by its own test; seconds of each, and the accuracy."""
    trainer = Trainer(recipe, training, CPU)
    learner = trainer.learner
    trainer.learner = by(learner)
    while trainer.iteration < lengths["iterations"]:
        trainer.step()
    trainer.checkpoint(None)  # type: ignore[arg-type]  # for its refusal of weights that are not finite
    seconds, began = trainer.seconds, time.perf_counter()
    found = evaluate(trainer.learner, unseen, lengths["eval_tasks"], lambda size, status: None).accuracy
    assert found is not None
    return learner, {
        "train_seconds": round(seconds, 2),
        "test_seconds": round(time.perf_counter() - began, 2),
        "accuracy": _plain(found, lengths["eval_tasks"], unseen.recipe.queries),
    }


def _inductive_queries(recipe: Recipe) -> int:
    """Queries a class of the inductive test, where each costs a pass of the support set."""
    assert recipe.ways is not None
    if recipe.learner == "protonets":
        return recipe_to_test(recipe).queries
    return max(1, min(15, _INDUCTIVE_SAMPLES // (recipe.ways * (recipe.ways * recipe.shots + 1))))


def _inductive(learner: AnyLearner, training: Tasks) -> Callable[[mf.Episodes], Tensor]:
    """Accuracies (T,) of episodes of which no query sees another."""
    if isinstance(learner, mf.ProtoNets):
        still = mf.ProtoNets(_with_statistics(learner.encoder, training), learner.metric, batch_norm="running")
        return functools.partial(_accuracy, still)

    def judge(episodes: mf.Episodes) -> Tensor:
        adapted = learner.adapt(episodes.support_x, episodes.support_y)
        logits = [
            adapted(torch.cat([episodes.support_x, query], dim=1))[:, -1] for query in episodes.query_x.split(1, dim=1)
        ]
        return (torch.stack(logits, dim=1).argmax(-1) == episodes.query_y).double().mean(1)

    return judge


def _with_statistics(encoder: nn.Module, training: Tasks) -> nn.Module:
    """A copy whose running statistics are the means of those of whole training episodes."""
    encoder = copy.deepcopy(encoder).train()
    for norm in encoder.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
    for episodes in _batches(training, training.recipe.queries, _STATISTICS_TASKS):
        for task in torch.cat([episodes.support_x, episodes.query_x], dim=1):
            encoder(task)
    return encoder


def _accuracy(learner: AnyLearner, episodes: mf.Episodes) -> Tensor:
    found: Tensor | None = learner(episodes).accuracy
    assert found is not None
    return found


def _tested(batches: Iterable[mf.Episodes], judge: Callable[[mf.Episodes], Tensor]) -> dict[str, Any]:
    parts, queries = [], 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "metafast: .* running statistics")  # these go by torch
        for episodes in batches:
            assert episodes.classes is not None
            parts.append(judge(episodes))
            queries = episodes.query_x.shape[1] // episodes.classes
    accuracies = torch.cat(parts)
    return _plain(Estimate.of(accuracies), len(accuracies), queries)


def _batches(tasks: Tasks, queries: int, count: int) -> Iterator[mf.Episodes]:
    """``count`` tasks with so many queries a class, from the start of the tasks' stream."""
    assert not isinstance(tasks.data, mf.data.Sinusoid) and tasks.ways is not None
    generator = tasks.generator()
    for done in range(0, count, _AT_ONCE):
        size = min(_AT_ONCE, count - done)
        yield tasks.data.sample(size, tasks.ways, tasks.recipe.shots, queries, generator)


def _in_turns(sources: list[Tasks], queries: int, count: int) -> Iterator[mf.Episodes]:
    """As many tasks of each source, ``count`` together, or a few less."""
    for tasks in sources:
        yield from _batches(tasks, queries, count // len(sources))


def _alphabets(root: Path, recipe: Recipe) -> dict[str, Omniglot]:
    """Of the test alphabets, those with enough characters for a task."""
    assert recipe.source is not None and recipe.ways is not None
    names = sorted({name.split("/")[0] for name in opened(root, recipe.source, "test").names})
    tables = {name: _alphabet(root, recipe.source, name) for name in names}
    return {name: table for name, table in tables.items() if table.classes >= recipe.ways}


@functools.cache
def _alphabet(root: Path, source: str, name: str) -> Omniglot:
    return Omniglot(root, "test", source=source, alphabets=[name])


def agrees(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two accuracies differ by no more than both intervals together."""
    one, other = first["accuracy"], second["accuracy"]
    return bool(abs(one["mean"] - other["mean"]) <= one["interval"] + other["interval"])


def _plain(estimate: Estimate, tasks: int, queries: int) -> dict[str, Any]:
    if not math.isfinite(estimate.mean + estimate.interval):
        raise ValueError(f"accuracy: expected a finite one, got {estimate}")
    return {
        "mean": round(estimate.mean, 5),
        "interval": round(estimate.interval, 5),
        "tasks": tasks,
        "queries_a_class": queries,
    }


def percent(found: dict[str, Any]) -> str:
    return f"{100 * found['mean']:.1f} ± {100 * found['interval']:.1f} %"


def words(found: dict[str, Any]) -> str:
    return f"{percent(found['accuracy'])}, trained in {found['train_seconds']:.1f} s"


def load(path: Path) -> dict[str, Any]:
    """The document as it is, or an empty one."""
    if not path.is_file():
        return {"rows": {}}
    document: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return document


def save(document: dict[str, Any], path: Path) -> None:
    """Beside, and renamed: a run that is stopped leaves a whole file."""
    ordered = document | {"rows": {row: document["rows"][row] for row in ROWS if row in document["rows"]}}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(ordered, indent=1, allow_nan=False) + "\n", "utf-8")
    temporary.replace(path)


def arguments_of(description: str, minutes: float, part: str) -> argparse.ArgumentParser:
    """A script's arguments; it works ``part`` by part."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="SOURCE/RECIPE; all when none is given")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("METAFAST_DATA"), help="or METAFAST_DATA")
    parser.add_argument("--minutes", type=float, default=minutes, help=f"no {part} is begun after so many")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help=f"leave each {part} that is there and of the same recipe")
    return parser


def rows_of(parser: argparse.ArgumentParser, options: argparse.Namespace, known: list[str]) -> list[str]:
    """The rows that are asked for; ends the script where there is no such row."""
    if unknown := [row for row in options.rows if row not in known]:
        parser.error(f"ROW: expected some of {', '.join(known)}; got {', '.join(unknown)}")
    return options.rows or known


def begun(parser: argparse.ArgumentParser, options: argparse.Namespace, path: Path) -> dict[str, Any]:
    """The document to go on with, on this machine; ends the script where nobody said where the drawings are."""
    if options.data_root is None:
        parser.error("--data-root: expected the folder of Omniglot's files (or METAFAST_DATA)")
    torch.set_num_threads(options.threads)
    document = load(path) if options.rows or options.resume else {"rows": {}}
    return document | {"machine": describe_machine(), "threads": options.threads}


def main(arguments: list[str] | None = None) -> int:
    """Run rows; 1 if some are left, 2 for bad input."""
    parser = arguments_of("Few-shot Omniglot, against the reference implementations.", 27.0, "row")
    parser.add_argument("--reference", action="store_true", help="the reference beside every row, not one a learner")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands, run nothing")
    options = parser.parse_args(arguments)
    rows = rows_of(parser, options, ROWS)
    if options.list:
        print("\n".join(f"{row}: {command(row)}" for row in rows))
        return 0
    document = begun(parser, options, RESULT)
    done = document["rows"]
    began, left = time.monotonic(), []
    for number, row in enumerate(rows):
        recipe, lengths = recipe_of(row)
        if options.resume and row in done and same(done[row], recipe.plain() | lengths):
            continue
        if time.monotonic() - began > 60 * options.minutes:
            left.append(row)
            continue
        wanted = options.reference or row in WITH_REFERENCE
        say = functools.partial(
            print, f"[{(time.monotonic() - began) / 60:.1f} min, {number + 1}/{len(rows)}]", flush=True
        )
        done[row] = run(row, Path(options.data_root), wanted, say)
        document["minutes"] = round((time.monotonic() - began) / 60, 2)
        save(document, RESULT)
    apart = [row for row in rows if row in done and not done[row].get("reference", {"agrees": True})["agrees"]]
    if left:
        print(f"no time was left for {', '.join(left)}; to go on: --resume")
    if apart:
        print(
            f"float32 parts from the reference on {', '.join(apart)}; for why, python benchmarks/omniglot_agreement.py"
        )
    return int(bool(left))


def same(result: dict[str, Any], settings: dict[str, Any]) -> bool:
    return bool(result["recipe"] | {name: result[name] for name in ("iterations", "eval_tasks")} == settings)


if __name__ == "__main__":
    sys.exit(main())
