"""The sinusoid regression tasks of the MAML paper."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metafast import _check
from metafast.data._classes import check_dtype, check_generator
from metafast.episodes import Episodes


def _interval(name: str, value: tuple[float, float]) -> tuple[float, float]:
    """``value`` as two finite numbers, the first at most the second."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name}: expected a pair (low, high), got {value!r}")
    low, high = (_check.number(name, v) for v in value)
    if low > high:
        raise ValueError(f"{name}: expected low <= high, got ({low:g}, {high:g})")
    return low, high


def _uniform(interval: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform float64 numbers of an interval: drawn in float64, so that every dtype sees the same waves."""
    device = torch.device("cpu") if generator is None else generator.device
    low, high = interval
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class SinusoidTasks:
    """T waves y = amplitude sin(x - phase): the tasks themselves, from which points are drawn.

    Attributes:
        amplitude: (T,) float64.
        phase: (T,) float64, radians.
        x: the interval that inputs are drawn from.
    """

    amplitude: Tensor
    phase: Tensor
    x: tuple[float, float]

    @property
    def tasks(self) -> int:
        """T, the number of waves."""
        return self.amplitude.shape[0]

    def evaluate(self, x: Tensor) -> Tensor:
        """The true curves at ``x`` (T, N, 1), or at the same points for all tasks (N, 1): (T, N, 1)."""
        _check.tensor("x", x)
        fits = x.dim() in (2, 3) and x.shape[-1] == 1 and (x.dim() == 2 or x.shape[0] == self.tasks)
        if not fits or not x.is_floating_point():
            raise ValueError(f"x: expected floating ({self.tasks}, N, 1) or (N, 1), got {_check.describe(x)}")
        amplitude, phase = (v.to(x).reshape(-1, 1, 1) for v in (self.amplitude, self.phase))
        return amplitude * torch.sin(x - phase)

    def episodes(
        self,
        shots: int = 10,
        queries: int = 10,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Episodes:
        """Draw ``shots`` support and ``queries`` query points on every wave."""
        _check.integer("shots", shots, minimum=1)
        _check.integer("queries", queries, minimum=1)
        check_generator(generator, self.amplitude.device)
        check_dtype(dtype)
        x = _uniform(self.x, (self.tasks, shots + queries, 1), generator)
        y = self.evaluate(x).to(dtype)
        x = x.to(dtype)
        return Episodes(*(part.contiguous() for part in (x[:, :shots], y[:, :shots], x[:, shots:], y[:, shots:])))


class Sinusoid:
    """Regression on waves y = A sin(x - phase), each task its own amplitude A and phase.

    Args:
        amplitude: (low, high) of A.
        phase: (low, high) of the phase, radians.
        x: (low, high) of the inputs.

    Raises:
        TypeError: an interval that is no pair of numbers.
        ValueError: numbers that are not finite, or low > high.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> episodes = Sinusoid().sample(tasks=25, shots=10, queries=10, generator=generator)
        >>> episodes.support_x.shape, episodes.support_y.shape
        (torch.Size([25, 10, 1]), torch.Size([25, 10, 1]))

    Reference: Finn, Abbeel, Levine, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", ICML
    2017, section 5.1, whose intervals are the defaults.
    """

    def __init__(
        self,
        amplitude: tuple[float, float] = (0.1, 5.0),
        phase: tuple[float, float] = (0.0, math.pi),
        x: tuple[float, float] = (-5.0, 5.0),
    ) -> None:
        self.amplitude = _interval("amplitude", amplitude)
        self.phase = _interval("phase", phase)
        self.x = _interval("x", x)

    def sample_tasks(self, tasks: int = 25, generator: torch.Generator | None = None) -> SinusoidTasks:
        """Draw waves, and keep them: to plot the truth, or to draw other points on the same ones."""
        _check.integer("tasks", tasks, minimum=1)
        check_generator(generator)
        amplitude = _uniform(self.amplitude, (tasks,), generator)
        return SinusoidTasks(amplitude, _uniform(self.phase, (tasks,), generator), self.x)

    def sample(
        self,
        tasks: int = 25,
        shots: int = 10,
        queries: int = 10,
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Episodes:
        """Sample a batch of episodes.

        Args:
            tasks: T, how many waves.
            shots: support points a wave.
            queries: query points a wave.
            generator: source of randomness, and the device of the result; the same seed gives the same bits.
                Default: torch's own on the CPU.
            dtype: floating dtype of the result; the same seed gives the same waves in every dtype.

        Returns:
            Episodes with x and y of shapes (T, shots, 1) and (T, queries, 1).

        Raises:
            TypeError: an argument of the wrong type.
            ValueError: a count below one.
        """
        _check.integer("shots", shots, minimum=1)
        _check.integer("queries", queries, minimum=1)
        check_dtype(dtype)
        return self.sample_tasks(tasks, generator).episodes(shots, queries, generator, dtype)

    def __repr__(self) -> str:
        return f"Sinusoid(amplitude={self.amplitude}, phase={self.phase}, x={self.x})"
