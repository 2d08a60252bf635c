"""One random case of the fuzz test: a network, episodes, a learner with its options, and the same in plain autograd.

The oracle is :func:`metafast.reference.learners.over_tasks` with each rule's formula written out here, in float64.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import metafast as mf
from metafast.losses import resolve_loss
from metafast.ops.prototypes import METRICS
from metafast.reference.learners import Gradient, Parameters, moves, over_tasks
from metafast.rules import LearnedRule, moving
from tests.engine.random_nets import drawn_net
from tests.nets import gradient

RULES = ("sgd", "partial", "rates", "layer_rates", "momentum", "lstm")
KINDS = (*RULES, "protonets")
DOORS = ("autograd", "accumulate")


@dataclass
class Case:
    """A learner's computation; ``options`` as GradientLearner takes them."""

    model: nn.Module
    episodes: mf.Episodes
    weights: Tensor | None
    kind: str
    door: str
    threads: int
    loss: str
    metric: str = ""
    lr: float = 0.0
    steps: int = 0
    adapts: list[str] | None = None
    optimizer: mf.LSTMOptimizer | None = None
    first: Tensor | None = None  # (rows, P) or (K, L): the learned rates
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        e = self.episodes
        shown = {n: v for n, v in vars(self).items() if n not in ("model", "episodes", "weights", "optimizer", "first")}
        sizes = [tuple(t.shape) for t in (e.support_x, e.support_y, e.query_x)]
        steps = getattr(self.model, "steps", "")
        return f"{shown}\nweights: {self.weights}, optimizer: {self.optimizer}\nepisodes: {sizes}\n{self.model}{steps}"


@dataclass
class Result:
    """What is compared, by name; ``accuracy`` to the bit."""

    tensors: dict[str, Tensor]
    accuracy: Tensor | None


def draw(r: random.Random) -> Case:
    """A case of any source of choices; numbers are of torch's generator, seeded by one of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(r.randint(0, 2**31))
        model, shape = drawn_net(r, smallest=1)
        kind = r.choice(KINDS)
        return _case(r, model.double(), shape, kind)


def _case(r: random.Random, model: nn.Module, shape: tuple[int, ...], kind: str) -> Case:
    with torch.no_grad():
        outputs = model(torch.zeros(2, *shape, dtype=torch.float64)).shape[1]
    # Batch norm refuses a single value, and makes of a pair 1 and -1, whatever they are.
    fewest = 3 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1
    tasks = r.randint(1, 5)
    if kind == "protonets":
        ways = r.randint(2, 5)
        support, query = r.randint(max(ways, fewest), 9), r.randint(1, 7)
        labels = [torch.stack([_labels(ways, n, n == support) for _ in range(tasks)]) for n in (support, query)]
        sides = [_inputs(r, tasks, support, shape), labels[0], _inputs(r, tasks, query, shape), labels[1]]
        case = Case(model, mf.Episodes(*sides), None, kind, r.choice(DOORS), r.randint(1, 3), "cross_entropy")
        case.metric = r.choice(METRICS)
    else:
        loss = "mse" if outputs == 1 or r.random() < 0.4 else "cross_entropy"
        batch, batches, query = r.randint(fewest, 5), r.choice((1, 1, 2, 3)), r.randint(fewest, 7)
        sides = []
        for n in (batch * batches, query):
            sides.append(_inputs(r, tasks, n, shape))
            sides.append(
                torch.randn(tasks, n, outputs).double() if loss == "mse" else torch.randint(outputs, (tasks, n))
            )
        case = Case(model, mf.Episodes(*sides), None, kind, r.choice(DOORS), r.randint(1, 3), loss)
        _inner_loop(r, case, batch if batches > 1 or r.random() < 0.1 else None)
    if r.random() < 0.4:
        case.weights = torch.randn(tasks, dtype=torch.float64)
    return case


def _inputs(r: random.Random, tasks: int, samples: int, shape: tuple[int, ...]) -> Tensor:
    """(T, N, ...), sometimes with odd strides."""
    x = torch.randn(tasks, samples, *shape, dtype=torch.float64)
    odd = r.randrange(4)
    if odd == 0:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if odd == 1:
        return torch.stack([x, -x], dim=-1)[..., 0]
    return x


def _labels(ways: int, samples: int, all_of_them: bool) -> Tensor:
    labels = torch.randint(ways, (samples,))
    if all_of_them:
        labels[:ways] = torch.arange(ways)
    return labels[torch.randperm(samples)]


def _inner_loop(r: random.Random, case: Case, batch: int | None) -> None:
    case.steps, case.lr = r.randint(0, 3), r.choice((0.0, 0.03, 0.1))
    steps, names = case.steps, [name for name, p in case.model.named_parameters() if p.requires_grad]
    if case.kind == "partial" or (case.kind == "lstm" and r.random() < 0.4):
        some = r.sample(names, r.randint(1, len(names)))
        # A module stands for all of its own.
        case.adapts = [name.rpartition(".")[0] if r.random() < 0.5 and "." in name else name for name in some]
    sizes = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
    if case.kind == "rates":
        case.first = 0.1 * torch.randn(sizes, dtype=torch.float64)
    if case.kind == "layer_rates":
        case.first = 0.1 * torch.randn(max(steps, 1), len(names), dtype=torch.float64)
    if case.kind == "lstm":
        case.optimizer = mf.LSTMOptimizer(r.randint(1, 5), r.randint(1, 2), learn_state=r.random() < 0.3).double()
        with torch.no_grad():
            for w in case.optimizer.parameters():
                w.add_(0.2 * torch.randn_like(w))
    case.options = {
        "first_order": r.random() < 0.25,
        "learn_init": not (case.kind in ("rates", "layer_rates", "lstm") and steps > 0 and r.random() < 0.2),
        "query_weights": None,
        "support_batch": batch,
        "truncate": r.choice((None, None, 1, 2)),
    }
    if steps > 0 and r.random() < 0.35:
        case.options["query_weights"] = [r.choice((0.0, 1.0, 0.5, -0.3)) for _ in range(steps - 1)] + [1.0]


def _objective(case: Case, out: mf.Outcome) -> Tensor:
    """What is differentiated: all that an outcome gives, where autograd is asked."""
    if case.door == "accumulate":
        return out.loss
    return out.loss + 0.1 * (out.losses * out.losses).sum() + 0.05 * out.logits.tanh().sum()


def _result(out: mf.Outcome, owners: list[nn.Module]) -> Result:
    tensors = {"loss": out.loss, "losses": out.losses, "logits": out.logits}
    tensors |= {f"gradient {i}": gradient(owner) for i, owner in enumerate(owners)}
    return Result({name: t.detach().clone() for name, t in tensors.items()}, out.accuracy)


def native(case: Case, threads: int, backend: str = "cpu") -> Result:
    """By a backend's kernels, forced."""
    torch.set_num_threads(threads)
    owners: list[nn.Module] = [case.model]
    learner: nn.Module
    if case.kind == "protonets":
        learner = mf.ProtoNets(case.model, case.metric)
    else:
        rule = _rule(case)
        learner = mf.GradientLearner(case.model, rule, case.steps, case.loss, **case.options)
        if list(rule.parameters()):
            owners.append(rule)
    learner.zero_grad()
    with mf.use_backend(backend):
        if case.door == "accumulate":
            out = learner.accumulate_grad(case.episodes, case.weights)
        else:
            out = learner(case.episodes, case.weights)
            _objective(case, out).backward()
    torch.set_num_threads(1)
    return _result(out, owners)


def _rule(case: Case) -> mf.UpdateRule:
    if case.kind == "sgd":
        return mf.SGD(case.lr)
    if case.kind == "partial":
        return mf.PartialSGD(case.model, case.adapts, case.lr)
    if case.kind == "momentum":
        return mf.Momentum(case.lr, 0.8)
    if case.kind == "lstm":
        return LearnedRule(case.optimizer, case.lr, case.adapts and moving(case.model, case.adapts))
    rule = (
        mf.LearnedRates(case.model, 0.0) if case.kind == "rates" else mf.LayerRates(case.model, max(case.steps, 1), 0.0)
    )
    with torch.no_grad():
        rule.rates.copy_(case.first)
    return rule


class Rates(nn.Module):
    """Learned rates of the plain side."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.rates = nn.Parameter(first.clone())


def plain(case: Case) -> Result:
    """By autograd through the reference's loop."""
    owners: list[nn.Module] = [case.model]
    options = dict(case.options)
    learned: nn.Module | None = case.optimizer
    if case.first is not None:
        learned = Rates(case.first)
    if learned is not None:
        owners.append(learned)
    for owner in owners:
        owner.zero_grad()
    if case.kind == "protonets":
        out = mf.reference.protonets(case.model, case.episodes, metric=case.metric, weights=case.weights)
    elif case.kind == "lstm":
        common = {"lr": case.lr, "steps": case.steps, "loss": case.loss, "weights": case.weights}
        out = mf.reference.lomaml(case.model, case.optimizer, case.episodes, adapts=case.adapts, **common, **options)
    else:
        adapt = _plain_rule(case, learned)
        out = over_tasks(
            case.model,
            case.episodes,
            adapt,
            resolve_loss(case.loss),
            options["first_order"],
            case.weights,
            "batch",
            options["query_weights"],
            options["support_batch"],
        )
    objective = _objective(case, out)
    if objective.requires_grad:
        objective.backward()
    return _result(out, owners)


def _plain_rule(case: Case, learned: nn.Module | None) -> Callable[[Parameters, Gradient], list[Parameters]]:
    """The inner loop of every rule but the LSTM's, from its formula."""
    truncate = case.options["truncate"]

    def constant(values: Parameters) -> Parameters:
        return {name: value.detach().requires_grad_() for name, value in values.items()}

    def rate(k: int, index: int, name: str, like: Tensor, begin: int) -> Any:
        if case.kind == "rates":
            return learned.rates[begin : begin + like.numel()].view_as(like)
        if case.kind == "layer_rates":
            return learned.rates[k, index]
        return case.lr if moves(name, case.adapts) else 0.0

    def adapt(params: Parameters, gradient: Gradient) -> list[Parameters]:
        if not case.options["learn_init"]:
            params = constant(params)
        velocity = {name: torch.zeros_like(value) for name, value in params.items()}
        path = [params]
        for k in range(case.steps):
            if truncate is not None and k > 0 and k % truncate == 0:
                params = constant(params)
                velocity = {name: v.detach() for name, v in velocity.items()}
            grads = gradient(params, k)
            if case.kind == "momentum":
                velocity = {name: 0.8 * velocity[name] + g for name, g in grads.items()}
                grads = velocity
            stepped, begin = {}, 0
            for index, (name, value) in enumerate(params.items()):
                stepped[name] = value - rate(k, index, name, value, begin) * grads[name]
                begin += value.numel()
            params = stepped
            path.append(params)
        return path

    return adapt


class Margin(TorchDispatchMode):
    """How near to a kink the plain side comes: near ones one rounding may decide the other way.

    Exact zeros and ties do not count: those come of units that are dead on both sides.
    """

    def __init__(self) -> None:
        super().__init__()
        self.smallest = float("inf")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::").removesuffix("_")
        if name in ("relu", "leaky_relu", "elu"):
            self._see(args[0])
        elif name == "softplus":
            beta, threshold = (*args[1:], 1, 20)[:2]
            self._see(args[0] * beta - threshold)
        elif name == "max_pool2d_with_indices":
            self._see(_lead(*args))
        return func(*args, **kwargs)

    def _see(self, distances: Tensor) -> None:
        distances = distances.detach().abs()
        distances = distances[distances > 0]
        if distances.numel():
            self.smallest = min(self.smallest, float(distances.min()))


def _lead(x: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, *_: Any) -> Tensor:
    """By how much the largest of each window leads."""
    sides = [padding] * 2 if isinstance(padding, int) else list(padding) * (2 // len(padding))
    flat = F.pad(x.detach().flatten(0, 1).unsqueeze(1), (sides[1], sides[1], sides[0], sides[0]), value=-1e300)
    windows = F.unfold(flat, tuple(kernel), stride=tuple(stride or kernel))
    if windows.shape[1] == 1:
        return x.new_empty(0)
    top = windows.topk(2, dim=1).values
    return top[:, 0] - top[:, 1]


def moved(case: Case, seed: int, by: float = 2.0**-50) -> Case:
    """The case with every number moved by a few roundings: what this changes no computation can know."""
    generator = torch.Generator().manual_seed(seed)

    def near(t: Tensor | None) -> Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        signs = torch.randint(2, t.shape, generator=generator).to(t.dtype) * 2 - 1
        return t.detach() * (1 + by * signs)

    e = case.episodes
    other = copy.deepcopy(case)
    other.episodes = mf.Episodes(*(near(t) for t in (e.support_x, e.support_y, e.query_x, e.query_y)))
    other.weights, other.first = near(case.weights), near(case.first)
    for owner in (other.model, other.optimizer):
        for p in () if owner is None else owner.parameters():
            with torch.no_grad():
                p.copy_(near(p))
    return other
