"""Cases for ``mf.ops``: values, first and second derivatives against plain expressions under autograd."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast import ops, reference
from metafast.checks.compare import Case, Inputs, Quantities
from metafast.episodes import Episodes
from metafast.losses import mse
from metafast.lstm import LSTMOptimizer
from metafast.models import MLP
from metafast.reference import lstm_step

Function = Callable[..., tuple[Tensor, ...]]


def operator_cases(quick: bool) -> Iterator[Case]:
    """All of them; ``quick`` leaves out the larger sizes."""
    yield from _inner_update_cases(quick)
    yield from _momentum_update_cases(quick)
    yield from _prototype_cases(quick)
    yield from _hvp_cases()
    yield from _lstm_cases(quick)
    yield from _mlp_meta_step_cases(quick)


def derivatives(function: Function, tensors: Sequence[Tensor], order: int = 2) -> Quantities:
    """Values of a function of tensors, J'c along fixed cotangents c, and the derivative of that, too, in c and inputs.

    Args:
        function: tensors to a tuple of tensors.
        tensors: where; all floating.
        order: up to which derivative.
    """
    leaves = [t.detach().requires_grad_() for t in tensors]
    values = function(*leaves)
    result: Quantities = {"values": values}
    if order >= 1:
        cotangents = [_direction(v, i).requires_grad_() for i, v in enumerate(values)]
        first = torch.autograd.grad(values, leaves, cotangents, create_graph=order > 1, materialize_grads=True)
        result["first derivatives"] = first
    if order >= 2:
        attached = [(d, _direction(d, 10 + i)) for i, d in enumerate(first) if d.requires_grad]
        outputs, along = zip(*attached)
        result["second derivatives"] = torch.autograd.grad(
            outputs, [*leaves, *cotangents], along, materialize_grads=True
        )
    return result


def _direction(like: Tensor, seed: int) -> Tensor:
    # Drawn in float32, so that every dtype sees the very same numbers.
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- inner_update, momentum_update -------------------------------------------------------------------------------


def _sizes(quick: bool) -> list[tuple[int, int]]:
    """Of parameters (T, P), around the widths of vector registers and blocks."""
    return [(1, 1), (3, 17)] if quick else [(1, 1), (3, 17), (2, 63), (2, 64), (5, 1025)]


def _inner_update_cases(quick: bool) -> Iterator[Case]:
    sizes = _sizes(quick)

    def inputs(tasks: int, width: int, rate: Callable[[int, int], tuple[int, ...]] | None) -> Inputs:
        made: Inputs = {"params": _draw(0, tasks, width), "grads": _draw(1, tasks, width)}
        return made if rate is None else made | {"lr": _draw(2, *rate(tasks, width))}

    def plain(params: Tensor, grads: Tensor, lr: Tensor | float = 0.3) -> tuple[Tensor]:
        return (params - lr * grads,)

    def ours(params: Tensor, grads: Tensor, lr: Tensor | float = 0.3) -> tuple[Tensor]:
        return (ops.inner_update(params, grads, lr),)

    def ours_listed(params: Tensor, grads: Tensor, lr: Tensor) -> tuple[Tensor]:
        # Layers of a third and the rest; the first third is empty where there is one column.
        cut = params.shape[1] // 3
        parts = [[t[:, :cut], t[:, cut:]] for t in (params, grads, lr)]
        return (torch.cat(ops.inner_update(parts[0], parts[1], parts[2]), dim=1),)

    rates: dict[str, Callable[[int, int], tuple[int, ...]] | None] = {
        "a number": None,
        "(P,)": lambda tasks, width: (width,),
        "(T, 1)": lambda tasks, width: (tasks, 1),
        "(T, P)": lambda tasks, width: (tasks, width),
    }
    for name, rate in rates.items():
        draws = tuple(partial(inputs, tasks, width, rate) for tasks, width in sizes)
        yield Case("inner_update", f"lr {name}", draws, _over(ours), _over(plain))
    draws = tuple(partial(inputs, tasks, width, rates["(T, P)"]) for tasks, width in sizes if width > 2)
    yield Case("inner_update", "lists", draws, _over(ours_listed), _over(plain))


def _momentum_update_cases(quick: bool) -> Iterator[Case]:
    def inputs(tasks: int, width: int) -> Inputs:
        return {name: _draw(i, tasks, width) for i, name in enumerate(("params", "grads", "velocity"))}

    def plain(params: Tensor, grads: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        after = 0.9 * velocity + grads
        return params - 0.3 * after, after

    def ours(params: Tensor, grads: Tensor, velocity: Tensor) -> tuple[Tensor, Tensor]:
        return ops.momentum_update(params, grads, velocity, 0.3, 0.9)

    draws = tuple(partial(inputs, *size) for size in _sizes(quick))
    yield Case("momentum_update", "heavy ball", draws, _over(ours), _over(plain))


def _over(function: Function, order: int = 2) -> Callable[[Inputs], Quantities]:
    """The quantities of a function that takes all inputs, tensors, in their order."""

    def measure(inputs: Inputs) -> Quantities:
        return derivatives(function, [cast(Tensor, t) for t in inputs.values()], order)

    return measure


# --- prototypes --------------------------------------------------------------------------------------------------


def _prototype_cases(quick: bool) -> Iterator[Case]:
    sizes = [(1, 1, 1, 1, 1), (3, 5, 2, 7, 17)]  # tasks, ways, shots, queries, features
    if not quick:
        sizes += [(2, 20, 1, 3, 64), (2, 5, 5, 75, 129)]

    def inputs(tasks: int, ways: int, shots: int, queries: int, features: int) -> Inputs:
        generator = torch.Generator().manual_seed(3)
        order = [torch.randperm(ways * shots, generator=generator) for _ in range(tasks)]
        return {
            # Far enough from 0 for cosines to have room, near enough together for softmax to be no one-hot.
            "support": 1.0 + _draw(0, tasks, ways * shots, features) / math.sqrt(features),
            "query": 1.0 + _draw(1, tasks, queries, features) / math.sqrt(features),
            "support_y": torch.stack([torch.arange(ways).repeat(shots)[o] for o in order]),
            "query_y": torch.randint(ways, (tasks, queries), generator=generator),
        }

    def measure(inputs: Inputs, head: Callable[[Inputs, Tensor, Tensor], Tensor]) -> Quantities:
        embedded = [cast(Tensor, inputs["support"]), cast(Tensor, inputs["query"])]
        return derivatives(lambda s, q: (head(inputs, s, q),), embedded)

    for metric in ("sqeuclidean", "euclidean", "cosine"):
        for subject, ours, plain in (
            ("prototype_logits", _logits, _plain_logits),
            ("prototype_loss", _loss, _plain_loss),
        ):
            yield Case(
                subject,
                metric,
                # With one feature a cosine is constant, and its derivatives rounding alone.
                tuple(partial(inputs, *size) for size in sizes if metric != "cosine" or size[-1] > 1),
                partial(measure, head=partial(ours, metric)),
                partial(measure, head=partial(plain, metric)),
            )


def _labels(inputs: Inputs) -> tuple[Tensor, Tensor, int]:
    support_y, query_y = cast(Tensor, inputs["support_y"]), cast(Tensor, inputs["query_y"])
    return support_y, query_y, int(support_y.max()) + 1


def _logits(metric: str, inputs: Inputs, support: Tensor, query: Tensor) -> Tensor:
    support_y, _, ways = _labels(inputs)
    return ops.prototype_logits(support, support_y, query, ways, metric)


def _loss(metric: str, inputs: Inputs, support: Tensor, query: Tensor) -> Tensor:
    support_y, query_y, ways = _labels(inputs)
    return ops.prototype_loss(support, support_y, query, query_y, ways, metric)


def _plain_logits(metric: str, inputs: Inputs, support: Tensor, query: Tensor) -> Tensor:
    support_y, _, ways = _labels(inputs)
    tasks = []
    for s, y, q in zip(support, support_y, query):
        means = torch.stack([s[y == c].mean(0) for c in range(ways)])
        if metric == "cosine":
            tasks.append(F.cosine_similarity(q.unsqueeze(1), means.unsqueeze(0), dim=-1))
        else:
            squares = ((q.unsqueeze(1) - means.unsqueeze(0)) ** 2).sum(-1)
            tasks.append(-squares.sqrt() if metric == "euclidean" else -squares)
    return torch.stack(tasks)


def _plain_loss(metric: str, inputs: Inputs, support: Tensor, query: Tensor) -> Tensor:
    _, query_y, _ = _labels(inputs)
    logits = _plain_logits(metric, inputs, support, query)
    return torch.stack([F.cross_entropy(f, y) for f, y in zip(logits, query_y)])


# --- hvp ---------------------------------------------------------------------------------------------------------


class _Energy(nn.Module):
    """A scalar of a batch: mean squared output of a small net with a norm in it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 2))

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return mse(outputs, torch.ones_like(outputs))


def _hvp_cases() -> Iterator[Case]:
    def function_inputs() -> Inputs:
        return {"params": _draw(0, 17), "vector": _draw(1, 17), "matrix": _draw(2, 17, 17)}

    def energy(params: Tensor, matrix: Tensor) -> Tensor:
        return (params @ matrix).tanh().square().sum() + (params**4).sum()

    def ours(inputs: Inputs) -> Quantities:
        params, vector, matrix = (cast(Tensor, t) for t in inputs.values())
        return {"values": [cast(Tensor, ops.hvp(energy, params, vector, matrix))]}

    def plain(inputs: Inputs) -> Quantities:
        params, vector, matrix = (cast(Tensor, t) for t in inputs.values())
        params.requires_grad_()
        (gradient,) = torch.autograd.grad(energy(params, matrix), params, create_graph=True)
        return {"values": torch.autograd.grad(gradient, params, vector)}

    def module_inputs() -> Inputs:
        return {"module": seeded(_Energy, 0), "vector": seeded(_Energy, 1), "x": _draw(2, 5, 3)}

    def ours_of_module(inputs: Inputs) -> Quantities:
        module, other = cast(nn.Module, inputs["module"]), cast(nn.Module, inputs["vector"])
        params, vector = ({n: p.detach() for n, p in m.named_parameters()} for m in (module, other))
        product = ops.hvp(module, params, vector, inputs["x"])
        assert isinstance(product, dict)  # like params
        return {"values": [product[name] for name in params]}

    def plain_of_module(inputs: Inputs) -> Quantities:
        module, other = cast(nn.Module, inputs["module"]), cast(nn.Module, inputs["vector"])
        leaves = list(module.parameters())
        gradient = torch.autograd.grad(module(inputs["x"]), leaves, create_graph=True)
        vector = [p.detach() for p in other.parameters()]
        return {"values": torch.autograd.grad(gradient, leaves, vector, materialize_grads=True)}

    def loss_inputs() -> Inputs:
        return module_inputs() | {"y": _draw(3, 5, 2)}

    def ours_of_loss(inputs: Inputs) -> Quantities:
        module, other = (cast(_Energy, inputs[name]).net for name in ("module", "vector"))
        params, vector = ({n: p.detach() for n, p in m.named_parameters()} for m in (module, other))
        product = ops.hvp(module, params, vector, inputs["x"], inputs["y"], loss="mse")
        assert isinstance(product, dict)  # like params
        return {"values": [product[name] for name in params]}

    def plain_of_loss(inputs: Inputs) -> Quantities:
        module, other = (cast(_Energy, inputs[name]).net for name in ("module", "vector"))
        leaves = list(module.parameters())
        value = mse(module(inputs["x"]), cast(Tensor, inputs["y"]))
        gradient = torch.autograd.grad(value, leaves, create_graph=True)
        return {"values": torch.autograd.grad(gradient, leaves, [p.detach() for p in other.parameters()])}

    yield Case("hvp", "of a function", (function_inputs,), ours, plain, by_torch=True)
    yield Case("hvp", "of a module", (module_inputs,), ours_of_module, plain_of_module, by_torch=True)
    yield Case("hvp", "of a network's loss", (loss_inputs,), ours_of_loss, plain_of_loss)


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A new float64 module, its weights drawn from the seed and moved off 0 and 1, where errors could hide."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make().double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return module


# --- lstm_update -------------------------------------------------------------------------------------------------


def _lstm_cases(quick: bool) -> Iterator[Case]:
    # Zero, both sides of exp(-10), both signs, large ones.
    edges = [0.0, 1e-6, -1e-6, 4e-5, -5e-5, 0.01, -0.3, 2.0, -7.0, 100.0]

    def inputs(layers: int, hidden: int, coordinates: int) -> Inputs:
        optimizer = seeded(lambda: LSTMOptimizer(hidden=hidden, layers=layers), 0)
        weights = {f"weight {i}": w.detach() for i, w in enumerate(optimizer.parameters())}
        grads = torch.cat([torch.tensor(edges, dtype=torch.float64), _draw(1, coordinates)])[:coordinates]
        return {"grads": grads, "state": 0.5 * _draw(2, layers, 2, coordinates, hidden), **weights}

    def ours(grads: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return ops.lstm_update(grads, state, weights)

    def plain(grads: Tensor, state: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return lstm_step(grads, state, weights)

    sizes = [(4, 1), (20, 13)] if quick else [(4, 1), (20, 13), (20, 65)]
    for layers in (1, 2):
        draws = tuple(partial(inputs, layers, hidden, count) for hidden, count in sizes)
        yield Case("lstm_update", f"{layers} layer{'s' * (layers > 1)}", draws, _over(ours), _over(plain))


# --- mlp_meta_step, which mf.ops does not have: the kernel of GPUs for small networks ------------------------------


def _mlp_meta_step_cases(quick: bool) -> Iterator[Case]:
    lr, steps = 0.3, 3

    def inputs(tasks: int, shots: int, queries: int, widths: tuple[int, ...]) -> Inputs:
        first, *hidden, last = widths

        def side(seed: int, samples: int) -> tuple[Tensor, Tensor]:
            return _draw(seed, tasks, samples, first), _draw(seed + 1, tasks, samples, last)

        return {
            "model": seeded(lambda: MLP(first, tuple(hidden), last, "tanh"), 0),
            "episodes": Episodes(*side(1, shots), *side(3, queries)),
            "weights": torch.linspace(0.2, 0.7, tasks, dtype=torch.float64),
        }

    def parts(inputs: Inputs) -> tuple[nn.Module, Episodes, Tensor]:
        return cast(nn.Module, inputs["model"]), cast(Episodes, inputs["episodes"]), cast(Tensor, inputs["weights"])

    def ours(inputs: Inputs) -> Quantities:
        model, e, weights = parts(inputs)
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        widths = [linears[0].in_features, *(m.out_features for m in linears)]
        theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
        sets = (e.support_x, e.support_y, e.query_x, e.query_y)
        losses, logits, _, summed = torch.ops.metafast.mlp_meta_step(
            theta, widths, "tanh", "mse", *sets, lr, steps, False, weights
        )
        return {"outcome": (losses, logits), "gradient": (summed,)}

    def plain(inputs: Inputs) -> Quantities:
        model, e, weights = parts(inputs)
        out = reference.maml(model, e, lr=lr, steps=steps, loss="mse", weights=weights)
        out.loss.backward()
        gradient = torch.cat([cast(Tensor, p.grad).reshape(-1) for p in model.parameters()])
        return {"outcome": (out.losses, out.logits), "gradient": (gradient,)}

    sizes = [(1, 1, 1, (1, 1, 1)), (3, 5, 7, (3, 13, 5, 2))]
    if not quick:
        sizes.append((2, 10, 10, (1, 40, 40, 1)))
    draws = tuple(partial(inputs, *size) for size in sizes)
    yield Case("mlp_meta_step", f"{steps} steps", draws, ours, plain, only=("simt", "cuda"))
