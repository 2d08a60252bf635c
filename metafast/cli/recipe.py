"""What is trained on what: a recipe is plain data, goes into the checkpoint, and builds the learner and its data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from metafast import _check
from metafast.cli.defaults import Data, Learner, defaults, unfit
from metafast.data import ClassTable, Glyphs, MiniImageNet, Omniglot, Sinusoid
from metafast.data.omniglot import SOURCES
from metafast.episodes import Episodes
from metafast.learners import LOMAML, MAML, GradientLearner, ProtoNets, Reptile
from metafast.lstm import LSTMOptimizer
from metafast.models import MLP, Conv4, Conv4Encoder

AnyLearner = GradientLearner | ProtoNets
NAMES: dict[str, str] = {
    "maml": "MAML",
    "fomaml": "FOMAML",
    "reptile": "Reptile",
    "lomaml": "LOMAML",
    "protonets": "ProtoNets",
    "sinusoid": "sinusoids",
    "glyphs": "Glyphs",
    "omniglot": "Omniglot",
    "miniimagenet": "miniImageNet",
}
BATCH_NORMS = ("batch", "running")


@dataclass(frozen=True)
class Recipe:
    """The learner, its data, its net and how it is trained; None where a setting does not apply.

    Attributes:
        learner: "maml", "fomaml", "reptile", "lomaml" or "protonets".
        data: "sinusoid", "glyphs", "omniglot" or "miniimagenet".
        ways: classes of a task.
        train_ways: classes of a training task; ProtoNets may train on more than it is tested on.
        shots: support samples a class (points a wave).
        queries: query samples a class (points a wave), in training; of these Reptile adapts to all but one.
        tasks: tasks of a meta-batch.
        steps: inner steps.
        lr: inner learning rate.
        first_order: whether the second-order term is dropped.
        meta_lr: Adam's learning rate.
        rule_lr: Adam's learning rate for the weights of LOMAML's learned optimiser.
        width: units of a hidden layer, or channels of a convolution.
        batch_norm: "batch" or "running".
        seed: of the initial weights and of all tasks.
        source: Omniglot's sets to train and to test on, see :class:`metafast.data.Omniglot`; "auto": those found.

    Raises:
        TypeError, ValueError: a setting of the wrong kind, out of range, or that does not apply; its option is named.
    """

    learner: str
    data: str
    ways: int | None
    train_ways: int | None
    shots: int
    queries: int
    tasks: int
    steps: int | None
    lr: float | None
    first_order: bool | None
    meta_lr: float
    rule_lr: float | None
    width: int
    batch_norm: str | None
    seed: int
    source: str | None = None

    def __post_init__(self) -> None:
        _check.choice("LEARNER", self.learner, get_args(Learner))
        _check.choice(option("data"), self.data, get_args(Data))
        applies = defaults(self.learner, self.data)
        for name, reason in unfit(self.learner, self.data).items():
            if getattr(self, name) is not None:
                raise ValueError(f"{option(name)}: {reason}")
        minima = {"ways": 2, "train_ways": 2, "shots": 1, "queries": 1, "tasks": 1, "steps": 0, "width": 1, "seed": 0}
        for name in minima.keys() & applies.keys():
            _check.integer(option(name), getattr(self, name), minimum=minima[name])
        if self.seed >= 2**62:
            raise ValueError(f"{option('seed')}: expected an int below 2**62, got {self.seed}")
        for name in {"lr", "meta_lr", "rule_lr"} & applies.keys():
            _check.number(option(name), getattr(self, name), minimum=0)
        if "batch_norm" in applies:
            _check.choice(option("batch_norm"), self.batch_norm, BATCH_NORMS)
        if "source" in applies:
            _check.choice(option("source"), self.source, ("auto", *SOURCES))
        if "first_order" in applies:
            _check.flag(option("first_order"), self.first_order)
        if self.learner == "fomaml" and not self.first_order:
            raise ValueError("--first-order: FOMAML is first order, got False")

    @classmethod
    def of(cls, learner: str, data: str, given: Mapping[str, Any]) -> Recipe:
        """The defaults for ``learner`` on ``data``, but what is ``given`` (and not None) as given."""
        chosen = defaults(learner, data) | {name: value for name, value in given.items() if value is not None}
        settings: dict[str, Any] = {name: chosen.get(name) for name in SETTINGS}
        return cls(learner, data, **settings)

    @classmethod
    def from_plain(cls, plain: object) -> Recipe:
        """The recipe of a dict such as :meth:`plain` gives."""
        names = ("learner", "data", *SETTINGS)
        if isinstance(plain, dict) and "source" not in plain:  # written before there was a choice
            plain = plain | {"source": "auto" if plain.get("data") == "omniglot" else None}
        if not isinstance(plain, dict) or set(plain) != set(names):
            raise ValueError(f"expected a recipe with {', '.join(names)}, got {_check.describe(plain)}")
        return cls(**plain)

    def plain(self) -> dict[str, Any]:
        """As a dict of strings and numbers."""
        return dataclasses.asdict(self)

    @property
    def task(self) -> str:
        """As in "5-way 1-shot Glyphs"."""
        name = f"{self.shots}-shot {NAMES[self.data]}"
        return name if self.ways is None else f"{self.ways}-way {name}"

    @property
    def title(self) -> str:
        """As in "MAML on 5-way 1-shot Glyphs"."""
        return f"{NAMES[self.learner]} on {self.task}"

    @property
    def regression(self) -> bool:
        """Whether the tasks are regression ones."""
        return self.data == "sinusoid"


SETTINGS = tuple(field.name for field in dataclasses.fields(Recipe) if field.name not in ("learner", "data"))


def build_learner(recipe: Recipe) -> AnyLearner:
    """The learner of a recipe with its initial weights, which hang on the recipe's seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = _build_model(recipe)
        batch_norm = recipe.batch_norm or "batch"
        if recipe.steps is None or recipe.lr is None:
            return ProtoNets(model, batch_norm=batch_norm)
        loss, first_order = "mse" if recipe.regression else "cross_entropy", bool(recipe.first_order)
        if recipe.learner == "lomaml":
            optimizer = LSTMOptimizer().start_as_descent(limit=10.0 if recipe.regression else 1.0)
            return LOMAML(
                model, optimizer, recipe.lr, recipe.steps, loss, first_order=first_order, batch_norm=batch_norm
            )
        if recipe.learner == "reptile":
            return Reptile(model, recipe.lr, recipe.steps, loss, batch_norm)
        return MAML(model, recipe.lr, recipe.steps, loss, first_order, batch_norm)


def build_optimizer(recipe: Recipe, learner: AnyLearner) -> torch.optim.Adam:
    """Adam for a learner's parameters, with a rate of its own for those of a learned update rule.

    Fused: with small nets Adam's usual form takes longer than the meta-gradient.
    """
    if recipe.rule_lr is None or isinstance(learner, ProtoNets):
        return torch.optim.Adam(learner.parameters(), recipe.meta_lr, fused=True)
    groups = [
        {"params": list(learner.model.parameters()), "lr": recipe.meta_lr},
        {"params": list(learner.rule.parameters()), "lr": recipe.rule_lr},
    ]
    return torch.optim.Adam(groups, fused=True)


def _build_model(recipe: Recipe) -> nn.Module:
    if recipe.ways is None:
        return MLP(1, (recipe.width, recipe.width), 1)
    channels, size = (3, 84) if recipe.data == "miniimagenet" else (1, 28)
    if recipe.learner == "protonets":
        return Conv4Encoder(recipe.width, channels, size)
    return Conv4(recipe.ways, recipe.width, channels, size)


class Tasks:
    """The tasks of a recipe: those to train on, or unseen ones to test on.

    The test split's classes are never trained on, and their scripts (Glyphs) or alphabets (Omniglot) neither; unseen
    waves come from another stream of random numbers.

    Args:
        recipe: whose data, ways, shots, queries and seed.
        test: whether they are tasks to test on.
        root: folder of the data set's files; only Omniglot and miniImageNet have files.
        device: where the tasks are made.
        data: what to draw them from, open already; None: the recipe's data set.

    Raises:
        TypeError, ValueError, FileNotFoundError, ImportError: data that is not there or damaged, or too little of it
            for such tasks.
    """

    def __init__(
        self,
        recipe: Recipe,
        test: bool,
        root: Path | None,
        device: torch.device,
        data: ClassTable | Sinusoid | None = None,
    ) -> None:
        self.data = _open(recipe, "test" if test else "train", root, device) if data is None else data
        self.recipe = recipe
        self.ways = recipe.ways if test else recipe.train_ways or recipe.ways
        # Reptile learns from nothing but what it adapts to.
        self._lent = recipe.queries - 1 if recipe.learner == "reptile" and not test else 0
        self._device = device
        # Even for training and odd for tests: no seed of the one is a seed of the other.
        self._stream = 2 * recipe.seed + test
        self.sample(1, self.generator())

    def generator(self) -> torch.Generator:
        """A source of randomness at the start of these tasks' own stream."""
        return torch.Generator(self._device).manual_seed(self._stream)

    def sample(self, tasks: int, generator: torch.Generator) -> Episodes:
        """``tasks`` of them."""
        shots, queries = self.recipe.shots + self._lent, self.recipe.queries - self._lent
        if isinstance(self.data, Sinusoid):
            return self.data.sample(tasks, shots, queries, generator)
        assert self.ways is not None  # a recipe has ways wherever there are classes
        return self.data.sample(tasks, self.ways, shots, queries, generator)


def _open(recipe: Recipe, split: str, root: Path | None, device: torch.device) -> ClassTable | Sinusoid:
    name = recipe.data
    if name == "sinusoid":
        return Sinusoid()
    if name == "glyphs":
        return Glyphs(split).to(device)
    if root is None:
        raise ValueError(f"{option('data-root')}: expected the folder of {NAMES[name]}'s files (or METAFAST_DATA)")
    if name == "omniglot":
        return Omniglot(root, split, source=None if recipe.source == "auto" else recipe.source).to(device)
    own = root / "miniimagenet"
    return MiniImageNet(own if own.is_dir() else root, split).to(device)


def option(name: str) -> str:
    """The option that sets a field: "--meta-lr" for "meta_lr"."""
    return "--" + name.replace("_", "-")
