"""Recipes: their defaults, and the learners and tasks they build."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

import metafast as mf
from metafast.cli.defaults import Data, Learner, unfit
from metafast.cli.recipe import SETTINGS, Recipe, Tasks, build_learner, build_optimizer
from tests.cli.runs import assert_same, metafast, state

CPU = torch.device("cpu")
PAIRS = [pair for pair in itertools.product(get_args(Learner), get_args(Data)) if pair != ("protonets", "sinusoid")]


@pytest.mark.parametrize(("learner", "data"), PAIRS)
def test_every_pair_has_a_recipe_and_a_learner(learner: str, data: str) -> None:
    recipe = Recipe.of(learner, data, {})
    assert {name for name in SETTINGS if getattr(recipe, name) is None} == unfit(learner, data).keys()
    assert Recipe.from_plain(recipe.plain()) == recipe
    built = build_learner(recipe)
    kinds = {"maml": mf.MAML, "fomaml": mf.MAML, "lomaml": mf.LOMAML, "protonets": mf.ProtoNets}
    kinds["reptile"] = mf.Reptile
    assert type(built) is kinds[learner]
    if learner != "protonets":
        first_order = learner in ("fomaml", "reptile")
        assert (built.steps, built.first_order, built.rule.lr) == (recipe.steps, first_order, recipe.lr)


def test_the_sinusoid_net_is_that_of_the_paper() -> None:
    recipe = Recipe.of("maml", "sinusoid", {})
    shapes = [tuple(p.shape) for p in build_learner(recipe).parameters()]
    assert shapes == [(40, 1), (40,), (40, 40), (40,), (1, 40), (1,)]
    assert (recipe.tasks, recipe.shots, recipe.lr, recipe.meta_lr) == (25, 10, 0.01, 3e-3)


def test_what_is_given_is_taken() -> None:
    given = {"ways": 7, "shots": 2, "queries": 3, "tasks": 6, "steps": 4, "lr": 0.3, "width": 5, "seed": 8}
    recipe = Recipe.of("maml", "glyphs", given | {"first_order": True, "batch_norm": "running", "meta_lr": 0.1})
    assert {name: getattr(recipe, name) for name in given} == given
    learner = build_learner(recipe)
    assert (learner.first_order, learner.model.head.out_features) == (True, 7)
    assert learner._task.batch_norm == "running"
    tasks = Tasks(recipe, test=False, root=None, device=CPU)
    episodes = tasks.sample(6, tasks.generator())
    assert episodes.support_x.shape == (6, 14, 1, 28, 28) and episodes.query_x.shape == (6, 21, 1, 28, 28)


def test_initial_weights_hang_on_the_seed_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (build_learner(Recipe.of("lomaml", "sinusoid", {"seed": seed})) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    flat = [torch.cat([p.detach().flatten() for p in learner.parameters()]) for learner in (one, same, other)]
    assert torch.equal(flat[0], flat[1]) and not torch.equal(flat[0], flat[2])


def test_the_learned_optimiser_has_a_rate_of_its_own() -> None:
    recipe = Recipe.of("lomaml", "sinusoid", {"meta_lr": 0.5, "rule_lr": 0.25})
    learner = build_learner(recipe)
    rates = {p: group["lr"] for group in build_optimizer(recipe, learner).param_groups for p in group["params"]}
    assert [rates[p] for p in learner.model.parameters()] == [0.5] * 6
    assert [rates[p] for p in learner.optimizer.parameters()] == [0.25] * 8
    assert len(rates) == 14


def test_fomaml_is_first_order() -> None:
    plain = Recipe.of("fomaml", "sinusoid", {}).plain()
    with pytest.raises(ValueError, match="^--first-order: FOMAML is first order"):
        Recipe.from_plain(plain | {"first_order": False})


def test_reptile_trains_on_the_queries_too() -> None:
    recipe = Recipe.of("reptile", "glyphs", {"shots": 2, "queries": 4, "ways": 3})
    training, unseen = (Tasks(recipe, test=test, root=None, device=CPU) for test in (False, True))
    episodes = training.sample(2, training.generator())
    assert (episodes.support_x.shape[1], episodes.query_x.shape[1]) == (3 * 5, 3 * 1)
    episodes = unseen.sample(2, unseen.generator())
    assert (episodes.support_x.shape[1], episodes.query_x.shape[1]) == (3 * 2, 3 * 4)


def test_protonets_trains_on_more_ways_than_it_is_tested_on() -> None:
    recipe = Recipe.of("protonets", "glyphs", {"train_ways": 12})
    assert [Tasks(recipe, test, None, CPU).sample(1, torch.Generator()).classes for test in (False, True)] == [12, 5]


def test_a_checkpoint_from_before_there_were_sources_is_read() -> None:
    for data, source in (("omniglot", "auto"), ("glyphs", None)):
        plain = Recipe.of("maml", data, {}).plain()
        assert plain.pop("source") == source
        assert Recipe.from_plain(plain).source == source


RECIPE = """
learner: maml
data: sinusoid
width: 4
tasks: 2
steps: 1
lr: 0.02
iterations: 2
eval_tasks: 3
"""


def test_a_recipe_file_is_the_options_it_names(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert metafast("train", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "file", "--shots", 7) == 0
    words = ["--width", 4, "--tasks", 2, "--steps", 1, "--lr", 0.02, "--iterations", 2, "--eval-tasks", 3]
    assert metafast("train", "maml", "--data", "sinusoid", "--out", tmp_path / "typed", "--shots", 7, *words) == 0
    found, wanted = state(tmp_path / "file"), state(tmp_path / "typed")
    assert (found["recipe"].shots, found["iteration"]) == (7, 2)
    assert_same(found, wanted)
    # What is given beats the file, and a resumed run may name the file again.
    again = ("train", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "file", "--shots", 7, "--resume")
    assert metafast(*again, "--iterations", 3, "--eval-tasks", 2) == 0
    assert state(tmp_path / "file")["iteration"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learner: [", "recipe.yaml' is no YAML file"),
        ("- maml", "expected a mapping of settings in"),
        ("learner: maml\ndata: sinusoid\nstepz: 1", "has 'stepz', expected some of learner, data,"),
        ("learner: maml\ndata: sinusoid\nsteps:", "gives no value for 'steps'"),
        ("learner: mamal\ndata: sinusoid", "expected one of 'maml'"),
        ("data: sinusoid", "LEARNER: expected one, or --recipe with a file that names its learner"),
        ("learner: maml", "--data: expected one, or --recipe"),
        ("learner: maml\ndata: sinusoid\nsteps: two", "--steps: expected an int"),
        ("learner: maml\ndata: sinusoid\nways: 5", "--ways: waves have no classes"),
        ("learner: maml\ndata: glyphs\nsource: small", "--source: only Omniglot comes in several sets"),
        ("learner: maml\ndata: omniglot\nsource: tiny", "--source: expected one of 'auto', 'full'"),
        ("learner: maml\ndata: sinusoid\neval_tasks: 1", "--eval-tasks: expected an int of at least 2"),
        ("learner: maml\ndata: sinusoid\niterations: 0", "--iterations: expected an int of at least 1"),
    ],
)
def test_a_recipe_file_that_is_wrong(text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert metafast("train", "--recipe", tmp_path / "recipe.yaml", "--out", tmp_path / "never") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "never").exists()


def test_a_recipe_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metafast("train", "--recipe", tmp_path / "none.yaml") == 2
    assert "none.yaml" in capsys.readouterr().err


def mini_imagenet(root: Path) -> Path:
    for number, split in enumerate(("train", "test")):
        for c in range(3):
            folder = root / "miniimagenet" / split / f"n{c}"
            folder.mkdir(parents=True)
            for i in range(17):
                pixels = np.random.default_rng([number, c, i]).integers(0, 256, (84, 84, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def test_training_on_mini_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--ways", 2, "--width", 2, "--steps", 1, "--queries", 2, "--iterations", 2, "--eval-tasks", 2]
    root = mini_imagenet(tmp_path / "data")
    assert metafast("train", "maml", "--data", "miniimagenet", "--data-root", root, "--out", tmp_path, *words) == 0
    assert "2 tasks: 2-way 1-shot miniImageNet, 15 queries a class, classes never" in capsys.readouterr().out
    assert (tmp_path / "episode.png").stat().st_size > 10_000


@pytest.mark.skipif("METAFAST_DATA" not in os.environ, reason="METAFAST_DATA, the folder of Omniglot's files, is unset")
def test_training_on_omniglot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--train-ways", 6, "--width", 4, "--iterations", 2, "--eval-tasks", 2, "--out", tmp_path]
    assert metafast("train", "protonets", "--data", "omniglot", *words) == 0
    assert "2 tasks: 5-way 1-shot Omniglot" in capsys.readouterr().out
    assert metafast("eval", tmp_path, "--tasks", 2) == 0
