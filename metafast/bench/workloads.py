"""What is timed: a learner, a network and the sizes of its episodes, as data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from metafast.data.sinusoid import Sinusoid
from metafast.episodes import Episodes
from metafast.lstm import LSTMOptimizer
from metafast.models import MLP, Conv4, Conv4Encoder, OmniglotFC


@dataclass(frozen=True)
class Workload:
    """One meta-step to time.

    Attributes:
        name: what ``--workload`` takes.
        title: one line for people.
        learner: "maml", "lomaml" or "protonets".
        net: "mlp", "conv4", "encoder" (Conv4 without its classifier), "omniglot_fc", "tanh_mlp", "strided" or
            "three_blocks".
        tasks: T.
        ways: classes of a task; 0 for regression on sinusoids.
        shots: support samples a class (points, for regression).
        queries: query samples a class (points, for regression).
        steps: K, inner steps.
        lr: inner learning rate.
        width: channels of the convolutions.
        image: shape of a sample; ignored by regression.
    """

    name: str
    title: str
    learner: str
    net: str
    tasks: int
    ways: int
    shots: int
    queries: int
    steps: int
    lr: float
    width: int = 64
    image: tuple[int, ...] = (1, 28, 28)

    @property
    def loss(self) -> str:
        """The loss's name."""
        return "cross_entropy" if self.ways else "mse"

    def shrunk(self) -> Workload:
        """The same mathematics on less: two tasks at most, one support and one query image a class."""
        less = replace(self, tasks=min(self.tasks, 2))
        return replace(less, shots=1, queries=1) if self.ways else less


@dataclass(frozen=True)
class Problem:
    """A workload's network and episodes; ``optimizer`` is LOMAML's, None for the others."""

    workload: Workload
    model: nn.Module
    optimizer: LSTMOptimizer | None
    episodes: Episodes

    def copy(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Problem:
        """The same values with modules of its own, in another dtype or on another device if one is given."""
        model, optimizer = copy.deepcopy((self.model, self.optimizer))
        for module in (model, *([] if optimizer is None else [optimizer])):
            module.to(device=device, dtype=dtype)
        return Problem(self.workload, model, optimizer, self.episodes.to(device, dtype))

    def parameters(self) -> list[nn.Parameter]:
        """What the meta-gradient is of, in its order."""
        return [*self.model.parameters(), *([] if self.optimizer is None else self.optimizer.parameters())]


def build(workload: Workload, seed: int = 0) -> Problem:
    """The float32 problem of a workload, the same for the same seed; the global generator stays as it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _NETS[workload.net](workload)
        optimizer = LSTMOptimizer() if workload.learner == "lomaml" else None
    if workload.ways:
        return Problem(workload, model, optimizer, _images(workload, generator))
    episodes = Sinusoid().sample(workload.tasks, workload.shots, workload.queries, generator)
    return Problem(workload, model, optimizer, episodes)


def _strided(w: Workload) -> nn.Module:
    """5 x 5 kernels of stride 2."""
    c = w.width
    convolutions = [nn.Conv2d(w.image[0], c, 5, 2, 2), nn.ReLU(), nn.Conv2d(c, c, 5, 2, 2), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(c * (w.image[1] // 4) ** 2, w.ways))


def _three_blocks(w: Workload) -> nn.Module:
    layers: list[nn.Module] = []
    for inputs in (w.image[0], w.width, w.width):
        layers += [nn.Conv2d(inputs, w.width, 3, padding=1), nn.BatchNorm2d(w.width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(w.width * (w.image[1] // 8) ** 2, w.ways))


_NETS: dict[str, Callable[[Workload], nn.Module]] = {
    "mlp": lambda w: MLP(1, (40, 40), 1),
    "conv4": lambda w: Conv4(w.ways, w.width, in_channels=w.image[0], image_size=w.image[1]),
    "encoder": lambda w: Conv4Encoder(w.width, in_channels=w.image[0], image_size=w.image[1]),
    "omniglot_fc": lambda w: OmniglotFC(w.ways),
    "tanh_mlp": lambda w: MLP(w.image[0], (64, 96, 64), w.ways, "tanh"),
    "strided": _strided,
    "three_blocks": _three_blocks,
}


def _images(workload: Workload, generator: torch.Generator) -> Episodes:
    """Noise round a pattern for each class: something to learn, of any size, with no data set to load."""
    patterns = torch.randn(workload.tasks, workload.ways, 1, *workload.image, generator=generator)

    def side(samples: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(workload.tasks, workload.ways, samples, *workload.image, generator=generator)
        labels = torch.arange(workload.ways).repeat_interleave(samples).repeat(workload.tasks, 1)
        return (patterns + 0.7 * noise).flatten(1, 2), labels

    return Episodes(*side(workload.shots), *side(workload.queries))


_CONV4 = Workload(
    name="conv4-64-k1",
    title="Conv4-64, 28x28x1, T=32, 5-way 1-shot, 5 query images, K=1",
    learner="maml",
    net="conv4",
    tasks=32,
    ways=5,
    shots=1,
    queries=1,
    steps=1,
    lr=0.4,
)
_SINUSOID = Workload(
    name="sinusoid-k1",
    title="sinusoid MLP 1-40-40-1, T=25, 10+10 points, K=1",
    learner="maml",
    net="mlp",
    tasks=25,
    ways=0,
    shots=10,
    queries=10,
    steps=1,
    lr=0.01,
)
_PROTONETS = Workload(
    name="protonets-conv4-64",
    title="ProtoNets, Conv4-64, 28x28x1, T=8, 20-way 5-shot, 5 queries a class",
    learner="protonets",
    net="encoder",
    tasks=8,
    ways=20,
    shots=5,
    queries=5,
    steps=0,
    lr=0.0,
)

_ALL = (
    _SINUSOID,
    replace(_SINUSOID, name="sinusoid-k5", title="sinusoid MLP 1-40-40-1, T=25, 10+10 points, K=5", steps=5),
    _CONV4,
    replace(
        _CONV4,
        name="conv4-64-k5",
        title="Conv4-64, 28x28x1, T=32, 5-way 1-shot, 75 query images, K=5",
        queries=15,
        steps=5,
    ),
    replace(
        _CONV4,
        name="conv4-32-84px",
        title="Conv4-32, 84x84x3, T=4, 5-way 5-shot, 75 query images, K=5",
        tasks=4,
        shots=5,
        queries=15,
        steps=5,
        lr=0.01,
        width=32,
        image=(3, 84, 84),
    ),
    replace(
        _CONV4,
        name="omniglot-fc",
        title="fully connected Omniglot net, T=32, 5-way 1-shot, 25 query images, K=1",
        net="omniglot_fc",
        queries=5,
    ),
    # Shapes that nothing was tuned for.
    replace(
        _CONV4,
        name="odd-mlp",
        title="tanh MLP 3-64-96-64-2, T=17, 2-way 5-shot, 7 queries a class, K=3",
        net="tanh_mlp",
        tasks=17,
        ways=2,
        shots=5,
        queries=7,
        steps=3,
        lr=0.05,
        image=(3,),
    ),
    replace(
        _CONV4,
        name="odd-strided",
        title="two 5x5 convolutions of stride 2, 12 channels, 28x28x1, T=16, 5-way 1-shot, 15 query images, K=2",
        net="strided",
        tasks=16,
        queries=3,
        steps=2,
        lr=0.05,
        width=12,
    ),
    replace(
        _CONV4,
        name="odd-blocks",
        title="three Conv blocks of 48 channels, 28x28x1, T=8, 20-way 1-shot, 40 query images, K=2",
        net="three_blocks",
        tasks=8,
        ways=20,
        queries=2,
        steps=2,
        lr=0.1,
        width=48,
    ),
    replace(
        _SINUSOID,
        name="lomaml-sinusoid",
        title="LOMAML, sinusoid MLP 1-40-40-1, T=25, 10+10 points, K=5",
        learner="lomaml",
        steps=5,
        lr=0.1,
    ),
    _PROTONETS,
    replace(
        _CONV4,
        name="conv4-64-small",
        title="Conv4-64, 28x28x1, T=4, 5-way 1-shot, 5 query images, K=1",
        tasks=4,
    ),
    replace(
        _PROTONETS,
        name="protonets-small",
        title="ProtoNets, Conv4-64, 28x28x1, T=2, 5-way 5-shot, 5 queries a class",
        tasks=2,
        ways=5,
    ),
)
WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in _ALL}
