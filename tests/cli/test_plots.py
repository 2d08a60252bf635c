"""The pictures: what is drawn is what was found, and pyplot's state is left alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from metafast.cli import plots
from metafast.cli.evaluation import Estimate, Result
from metafast.cli.recipe import Recipe, Tasks, build_learner

CPU = torch.device("cpu")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, path: Path) -> None:
        figures.append(self)
        save(self, path)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_an_episode_is_framed_by_what_the_learner_said(tmp_path: Path, drawn: list[Figure]) -> None:
    recipe = Recipe.of("protonets", "glyphs", {"width": 4, "ways": 3, "queries": 4})
    tasks = Tasks(recipe, test=True, root=None, device=CPU)
    learner = build_learner(recipe)
    plots.episode(tmp_path / "episode.png", learner, tasks)
    episodes = tasks.sample(1, tasks.generator())
    said = learner(episodes).logits[0].argmax(-1).reshape(3, 4)
    pictures = [axes for axes in drawn[0].axes if axes.images]
    assert len(pictures) == 3 * (1 + 4)
    for row in range(3):
        support, *queries = pictures[5 * row : 5 * row + 5]
        assert np.array_equal(support.images[0].get_array(), episodes.support_x[0, row, 0].numpy())
        assert support.get_ylabel() == f"class {row + 1}"
        for column, axes in enumerate(queries):
            assert np.array_equal(axes.images[0].get_array(), episodes.query_x[0, 4 * row + column, 0].numpy())
            right = int(said[row, column]) == row
            assert axes.get_xlabel() == ("right" if right else f"said {int(said[row, column]) + 1}")
            assert to_hex(axes.spines["left"].get_edgecolor()) == (plots.GREEN if right else plots.RED)
    right = int((said == torch.arange(3).unsqueeze(1)).sum())
    assert drawn[0].get_suptitle() == f"ProtoNets on an unseen 3-way 1-shot Glyphs task: {right} of 12 queries right"


def test_waves_are_true_and_fits_are_the_learner_s(tmp_path: Path, drawn: list[Figure]) -> None:
    recipe = Recipe.of("maml", "sinusoid", {"width": 5, "steps": 3})
    tasks = Tasks(recipe, test=True, root=None, device=CPU)
    learner = build_learner(recipe)
    losses = {k: Estimate(4.0 - k, 0.5) for k in range(4)}
    plots.sinusoid(tmp_path / "sinusoid.png", learner, tasks, Result(recipe, 600, losses, None))
    *panels, errors = drawn[0].axes
    assert len(panels) == plots.WAVES
    for axes in panels:
        truth, *fits = axes.lines
        assert [line.get_label() for line in fits] == ["before adaptation", "after 1 step", "after 3 steps"]
        points = axes.collections[0].get_offsets()
        # The support points lie on the true wave, which is drawn at 201 points.
        assert np.interp(points[:, 0], *truth.get_data()) == pytest.approx(points[:, 1], abs=5e-3)
        support = [torch.tensor(np.asarray(points[:, i]), dtype=torch.float32).reshape(1, -1, 1) for i in (0, 1)]
        x = torch.tensor(np.asarray(truth.get_xdata()), dtype=torch.float32).reshape(1, -1, 1)
        for steps, line in zip((0, 1, 3), fits):
            fit = learner.adapt(*support, steps)(x).detach()
            assert line.get_ydata() == pytest.approx(fit.flatten().numpy(), abs=1e-5)
    assert errors.lines[0].get_ydata().tolist() == [4.0, 3.0, 2.0, 1.0]


def test_curves_show_the_metrics(tmp_path: Path, drawn: list[Figure]) -> None:
    recipe = Recipe.of("maml", "glyphs", {})
    lines = [{"iteration": 10.0 * i, "loss": 1 / i, "accuracy": 1 - 0.5 / i, "seconds": 0.1} for i in range(1, 9)]
    result = Result(recipe, 600, {1: Estimate(0.4, 0.02)}, Estimate(0.9, 0.01))
    plots.curves(tmp_path / "curves.png", recipe, lines, result)
    loss, accuracy = drawn[0].axes
    assert loss.lines[0].get_ydata().tolist() == [line["loss"] for line in lines]
    assert accuracy.lines[0].get_xdata().tolist() == [line["iteration"] for line in lines]
    assert accuracy.get_legend().get_texts()[1].get_text() == "unseen test tasks: 0.900"
    plots.curves(tmp_path / "one.png", replace(recipe, data="glyphs"), lines[:1], result)
    assert (tmp_path / "one.png").stat().st_size > 1000


def test_smoothing_is_a_mean_that_keeps_the_ends() -> None:
    values = np.random.default_rng(0).normal(size=100)
    smooth = plots._smooth(values)
    assert smooth[[0, 99]] == pytest.approx(values[[0, 99]])
    assert smooth[50] == pytest.approx(values[48:53].mean())


def test_pyplot_is_not_touched() -> None:
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()
