"""benchmarks/omniglot.py and omniglot_agreement.py: the recipes, and all of its tests on drawings made up here."""

from __future__ import annotations

import copy
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import metafast as mf
from tests.scripts import load_module

Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).parents[1]
ALPHABETS = {"images_background_small1": ("Alpha", "Beta"), "images_background_small2": ("Beta", "Gamma", "Delta")}
CHARACTERS = {"Alpha": 20, "Beta": 2, "Gamma": 20, "Delta": 2}


@pytest.fixture(scope="module")
def omniglot() -> ModuleType:
    return load_module("omniglot", ROOT / "benchmarks" / "omniglot.py")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty drawings a character: a block of ink in a place of its own, and some noise."""
    root = tmp_path_factory.mktemp("drawings")
    for name, alphabets in ALPHABETS.items():
        with zipfile.ZipFile(root / f"{name}.zip", "w") as archive:
            for alphabet in alphabets:
                for c in range(CHARACTERS[alphabet]):
                    for d in range(20):
                        rng = np.random.default_rng([len(alphabet), ord(alphabet[0]), c, d])
                        ink = rng.random((105, 105)) < 0.02
                        ink[20 * (c % 5) : 20 * (c % 5) + 20, 20 * (c // 5) : 20 * (c // 5) + 20] = True
                        stream = io.BytesIO()
                        Image.fromarray(~ink).save(stream, "PNG")
                        archive.writestr(f"{name}/{alphabet}/character{c:02}/{d:02}.png", stream.getvalue())
    return root


@pytest.fixture
def tiny(omniglot: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The same rows with a small net, briefly trained and tested, and the result elsewhere."""
    whole = omniglot.recipe_of

    def small(row: str) -> object:
        recipe, _ = whole(row)
        train_ways = None if recipe.train_ways is None else 4
        queries = 1 if recipe.queries < 5 else 2
        return replace(recipe, width=2, tasks=1, queries=queries, train_ways=train_ways), {
            "iterations": 2,
            "eval_tasks": 4,
        }

    monkeypatch.setattr(omniglot, "recipe_of", small)
    monkeypatch.setattr(omniglot, "RESULT", tmp_path / "omniglot.json")
    monkeypatch.setattr(omniglot, "_INDUCTIVE_TASKS", 3)
    monkeypatch.setattr(omniglot, "_STATISTICS_TASKS", 2)
    return omniglot


def test_every_row_is_what_its_name_says(omniglot: ModuleType) -> None:
    assert len(omniglot.ROWS) == len(set(omniglot.ROWS)) == 32
    for row in omniglot.ROWS:
        recipe, lengths = omniglot.recipe_of(row)
        name = f"{recipe.source}/{recipe.learner}-{recipe.ways}way-{recipe.shots}shot"
        assert (name, recipe.data, set(lengths)) == (row, "omniglot", {"iterations", "eval_tasks"})
        assert f"--recipe recipes/omniglot/{row.split('/')[1]}.yaml --source {recipe.source}" in omniglot.command(row)
    assert set(omniglot.WITH_REFERENCE) < set(omniglot.ROWS)
    assert {row.split("/")[1] + ".yaml" for row in omniglot.ROWS} == {p.name for p in omniglot.RECIPES.iterdir()}


@pytest.mark.parametrize("learner", ["maml", "fomaml", "lomaml", "protonets"])
def test_the_reference_is_the_same_training(
    tiny: ModuleType, drawings: Path, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = f"small/{learner}-5way-1shot"
    weights = {}
    trained = tiny.train_and_test

    def keep(*arguments: object) -> object:
        found = trained(*arguments)
        weights["reference" if len(arguments) == 5 else "metafast"] = found[0].state_dict()
        return found

    monkeypatch.setattr(tiny, "train_and_test", keep)
    result = tiny.run(row, drawings, with_reference=True, say=lambda line: None)
    assert result["reference"]["agrees"]
    recipe = tiny.recipe_of(row)[0]
    start = tiny.Trainer(recipe, tiny.Tasks(recipe, False, drawings, tiny.CPU), tiny.CPU).learner.state_dict()
    # The gradient of a convolution's bias before a batch norm is nothing but rounding, which Adam makes large.
    norm_follows = tuple(f"layers.{4 * block}.bias" for block in range(4))
    names = [name for name, v in start.items() if v.is_floating_point() and not name.endswith(norm_follows)]

    def moved(by: str) -> torch.Tensor:
        return torch.cat([(weights[by][name] - start[name]).flatten() for name in names])

    assert moved("metafast").norm() > 1e-3
    assert (moved("reference") - moved("metafast")).norm() <= 0.05 * moved("metafast").norm()


@pytest.mark.parametrize("learner", ["maml", "protonets"])
def test_inductive_queries_see_no_other(tiny: ModuleType, drawings: Path, learner: str) -> None:
    recipe, _ = tiny.recipe_of(f"small-swapped/{learner}-5way-5shot")
    training, unseen = (tiny.Tasks(recipe, test, drawings, tiny.CPU) for test in (False, True))
    torch.manual_seed(0)
    trainer = tiny.Trainer(recipe, training, tiny.CPU)
    before = {name: value.clone() for name, value in trainer.learner.state_dict().items()}
    judge = tiny._inductive(trainer.learner, training)
    episodes = unseen.sample(3, unseen.generator())
    whole = tiny._tested([episodes], judge)
    each = [
        mf.Episodes(
            episodes.support_x, episodes.support_y, episodes.query_x[:, q : q + 1], episodes.query_y[:, q : q + 1]
        )
        for q in range(episodes.query_x.shape[1])
    ]
    alone = sum(tiny._tested([e], judge)["mean"] for e in each) / len(each)
    assert alone == pytest.approx(whole["mean"], abs=1e-4)
    # Nor does the test change what was trained.
    assert all(torch.equal(value, before[name]) for name, value in trainer.learner.state_dict().items())


def test_the_running_statistics_are_means_over_episodes(tiny: ModuleType, drawings: Path) -> None:
    recipe, _ = tiny.recipe_of("small/protonets-5way-1shot")
    training = tiny.Tasks(recipe, False, drawings, tiny.CPU)
    encoder = tiny.Trainer(recipe, training, tiny.CPU).learner.encoder
    norm = tiny._with_statistics(encoder, training).layers[1]
    episodes = next(tiny._batches(training, recipe.queries, 2))
    tasks = torch.cat([episodes.support_x, episodes.query_x], dim=1)
    with torch.no_grad():
        means = torch.stack([encoder.layers[0](task).mean((0, 2, 3)) for task in tasks])
    torch.testing.assert_close(norm.running_mean, means.mean(0))
    assert not torch.equal(norm.running_mean, encoder.layers[1].running_mean)


def test_rows_are_written_and_resumed(tiny: ModuleType, drawings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--data-root", str(drawings), "--threads", "1"]
    rows = ["small/protonets-20way-1shot", "small-swapped/fomaml-20way-1shot"]
    assert tiny.main([*root, "--minutes", "0", *rows]) == 1
    assert "no time was left for" in capsys.readouterr().out and not tiny.RESULT.exists()
    # Several rows in one run, not in their order.
    assert tiny.main([*root, rows[1], "small-swapped/fomaml-5way-1shot", "small/fomaml-5way-1shot"]) == 0
    whole = list(json.loads(tiny.RESULT.read_text())["rows"])
    assert whole == ["small/fomaml-5way-1shot", "small-swapped/fomaml-5way-1shot", rows[1]]
    tiny.RESULT.unlink()
    assert tiny.main([*root, rows[1]]) == 0
    first = json.loads(tiny.RESULT.read_text())
    assert tiny.main([*root, "--resume", *rows]) == 0
    second = json.loads(tiny.RESULT.read_text())
    assert list(second["rows"]) == rows and second["rows"][rows[1]] == first["rows"][rows[1]]
    for row, alphabets in zip(rows, (["Gamma"], ["Alpha"])):
        found = second["rows"][row]
        inside = found["within_alphabet"]
        assert inside["alphabets"] == alphabets  # Beta is in training, Delta too small
        for estimate in (
            found["metafast"]["accuracy"],
            found["inductive"],
            inside["transductive"],
            inside["inductive"],
        ):
            assert 0 <= estimate["mean"] <= 1 and estimate["interval"] >= 0 and estimate["tasks"] >= 2
        assert found["metafast"]["train_seconds"] > 0 and "reference" not in found
    assert second["machine"]["cpu"] and second["threads"] == 1


def test_a_row_of_another_recipe_is_not_resumed(
    tiny: ModuleType, drawings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = "small/fomaml-5way-5shot"
    assert tiny.main(["--data-root", str(drawings), "--threads", "1", row]) == 0
    before = json.loads(tiny.RESULT.read_text())["rows"][row]
    whole = tiny.recipe_of
    monkeypatch.setattr(tiny, "recipe_of", lambda row: (replace(whole(row)[0], seed=5), whole(row)[1]))
    assert tiny.main(["--data-root", str(drawings), "--threads", "1", "--resume", row]) == 0
    after = json.loads(tiny.RESULT.read_text())["rows"][row]
    assert (before["recipe"]["seed"], after["recipe"]["seed"]) == (0, 5)


def test_bad_input(omniglot: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("METAFAST_DATA", raising=False)
    for arguments, words in ((["nix"], "ROW: expected some of"), ([], "--data-root: expected the folder")):
        with pytest.raises(SystemExit, match="2"):
            omniglot.main(arguments)
        assert words in capsys.readouterr().err
    assert omniglot.main(["--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 32


@pytest.fixture
def agreement(tiny: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """With the small nets of ``tiny``, which it imports, and the result elsewhere."""
    module = load_module("omniglot_agreement", ROOT / "benchmarks" / "omniglot_agreement.py")
    monkeypatch.setattr(module, "RESULT", tmp_path / "agreement.json")
    return module


def test_float64_trainings_agree(agreement: ModuleType, drawings: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--data-root", str(drawings), "--threads", "1", "--trainings", "2"]
    assert agreement.main(root) == 0
    document = json.loads(agreement.RESULT.read_text())
    assert list(document["rows"]) == agreement.ROWS
    for found in document["rows"].values():
        assert found["gradients"]["steps"] == 1 and found["gradients"]["largest_error"] <= 1e-10
        assert found["float64"]["agrees"] and found["float64"]["weights_apart"] <= 1e-9
        assert len(found["float32"]) == 2
    assert agreement.main([*root, "--resume", "--minutes", "0"]) == 0
    assert json.loads(agreement.RESULT.read_text())["rows"] == document["rows"]
    assert agreement.main([*root, "--minutes", "0"]) == 1
    assert "no time was left for small/maml-5way-1shot: gradients" in capsys.readouterr().out


@pytest.mark.parametrize("learner", ["maml", "lomaml"])
def test_a_reference_that_is_another_does_not_agree(
    agreement: ModuleType,
    drawings: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    learner: str,
) -> None:
    whole = agreement.Reference._outcome

    def first_order(self: Any, episodes: mf.Episodes) -> Any:
        self.learner.first_order, own = True, self.learner.first_order
        found = whole(self, episodes)
        self.learner.first_order = own
        return found

    monkeypatch.setattr(agreement.Reference, "_outcome", first_order)
    row = f"small/{learner}-5way-1shot"
    assert agreement.main(["--data-root", str(drawings), "--threads", "1", "--trainings", "0", row]) == 1
    assert f"does not agree on {row}: gradients" in capsys.readouterr().out
    found = json.loads(agreement.RESULT.read_text())["rows"][row]
    assert found["gradients"]["largest_error"] > 1e-6 and found["float64"]["weights_apart"] > 1e-6


def test_weights_are_off_by_a_rounding(agreement: ModuleType) -> None:
    learner = mf.MAML(mf.models.Conv4(5, 2))
    before = [weight.detach().clone() for weight in learner.parameters()]
    assert agreement.weights_apart(agreement.nudged(copy.deepcopy(learner), 0), learner) == pytest.approx(1e-7, rel=0.1)
    moved = [((a.detach() - b).abs(), b.abs()) for a, b in zip(agreement.nudged(learner, 0).parameters(), before)]
    assert all((step <= 2**-22 * size).all() for step, size in moved)
    assert 0.3 < sum(int(step.count_nonzero()) for step, _ in moved) / sum(size.numel() for _, size in moved) < 0.8
