"""Masked episodes: each task as if it were alone and never padded, for every learner, through both doors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metafast as mf
from tests.nets import build, gradient, relative_error

EXACT = 1e-10
Task = tuple[Tensor, Tensor, Tensor, Tensor]
# Support shots a class, queries, ways: odd sizes, one size twice, ways that differ.
# The order of the groups, 0 3 1 2 4, is not its own inverse.
SIZES = ((1, 5, 3), (4, 2, 3), (3, 7, 2), (1, 5, 3), (2, 3, 3))


def tasks_for(net: str, sizes: tuple[tuple[int, int, int], ...] = SIZES, seed: int = 3) -> list[Task]:
    generator = torch.Generator().manual_seed(seed)
    shape = (1, 16, 16) if net == "conv4" else (6,)
    tasks = []
    for shots, queries, ways in sizes:
        sy = torch.arange(ways).repeat(shots)
        qy = torch.randint(ways, (queries,), generator=generator)
        x = torch.randn(len(sy) + queries, *shape, dtype=torch.float64, generator=generator)
        tasks.append((x[: len(sy)], sy, x[len(sy) :], qy))
    return tasks


def poisoned(tasks: list[Task], seed: int = 0) -> mf.Episodes:
    """Padding full of NaN and of labels that no class has, in places anywhere between the samples."""
    generator = torch.Generator().manual_seed(seed)

    def side(which: int) -> tuple[Tensor, Tensor, Tensor]:
        longest = max(len(task[which]) for task in tasks) + 2
        x = torch.full((len(tasks), longest, *tasks[0][which].shape[1:]), torch.nan, dtype=torch.float64)
        y = torch.full((len(tasks), longest), -77)
        mask = torch.zeros(len(tasks), longest, dtype=torch.bool)
        for t, task in enumerate(tasks):
            places = torch.randperm(longest, generator=generator)[: len(task[which])].sort().values
            x[t, places], y[t, places], mask[t, places] = task[which], task[which + 1], True
        return x, y, mask

    (sx, sy, sm), (qx, qy, qm) = side(0), side(2)
    return mf.Episodes(sx, sy, qx, qy, sm, qm)


def alone(task: Task) -> mf.Episodes:
    return mf.Episodes(*(t.unsqueeze(0) for t in task))


Reference = Callable[[nn.Module, mf.Episodes], mf.reference.learners.Outcome]


def learners() -> dict[str, Any]:
    """For each: the learner of a net, and the reference on one task."""
    optimizer = mf.LSTMOptimizer(hidden=3).double()
    step = {"lr": 0.1, "steps": 2}
    r = mf.reference
    return {
        "maml": (lambda net: mf.MAML(net, **step), lambda net, e: r.maml(net, e, **step)),
        "fomaml": (
            lambda net: mf.MAML(net, **step, first_order=True),
            lambda net, e: r.maml(net, e, **step, first_order=True),
        ),
        "lomaml": (lambda net: mf.LOMAML(net, optimizer, **step), lambda net, e: r.lomaml(net, optimizer, e, **step)),
        "protonets": (mf.ProtoNets, r.protonets),
        "multi-step": (
            lambda net: mf.MAML(net, **step, query_weights=(0.3, 0.7)),
            lambda net, e: r.maml(net, e, **step, query_weights=(0.3, 0.7)),
        ),
    }


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", learners())
@pytest.mark.parametrize("name", ["mlp", "batch_norm", "conv4"])
def test_each_task_is_as_if_alone(name: str, kind: str, weighted: bool, backend: str) -> None:
    make, reference = learners()[kind]
    tasks = tasks_for(name)
    weights = torch.tensor([0.7, -0.2, 1.5, 0.4, 0.1], dtype=torch.float64)
    shares = weights if weighted else torch.full((5,), 0.2, dtype=torch.float64)
    model = build(name)
    wanted = [reference(model, alone(task)) for task in tasks]
    sum(w * out.loss for w, out in zip(shares, wanted)).backward()
    wanted_gradient = gradient(model)

    model.zero_grad()
    learner = make(model)
    episodes = poisoned(tasks)
    arguments = (episodes, weights) if weighted else (episodes,)
    out = learner(*arguments)
    out.loss.backward()
    assert relative_error(gradient(model), wanted_gradient) <= EXACT
    model.zero_grad()
    second = learner.accumulate_grad(*arguments)
    assert relative_error(gradient(model), wanted_gradient) <= EXACT
    for found in (out, second):
        assert relative_error(found.losses, torch.cat([o.losses for o in wanted])) <= EXACT
        assert relative_error(found.loss, sum(w * o.loss for w, o in zip(shares, wanted))) <= EXACT
        assert torch.equal(found.accuracy, torch.cat([o.accuracy for o in wanted]))
        assert found.logits.shape == (*episodes.query_y.shape, 3)
        assert bool((found.logits[~episodes.query_mask] == 0).all())
        for t, one in enumerate(wanted):
            logits = found.logits[t][episodes.query_mask[t]]
            ways = one.logits.shape[2]
            assert relative_error(logits[:, :ways], one.logits[0]) <= EXACT
            assert bool((logits[:, ways:] == -torch.inf).all())
    assert second.loss.grad_fn is None and not second.logits.requires_grad


def test_the_family_takes_masks(backend: str) -> None:
    """CAVIA, Reptile and ProtoMAML by their references too; the last with all classes in every task."""
    sizes = ((1, 5, 3), (4, 2, 3), (2, 1, 3))
    tasks = tasks_for("mlp", sizes)
    episodes = poisoned(tasks)
    model = build("mlp")
    encoder = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    cases: list[tuple[nn.Module, Any, Any]] = [
        (
            mf.CAVIA(model, lr=0.2, steps=2, context=["4.bias"]),
            model,
            lambda e: mf.reference.cavia(model, e, context=["4.bias"], lr=0.2, steps=2),
        ),
        (
            mf.ProtoMAML(encoder, features=4, ways=3, lr=0.1, steps=2),
            encoder,
            lambda e: mf.reference.protomaml(encoder, e, ways=3, lr=0.1, steps=2),
        ),
    ]
    for learner, net, reference in cases:
        net.zero_grad()
        wanted = [reference(alone(task)) for task in tasks]
        torch.stack([o.loss for o in wanted]).mean().backward()
        wanted_gradient = gradient(net)
        net.zero_grad()
        out = learner.accumulate_grad(episodes)
        assert relative_error(out.losses, torch.cat([o.losses for o in wanted])) <= EXACT
        assert relative_error(gradient(net), wanted_gradient) <= EXACT
    reptile = mf.Reptile(model, lr=0.1, steps=3)
    model.zero_grad()
    reptile(episodes).loss.backward()
    names = [name for name, _ in model.named_parameters()]
    each = [mf.reference.reptile(model, alone(task), lr=0.1, steps=3)[1] for task in tasks]
    wanted_pull = torch.cat([torch.stack([pull[name] for pull in each]).mean(0).flatten() for name in names])
    assert relative_error(gradient(model), wanted_pull) <= EXACT


def test_regression_and_float32(backend: str) -> None:
    waves = mf.data.Sinusoid()
    sizes = ((3, 10), (7, 4), (1, 1))
    made = [waves.sample(1, shots, queries, torch.Generator().manual_seed(shots)) for shots, queries in sizes]
    tasks = [tuple(t[0] for t in (e.support_x, e.support_y, e.query_x, e.query_y)) for e in made]
    model = mf.models.MLP(1, (7, 5), 1)
    maml = mf.MAML(model, lr=0.05, steps=2, loss="mse")
    out = maml(mf.Episodes.ragged(tasks))
    out.loss.backward()
    assert out.accuracy is None and out.logits.shape == (3, 10, 1)
    double = copy.deepcopy(model).double()
    double.zero_grad()
    wanted = [mf.reference.maml(double, e.to(dtype=torch.float64), lr=0.05, steps=2, loss="mse") for e in made]
    torch.stack([o.loss for o in wanted]).mean().backward()
    assert relative_error(out.losses.double(), torch.cat([o.losses for o in wanted])) <= 1e-5
    assert relative_error(gradient(model).double(), gradient(double)) <= 1e-5


def test_tasks_of_one_size_are_the_dense_batch_to_the_bit(backend: str) -> None:
    tasks = tasks_for("batch_norm", ((2, 3, 3),) * 4)
    dense = mf.Episodes(*(torch.stack(column) for column in zip(*tasks)))
    assert not mf.Episodes.ragged(tasks).masked
    for make in (lambda net: mf.MAML(net, lr=0.1, steps=2), mf.ProtoNets):
        net = build("batch_norm")
        one = make(net).accumulate_grad(dense)
        wanted = gradient(net)
        net.zero_grad()
        other = make(net).accumulate_grad(poisoned(tasks))
        assert torch.equal(gradient(net), wanted) and torch.equal(one.losses, other.losses)


def test_the_bits_hang_on_no_thread() -> None:
    episodes = poisoned(tasks_for("conv4"))
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        net = build("conv4")
        mf.MAML(net, lr=0.1, steps=2).accumulate_grad(episodes)
        found.append(gradient(net))
    assert torch.equal(*found)


def test_one_task_and_a_single_sample() -> None:
    tasks = tasks_for("mlp", ((1, 1, 3),))
    tasks = [(tasks[0][0][:1], tasks[0][1][:1], *tasks[0][2:])]
    model = build("mlp")
    out = mf.MAML(model, lr=0.1, steps=1)(poisoned(tasks))
    wanted = mf.reference.maml(model, alone(tasks[0]), lr=0.1, steps=1)
    assert relative_error(out.losses, wanted.losses) <= EXACT


@pytest.mark.parametrize("kind", ["maml", "protonets"])
def test_a_hook_sees_one_gradient_of_all_tasks(kind: str) -> None:
    episodes = poisoned(tasks_for("mlp"))
    model = build("mlp")
    learner = learners()[kind][0](model)
    learner.accumulate_grad(episodes)
    wanted, seen = model[0].weight.grad.clone(), []
    model.zero_grad()
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    learner.accumulate_grad(episodes)
    assert len(seen) == 1
    assert relative_error(seen[0], wanted) <= 1e-13


def test_weights_get_gradients_too() -> None:
    episodes = poisoned(tasks_for("mlp"))
    weights = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)
    out = mf.MAML(build("mlp"), lr=0.1, steps=1)(episodes, weights)
    out.loss.backward()
    torch.testing.assert_close(weights.grad, out.losses.detach(), rtol=1e-12, atol=0)


def test_a_group_that_is_refused_changes_nothing() -> None:
    """The last task has a label that the net has no output for; a query of a class without support."""
    tasks = tasks_for("mlp")
    sx, sy, qx, qy = tasks[-1]
    model = build("mlp")
    with pytest.raises(ValueError, match="^query_y: expected labels below 3"):
        mf.MAML(model).accumulate_grad(poisoned([*tasks[:-1], (sx, sy, qx, qy + 3)]))
    with pytest.raises(ValueError, match="^query_y: expected labels below 3, the classes with support"):
        mf.ProtoNets(model).accumulate_grad(poisoned([*tasks[:-1], (sx, sy, qx, torch.full_like(qy, 3))]))
    gap = poisoned([*tasks[:-1], (sx, torch.where(sy == 1, 2, sy), qx, qy * 0)])
    with pytest.raises(ValueError, match=r"^support_y: every class 0..2 needs support, task 4 has none of 1"):
        mf.ProtoNets(model).accumulate_grad(gap)
    proto = mf.ProtoMAML(nn.Linear(6, 4).double(), features=4, ways=3)
    with pytest.raises(ValueError, match=r"^support_y: every class 0..2 needs support, task 2 has none of 2"):
        proto(poisoned(tasks))
    with pytest.raises(ValueError, match="^support_batch: expected a divisor of the"):
        mf.MAML(model, support_batch=3, steps=1).accumulate_grad(poisoned(tasks_for("mlp", ((1, 1, 3), (4, 2, 2)))))
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match=r"^weights: expected shape \(5,\)"):
        mf.MAML(model)(poisoned(tasks), torch.ones(4, dtype=torch.float64))
    for reference in (
        lambda e: mf.reference.maml(model, e, lr=0.1, steps=1),
        lambda e: mf.reference.protonets(model, e),
        lambda e: mf.reference.protomaml(model, e, ways=3, lr=0.1, steps=1),
    ):
        with pytest.raises(ValueError, match="^episodes: the reference takes tasks of one size"):
            reference(poisoned(tasks))


# --- the episodes ------------------------------------------------------------------------------------------------


def test_ragged_pads_and_masks() -> None:
    tasks = tasks_for("mlp")
    episodes = mf.Episodes.ragged(iter(tasks))
    assert episodes.masked and episodes.tasks == 5 and episodes.classes == 3
    assert episodes.ways.tolist() == [3, 3, 2, 3, 3]
    for t, task in enumerate(tasks):
        sides = ((0, episodes.support_x, episodes.support_mask), (2, episodes.query_x, episodes.query_mask))
        for which, x, mask in sides:
            assert torch.equal(x[t][mask[t]], task[which])
            assert bool((x[t][~mask[t]] == 0).all())
            assert mask[t].tolist() == [i < len(task[which]) for i in range(mask.shape[1])]
    only_queries = mf.Episodes.ragged(tasks_for("mlp", ((2, 3, 3), (2, 4, 3))))
    assert only_queries.support_mask is None and only_queries.query_mask is not None
    groups = episodes.groups()
    assert [tasks for tasks, _ in groups] == [[0, 3], [1], [2], [4]]
    assert all(not dense.masked for _, dense in groups)


def test_slices_moves_and_signatures_keep_masks() -> None:
    episodes = poisoned(tasks_for("mlp"))
    part = episodes[1:3]
    assert torch.equal(part.support_mask, episodes.support_mask[1:3])
    assert torch.equal(part.query_mask, episodes.query_mask[1:3])
    single = episodes.to(dtype=torch.float32)
    assert single.query_x.dtype == torch.float32 and single.query_mask.dtype == torch.bool
    dense = mf.Episodes(
        *(t.nan_to_num() for t in (episodes.support_x, episodes.support_y.clamp(min=0))),
        *(t.nan_to_num() for t in (episodes.query_x, episodes.query_y.clamp(min=0))),
    )
    assert dense.signature != episodes.signature


def test_a_mask_that_changes_is_looked_at_again() -> None:
    episodes = poisoned(tasks_for("mlp"))
    episodes.query_mask[2] = False
    with pytest.raises(ValueError, match="^query_mask: expected a sample in every task, task 2 has none"):
        mf.MAML(build("mlp"))(episodes)


def bad(**changes: Any) -> Callable[[], mf.Episodes]:
    def make() -> mf.Episodes:
        x, y = torch.zeros(2, 3, 6), torch.zeros(2, 3, dtype=torch.int64)
        given = {"support_x": x, "support_y": y, "query_x": x, "query_y": y}
        return mf.Episodes(**{**given, **changes})

    return make


SAMPLE = (torch.zeros(2, 6), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (bad(support_mask=[True]), TypeError, "support_mask: expected a tensor"),
        (bad(support_mask=torch.ones(2, 3)), TypeError, "support_mask: expected a bool tensor, got a float32"),
        (
            bad(query_mask=torch.ones(2, 4).bool()),
            ValueError,
            r"query_mask: expected \(T, N\) = \(2, 3\) as in query_x",
        ),
        (bad(query_mask=torch.ones(3).bool()), ValueError, r"query_mask: expected \(T, N\) = \(2, 3\)"),
        (
            bad(support_mask=torch.zeros(2, 3).bool()),
            ValueError,
            "support_mask: expected a sample in every task, task 0",
        ),
        (
            bad(support_x=torch.full((2, 3, 6), torch.nan), support_mask=torch.ones(2, 3).bool()),
            ValueError,
            "support_x: expected finite values",
        ),
        (
            bad(support_y=torch.full((2, 3), -1), support_mask=torch.ones(2, 3).bool()),
            ValueError,
            "support_y: expected labels from 0 up",
        ),
        (lambda: mf.Episodes.ragged([]), ValueError, "tasks: expected at least one"),
        (lambda: mf.Episodes.ragged([SAMPLE]), ValueError, "tasks: expected support_x, .* of each, task 0 has 2"),
        (lambda: mf.Episodes.ragged([(*SAMPLE, 1, 2)]), TypeError, "query_x of task 0: expected a tensor, got 1"),
        (
            lambda: mf.Episodes.ragged([(*SAMPLE, *SAMPLE), (*SAMPLE, torch.zeros(2, 5), SAMPLE[1])]),
            ValueError,
            "query_x of task 1: expected samples as of task 0",
        ),
        (
            lambda: mf.Episodes.ragged([(*SAMPLE, SAMPLE[0], SAMPLE[1][:1])]),
            ValueError,
            "query_y of task 0: expected 2 as in query_x, got 1",
        ),
        (
            lambda: mf.Episodes.ragged([(*SAMPLE, SAMPLE[0][:0], SAMPLE[1][:0])]),
            ValueError,
            r"query_x of task 0: expected \(N, ...\) with a sample or more",
        ),
    ],
)
def test_bad_masks_and_tasks(make: Callable[[], mf.Episodes], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"^{words}"):
        make()


# --- sampling ----------------------------------------------------------------------------------------------------


def table() -> mf.data.ClassTable:
    # An item says of which class and which one it is.
    items = torch.tensor([[c, i] for c in range(7) for i in range(9)], dtype=torch.float32)
    return mf.data.ClassTable(items, [9] * 7)


def test_ranges_of_ways_and_shots() -> None:
    episodes = table().sample(400, (2, 5), (1, 3), 2, torch.Generator().manual_seed(0))
    assert episodes.support_x.shape == (400, 15, 2) and episodes.query_x.shape == (400, 10, 2)
    seen = set()
    for t in range(400):
        sx, sy = episodes.support_x[t][episodes.support_mask[t]], episodes.support_y[t][episodes.support_mask[t]]
        qx, qy = episodes.query_x[t][episodes.query_mask[t]], episodes.query_y[t][episodes.query_mask[t]]
        ways = int(sy.max()) + 1
        shots = sy.bincount()
        assert len(set(shots.tolist())) == 1 and qy.bincount().tolist() == [2] * ways
        seen.add((ways, int(shots[0])))
        for c in range(ways):
            assert len({*sx[sy == c][:, 0].tolist(), *qx[qy == c][:, 0].tolist()}) == 1  # one class a label
        together = torch.cat([sx, qx]).tolist()
        assert len(set(map(tuple, together))) == len(together)  # no item twice
    assert seen == {(w, s) for w in (2, 3, 4, 5) for s in (1, 2, 3)}
    again = table().sample(400, (2, 5), (1, 3), 2, torch.Generator().manual_seed(0))
    assert torch.equal(again.support_mask, episodes.support_mask) and torch.equal(again.query_x, episodes.query_x)
    assert not table().sample(2, 3, 1, 2).masked


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ways": (2, 8)}, "ways: expected at most 7"),
        ({"ways": (3, 2)}, r"ways: expected \(low, high\) with low at most high, got \(3, 2\)"),
        ({"shots": (1, 2, 3)}, r"shots: expected an int or \(low, high\)"),
        ({"shots": (0, 2)}, "shots: expected an int of at least 1"),
        ({"shots": (1, 8), "queries": 2}, r"shots \+ queries: expected at most 9"),
    ],
)
def test_bad_ranges(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        table().sample(**options)
