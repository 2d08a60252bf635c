"""Evaluation: the numbers against independent computations, and ``metafast eval``."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import metafast as mf
from metafast.cli import checkpoint as checkpoints
from metafast.cli.evaluation import Estimate, Result, evaluate, recipe_to_test
from metafast.cli.recipe import Recipe, Tasks, build_learner
from metafast.data._glyph_images import script
from tests.cli.runs import metafast, train

CPU = torch.device("cpu")


def result_of(learner: str, data: str, count: int, **given: object) -> tuple[torch.nn.Module, Tasks, Result]:
    recipe = Recipe.of(learner, data, {"width": 6} | given)
    tasks = Tasks(recipe_to_test(recipe), test=True, root=None, device=CPU)
    built = build_learner(recipe)
    return built, tasks, evaluate(built, tasks, count, lambda size, status: None)


def test_an_estimate_is_a_mean_with_its_interval() -> None:
    values = np.random.default_rng(0).normal(3, 2, 50)
    estimate = Estimate.of(torch.from_numpy(values))
    assert estimate.mean == pytest.approx(values.mean(), rel=1e-12)
    assert estimate.interval == pytest.approx(1.96 * values.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_errors_by_step_are_those_of_plain_gradient_descent() -> None:
    learner, tasks, result = result_of("maml", "sinusoid", 7, steps=3, lr=0.05)
    assert list(result.losses) == [0, 1, 2, 3]
    # The same tasks, one by one, by hand.
    episodes = tasks.sample(7, tasks.generator())
    errors = np.zeros((4, 7))
    for t in range(7):
        phi = {name: p.detach().clone().requires_grad_() for name, p in learner.model.named_parameters()}
        for k in range(4):
            out = torch.func.functional_call(learner.model, phi, (episodes.query_x[t],))
            errors[k, t] = ((out - episodes.query_y[t]) ** 2).mean().item()
            fit = torch.func.functional_call(learner.model, phi, (episodes.support_x[t],))
            grads = torch.autograd.grad(((fit - episodes.support_y[t]) ** 2).mean(), list(phi.values()))
            phi = {n: (p - 0.05 * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads)}
    for k in range(4):
        assert result.losses[k].mean == pytest.approx(errors[k].mean(), rel=1e-4)
        assert result.losses[k].interval == pytest.approx(1.96 * errors[k].std(ddof=1) / math.sqrt(7), rel=1e-4)


def test_accuracy_is_the_share_of_queries_nearest_to_their_class() -> None:
    learner, tasks, result = result_of("protonets", "glyphs", 23, ways=4)  # more than one batch of 20
    generator, accuracies = tasks.generator(), []
    for size in (20, 3):
        episodes = tasks.sample(size, generator)
        for t in range(size):
            # Batch statistics are those of the whole episode.
            both = torch.cat([episodes.support_x[t], episodes.query_x[t]])
            embedded = learner.encoder.train()(both)
            nearest = torch.cdist(embedded[4:], embedded[:4]).argmin(1)
            accuracies.append(float((nearest == episodes.query_y[t]).float().mean()))
    assert result.accuracy is not None
    assert result.accuracy.mean == pytest.approx(np.mean(accuracies), rel=1e-6)
    assert result.accuracy.interval == pytest.approx(1.96 * np.std(accuracies, ddof=1) / math.sqrt(23), rel=1e-6)


def test_tasks_to_test_on_are_unseen() -> None:
    recipe = Recipe.of("maml", "glyphs", {})
    seen, unseen = (Tasks(recipe, test=t, root=None, device=CPU).data for t in (False, True))
    scripts = [{script(letter) for letter in data.letters} for data in (seen, unseen)]
    assert scripts[1] == {"ARMENIAN", "GEORGIAN"} and not scripts[0] & scripts[1]
    waves = Recipe.of("maml", "sinusoid", {"seed": 3})
    streams = [Tasks(waves, test=t, root=None, device=CPU) for t in (False, True)]
    amplitudes = [tasks.data.sample_tasks(50, tasks.generator()).amplitude for tasks in streams]
    assert not np.intersect1d(*amplitudes).size
    assert recipe_to_test(recipe).queries == 15
    assert recipe_to_test(Recipe.of("maml", "glyphs", {"shots": 20})).queries == 4


@pytest.mark.parametrize("kind", ["lomaml sinusoid", "maml glyphs", "protonets glyphs"])
def test_eval_says_what_train_said(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(kind, tmp_path) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "95 %" in line or " mse " in line]
    for where in (tmp_path, tmp_path / checkpoints.NAME):
        assert metafast("eval", where, "--tasks", 4, "--out", tmp_path / "test") == 0
        out = capsys.readouterr().out
        assert all(line in out for line in said)
        assert (tmp_path / "test" / "result.json").read_text() == (tmp_path / "result.json").read_text()
    assert len(list((tmp_path / "test").glob("*.png"))) == 1


@pytest.mark.usefixtures("no_pictures")
def test_eval_on_other_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("protonets glyphs", tmp_path) == 0
    assert metafast("eval", tmp_path, "--tasks", 3, "--ways", 7, "--shots", 2, "--queries", 4, "--seed", 9) == 0
    out = capsys.readouterr().out
    assert "over 3 tasks: 7-way 2-shot Glyphs, 4 queries a class" in out
    assert metafast("eval", tmp_path, "--tasks", 3, "--out", tmp_path / "a") == 0
    assert metafast("eval", tmp_path, "--tasks", 3, "--seed", 9, "--out", tmp_path / "b") == 0
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in "ab"]
    assert results[0]["losses"] != results[1]["losses"]
    assert [r["recipe"]["seed"] for r in results] == [0, 9]


@pytest.mark.usefixtures("no_pictures")
def test_eval_with_more_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("maml sinusoid", tmp_path) == 0
    assert metafast("eval", tmp_path, "--tasks", 5, "--steps", 4, "--out", tmp_path / "test") == 0
    assert "after 4 steps   mse" in capsys.readouterr().out
    result = json.loads((tmp_path / "test" / "result.json").read_text())
    learner = mf.MAML(mf.models.MLP(1, (8, 8), 1), lr=0.01, steps=4, loss="mse")
    learner.load_state_dict(checkpoints.load(tmp_path).learner)
    recipe = recipe_to_test(Recipe.of("maml", "sinusoid", {}))
    tasks = Tasks(recipe, test=True, root=None, device=CPU)
    losses = learner(tasks.sample(5, tasks.generator())).losses.detach()
    assert [entry["steps"] for entry in result["losses"]] == [0, 1, 2, 3, 4]
    assert result["losses"][4]["mean"] == pytest.approx(float(losses.mean()), rel=1e-6)


REFUSED = {
    "ways": (["--ways", "7"], "--ways: "),
    "steps": (["--steps", "-1"], "--steps: expected an int of at least 0"),
    "tasks": (["--tasks", "1"], "--tasks: expected an int of at least 2"),
    "queries": (["--queries", "40"], "shots + queries: expected at most 24"),
    "seed": (["--seed", "-1"], "--seed: expected an int of at least 0"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on Glyphs."""
    folder = tmp_path_factory.mktemp("finished")
    assert train("maml glyphs", folder) == 0
    return folder


@pytest.mark.parametrize("what", REFUSED)
def test_eval_refuses(what: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, message = REFUSED[what]
    assert metafast("eval", finished, "--out", tmp_path / "test", *words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "test").exists()


def test_eval_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert metafast("eval", tmp_path) == 2
    assert repr(str(tmp_path / checkpoints.NAME)) in capsys.readouterr().err
