"""What runs where: a table of a module's layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metafast import _check, _native
from metafast.backend import current_backend
from metafast.engine.batch_norm import check_policy
from metafast.engine.lowering import Lowered, NotLowered, lower
from metafast.engine.networks import compiled
from metafast.engine.task_model import TaskModel
from metafast.losses import LossSpec, resolve_loss

NATIVE_DTYPES = (torch.float32, torch.float64)
_NONE = "-"


@dataclass(frozen=True)
class Layer:
    """A row of the table.

    Attributes:
        name: qualified name of the layer, or of an operation in the forward.
        kind: its class or what it does.
        output: shape of its output for one sample, None where it is not known.
        parameters: how many it has.
        flops: twice the multiply-adds of its forward for one sample, None where they are not known.
        backend: what runs it; ``"-"`` if nothing does, as it changes nothing or is not called; empty if that hangs
            on the input's shape.
    """

    name: str
    kind: str
    output: tuple[int, ...] | None
    parameters: int
    flops: int | None
    backend: str


@dataclass(frozen=True)
class Explanation:
    """The rows and why the backend is what it is; ``print`` it.

    Attributes:
        module: the model's class.
        layers: the rows.
        parameters: how many the model has, in these layers or elsewhere.
        reason: what runs the layers and why.
        notes: further lines.
    """

    module: str
    layers: tuple[Layer, ...]
    parameters: int
    reason: str
    notes: tuple[str, ...] = ()

    @property
    def flops(self) -> int:
        """Twice the multiply-adds of one forward for one sample, as far as known."""
        return sum(layer.flops or 0 for layer in self.layers)

    def __str__(self) -> str:
        shapes = any(r.output is not None for r in self.layers)
        header = ("layer", "kind", "output", "parameters", "flops", "backend")
        rows = [
            (
                r.name,
                r.kind,
                "" if r.output is None else "x".join(map(str, r.output)),
                f"{r.parameters:,}",
                "" if r.flops is None else f"{r.flops:,}",
                r.backend,
            )
            for r in self.layers
        ]
        rows.append(("total", self.module, "", f"{self.parameters:,}", f"{self.flops:,}" if shapes else "", ""))
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in (header, *rows)]
        return "\n".join([*lines, self.reason, *self.notes])


def explain(
    module: nn.Module,
    input_shape: Sequence[int] | None = None,
    loss: LossSpec | None = None,
    batch_norm: str | None = None,
) -> Explanation:
    """What every layer of a module or learner runs on, and why.

    Args:
        module: a model, or a learner, whose model is meant then.
        input_shape: shape of one sample. Only with it are the output shapes, the flops and the backend known.
        loss: what a learner of the model would get, ``"cross_entropy"`` when None; a learner has its own.
        batch_norm: likewise, ``"batch"`` when None.

    Returns:
        The table; ``print(explain(model, (1, 28, 28)))``.

    Raises:
        TypeError, ValueError: no module, no shape, a shape that the module does not take, or a loss or policy that is
            unknown or given for a learner.

    Example:
        >>> from metafast import use_backend
        >>> with use_backend("torch"):
        ...     print(explain(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)), (2,)))
        layer  kind        output  parameters  flops  backend
        0      Linear      3       9           12     torch
        1      Tanh        3       0           0      torch
        2      Linear      1       4           6      torch
        total  Sequential          13          18
        backend torch: every layer runs by torch: it is forced
    """
    _check.module("module", module)
    model, loss_name, policy = _settings(module, loss, batch_norm)
    shape = None
    if input_shape is not None:
        shape = tuple(_check.integer("input_shape", n, minimum=1) for n in input_shape)
    count = sum(p.numel() for p in model.parameters())
    name = type(model).__name__
    by_torch = _why_torch(model, loss_name)
    if by_torch is None and shape is None:
        reason = f"backend {current_backend()}: give input_shape to see whether the {_engine(model)} engine runs them"
        return Explanation(name, _torch_layers(model, shape, ""), count, reason)
    if by_torch is None and shape is not None:
        try:
            lowered = lower(model, shape, policy)
            engine = compiled(lowered.descriptor(loss_name or "cross_entropy"), torch.float32)
        except NotLowered as error:
            by_torch = error.reason
        else:
            by = _engine(model)
            reason = f"backend {current_backend()}: the {by} engine runs all layers"
            notes = _notes(engine) if by == "cpu" else ()
            return Explanation(name, _lowered_layers(model, lowered, by), count, reason, notes)
    backend = current_backend()
    # A native backend that was forced refuses what it cannot run.
    runs = "torch" if backend in ("auto", "torch") else _NONE
    verb = "every layer runs by torch" if runs == "torch" else "nothing runs this"
    return Explanation(name, _torch_layers(model, shape, runs), count, f"backend {backend}: {verb}: {by_torch}")


def _settings(module: nn.Module, loss: LossSpec | None, batch_norm: str | None) -> tuple[nn.Module, str | None, str]:
    """The model, its loss's name (None for a callable) and its batch-norm policy."""
    task = getattr(module, "_task", None)
    if isinstance(task, TaskModel):
        for argument, value in (("loss", loss), ("batch_norm", batch_norm)):
            if value is not None:
                raise ValueError(f"{argument}: {type(module).__name__} has its own, got {value!r}")
        return task.model, task.loss.name if task.loss.named else None, task.batch_norm
    resolved = resolve_loss("cross_entropy" if loss is None else loss)
    policy = check_policy("batch" if batch_norm is None else batch_norm, module)
    return module, resolved.name if resolved.named else None, policy


def _why_torch(model: nn.Module, loss_name: str | None) -> str | None:
    """Why the native engine is out of the question whatever the layers; None if it is not."""
    backend = current_backend()
    if backend == "torch":
        return "it is forced"
    status = _native.status()
    if not status.available:
        return f"there is no extension: {status.reason}"
    if loss_name is None:
        return "the loss is a callable"
    first = next(model.parameters(), None)
    if first is None:
        return "the model has no parameters"
    device, engine = first.device.type, _engine(model)
    if device not in ("cpu", "cuda"):
        return f"there is no engine for {device}"
    if reason := _native.missing(engine):
        return f"there are no kernels for {engine}: {reason}"
    if device != ("cpu" if engine == "simt" else engine):
        return f"the model is on {device}"
    if first.dtype not in NATIVE_DTYPES:
        return f"the engine takes float32 and float64, the model's parameters are {first.dtype}"
    return None


def _engine(model: nn.Module) -> str:
    """Which engine would run the model: the backend that is forced, or its device's."""
    backend = current_backend()
    return next(model.parameters()).device.type if backend == "auto" else backend


def _notes(engine: Any) -> tuple[str, ...]:
    """Further lines on a lowered network: the memory of a MAML step in float32, an example's, known beforehand."""
    samples, steps = 5, (1, 5)
    sizes = [engine.workspace(samples, samples, k)[0] / 2**20 for k in steps]
    notes = [
        f"workspace of a thread with {samples} + {samples} samples in float32: "
        + ", ".join(f"{size:.2f} MiB at {k} steps" for size, k in zip(sizes, steps))
    ]
    winograd = [str(fewest) if fewest else "never" for fewest in engine.winograd_from()]
    if any(fewest != "never" for fewest in winograd):
        notes.append(
            "convolutions in order, by Winograd's algorithm from so many samples of a task: " + ", ".join(winograd)
        )
    return tuple(notes)


def _leaves(model: nn.Module) -> dict[str, nn.Module]:
    """The modules without children, by name; a model that is one has its class's name."""
    leaves = {name: m for name, m in model.named_modules() if not any(True for _ in m.children())}
    return {name or type(m).__name__: m for name, m in leaves.items()}


def _lowered_layers(model: nn.Module, lowered: Lowered, engine: str) -> tuple[Layer, ...]:
    """The lowered layers in order, then the modules that have no part in them."""
    leaves = _leaves(model)
    rows = [
        Layer(
            layer.name,
            type(leaves[layer.name]).__name__ if layer.name in leaves else layer.kind.name,
            layer.output,
            layer.parameters,
            layer.flops,
            engine,
        )
        for layer in lowered.layers
    ]
    used = _used_parameters(model, lowered)
    for name, m in leaves.items():
        own = [p for p in m.parameters() if id(p) not in used]
        # One whose parameters an operation of the forward uses is that operation's row.
        if all(name != row.name for row in rows) and (own or not any(True for _ in m.parameters())):
            rows.append(Layer(name, type(m).__name__, None, sum(p.numel() for p in own), None, _NONE))
    return tuple(rows)


def _used_parameters(model: nn.Module, lowered: Lowered) -> set[int]:
    """Identities of the parameters that lowered layers index."""
    offsets = {offset for layer in lowered.layers for offset in (layer.weight, layer.bias_offset)}
    named = dict(model.named_parameters())
    flat = [p for p in named.values() if p.requires_grad] + [named[name] for name in lowered.constants]
    used = set()
    begin = 0
    for p in flat:
        if begin in offsets:
            used.add(id(p))
        begin += p.numel()
    return used


def _torch_layers(model: nn.Module, input_shape: tuple[int, ...] | None, backend: str) -> tuple[Layer, ...]:
    """The modules without children, as torch has them."""
    leaves = _leaves(model)
    shapes = {} if input_shape is None else _output_shapes(model, leaves, input_shape)
    return tuple(
        Layer(
            name,
            type(m).__name__,
            shapes.get(name),
            sum(p.numel() for p in m.parameters()),
            _flops(m, shapes[name]) if name in shapes else None,
            backend,
        )
        for name, m in leaves.items()
    )


def _flops(module: nn.Module, output: tuple[int, ...]) -> int | None:
    """Twice the multiply-adds of a linear layer or convolution for one sample; 0 without weights, else unknown."""
    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel() * math.prod(output[:-1])
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return 2 * module.weight.numel() * math.prod(output[1:])
    return None if any(p.dim() > 1 for p in module.parameters()) else 0


def _output_shapes(
    model: nn.Module, leaves: dict[str, nn.Module], input_shape: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """Output shape of each layer for one sample, by running two samples of zeros through."""
    shapes: dict[str, tuple[int, ...]] = {}
    hooks = []
    for name, layer in leaves.items():

        def record(_m: nn.Module, _i: object, output: object, name: str = name) -> None:
            if isinstance(output, Tensor):
                shapes[name] = tuple(output.shape[1:])

        hooks.append(layer.register_forward_hook(record))
    parameter = next(model.parameters(), torch.zeros(()))
    training = {m: m.training for m in model.modules()}
    try:
        # Evaluation mode, so that running statistics stay as they are.
        model.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model(torch.zeros(2, *input_shape, dtype=parameter.dtype, device=parameter.device))
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(f"input_shape: the module does not take samples of shape {input_shape}: {error}") from error
    finally:
        for m, mode in training.items():
            m.training = mode
        for hook in hooks:
            hook.remove()
    return shapes
