"""The table tells what runs a model, layer by layer, and why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import metafast as mf
from metafast import _native
from tests.engine.test_lowering import Net, resnet
from tests.nets import build


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    with mf.use_backend("auto"):
        yield


needs_extension = pytest.mark.skipif(not _native.status().available, reason="needs the extension")


@needs_extension
def test_lowered_layers_run_on_the_cpu() -> None:
    table = mf.explain(resnet(), (2, 9, 7))
    assert [row.kind for row in table.layers] == (
        ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "Conv2d", "add", "ReLU"]
        + ["AdaptiveAvgPool2d", "flatten", "Linear"]
    )
    assert {row.backend for row in table.layers} == {"cpu"}
    assert table.notes[0].startswith("workspace of a thread with 5 + 5 samples")
    first = table.layers[0]
    assert (first.name, first.output, first.parameters, first.flops) == ("conv1", (4, 5, 4), 72, 2 * 72 * 20)
    assert table.parameters == sum(row.parameters for row in table.layers)
    assert table.flops == sum(row.flops or 0 for row in table.layers) > 0
    assert table.reason == "backend auto: the cpu engine runs all layers"
    assert "conv1    Conv2d" in str(table) and "4x5x4" in str(table) and "2,880" in str(table)


@needs_extension
def test_modules_without_a_part_in_it_are_told() -> None:
    net = Net(
        lambda m, x: nn.functional.linear(m.drop(x), m.a.weight, m.a.bias),
        drop=nn.Dropout(0.0),
        a=nn.Linear(3, 2),
        unused=nn.Linear(5, 5),
    )
    rows = [(row.name, row.kind, row.parameters, row.backend) for row in mf.explain(net, (3,)).layers]
    expected = [("linear", "linear", 8, "cpu"), ("drop", "Dropout", 0, "-"), ("unused", "Linear", 30, "-")]
    assert rows == expected


@needs_extension
def test_why_torch() -> None:
    def reason(model: nn.Module, shape: tuple[int, ...], **settings: object) -> str:
        table = mf.explain(model, shape, **settings)  # type: ignore[arg-type]
        assert {row.backend for row in table.layers} == {"torch"}
        assert table.layers[0].output is not None
        return table.reason

    mlp = build("mlp")
    assert "every layer runs by torch: layer '2' (Linear) shares" in reason(build("tied"), (6,))
    assert "batch_norm='running'" in reason(build("batch_norm"), (6,), batch_norm="running")
    assert "the loss is a callable" in reason(mlp, (6,), loss=nn.functional.l1_loss)
    assert "the loss is a callable" in reason(mf.MAML(mlp, loss=nn.functional.l1_loss), (6,))
    assert "batch_norm='running'" in reason(mf.ProtoNets(build("batch_norm"), batch_norm="running"), (6,))
    assert "torch.bfloat16" in reason(nn.Linear(2, 2, dtype=torch.bfloat16), (2,))
    assert "no parameters" in reason(nn.Sequential(nn.ReLU()), (2,))
    with mf.use_backend("torch"):
        assert reason(mlp, (6,)) == "backend torch: every layer runs by torch: it is forced"
    with mf.use_backend("cpu"):
        table = mf.explain(build("tied"), (6,))
    assert {row.backend for row in table.layers} == {"-"}
    assert table.reason.startswith("backend cpu: nothing runs this: layer '2'")


@needs_extension
def test_the_emulators_engine_is_one_of_them() -> None:
    if reason := _native.missing("simt"):
        pytest.skip(reason)
    with mf.use_backend("simt"):
        table = mf.explain(build("mlp"), (6,))
    assert {row.backend for row in table.layers} == {"simt"}
    assert table.reason == "backend simt: the simt engine runs all layers"


@needs_extension
def test_a_learner_has_its_own_settings() -> None:
    model = build("batch_norm")
    assert mf.explain(mf.MAML(model), (6,)).reason.endswith("the cpu engine runs all layers")
    for settings in ({"loss": "mse"}, {"batch_norm": "running"}):
        with pytest.raises(ValueError, match="has its own"):
            mf.explain(mf.MAML(model), (6,), **settings)  # type: ignore[arg-type]


def test_without_an_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _native.Status(False, "nobody built it", None, (), (), "")
    monkeypatch.setattr(_native, "status", lambda: missing)
    table = mf.explain(build("mlp"), (6,))
    assert table.reason == "backend auto: every layer runs by torch: there is no extension: nobody built it"
    assert [row.flops for row in table.layers] == [2 * 66, 0, 2 * 143, 0, 2 * 39]


@needs_extension
def test_without_a_shape_nothing_is_claimed() -> None:
    table = mf.explain(build("mlp"))
    assert {(row.output, row.flops, row.backend) for row in table.layers} == {(None, None, "")}
    assert table.reason.endswith("give input_shape to see whether the cpu engine runs them")


def test_flops_of_what_torch_runs() -> None:
    net = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.PReLU(), nn.Flatten(2), nn.Linear(25, 3), nn.LSTM(3, 2))
    table = mf.explain(net, (2, 7, 7))
    assert [row.flops for row in table.layers] == [2 * 4 * 9 * 25, 0, 0, 2 * 25 * 3 * 4, None]


def test_bad_arguments() -> None:
    for shape in ((4,), (2, 2, 3)):
        with pytest.raises(ValueError, match="^input_shape: the module does not take samples"):
            mf.explain(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), shape)
    with pytest.raises(TypeError, match="^module: expected"):
        mf.explain(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="^loss: expected one of"):
        mf.explain(nn.Linear(3, 2), loss="hinge")
    with pytest.raises(ValueError, match="^batch_norm: 'running' needs running statistics"):
        mf.explain(nn.BatchNorm1d(2, track_running_stats=False), batch_norm="running")


def test_the_model_is_as_before() -> None:
    model = build("batch_norm")
    model[0].train(False)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    for policy in ("batch", "running"):
        mf.explain(model, (6,), batch_norm=policy)
    assert not model[0].training and model.training and not model[0]._forward_hooks
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
