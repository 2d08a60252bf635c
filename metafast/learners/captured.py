"""A meta-step recorded once as a CUDA graph, and replayed: the launches of its kernels cost the host nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from metafast import _check
from metafast.episodes import Episodes, Outcome

if TYPE_CHECKING:
    from metafast.learners.learner import Learner

# Runs a step a few times, records it, and gives what replays it.
Record = Callable[[Callable[[], None], torch.device], Callable[[], None]]


class Captured:
    """``learner.accumulate_grad`` for episodes of one size; made by ``learner.capture(episodes)``.

    A replay adds to the very ``.grad`` tensors of the time of capture: clear them by
    ``optimizer.zero_grad(set_to_none=False)``. It reads the parameters where they are, so optimisers may step between.
    The outcome's tensors are the same ones each time, overwritten by the next replay.

    Args:
        learner: on a GPU.
        episodes: an example of the episodes to come, on that GPU; shapes and dtypes stay, numbers change.
        weights: (T,) factors of the tasks' losses, for all replays; 1/T each when None.
        record: how a step becomes a graph; CUDA's way when None.

    Raises:
        TypeError, ValueError: episodes that the learner does not take, that are not on a GPU, or have masks.
    """

    def __init__(
        self,
        learner: Learner,
        episodes: Episodes,
        weights: Tensor | None = None,
        record: Record | None = None,
    ) -> None:
        if not isinstance(episodes, Episodes):
            raise TypeError(f"episodes: expected metafast.Episodes, got {_check.describe(episodes)}")
        if record is None and episodes.support_x.device.type != "cuda":
            raise ValueError(f"episodes: expected them on a GPU to capture, got {episodes.support_x.device}")
        if episodes.masked:
            raise ValueError("episodes: expected none with masks to capture, whose sizes a graph cannot follow")
        learner._check(episodes, weights)
        self._learner = learner
        self._held = Episodes(*(t.detach().clone() for t in _parts(episodes)))
        self._weights = None if weights is None else weights.detach().clone()
        leaves = [p for p in learner.parameters() if p.requires_grad]
        before = [None if p.grad is None else p.grad.clone() for p in leaves]
        for p in leaves:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self._grads: list[tuple[nn.Parameter, Tensor]] = [(p, p.grad) for p in leaves if p.grad is not None]
        self._outcome: Outcome

        def step() -> None:
            self._outcome = learner.accumulate_grad(self._held, self._weights)

        self._replay = (_record_on_gpu if record is None else record)(step, episodes.support_x.device)
        for (_, grad), kept in zip(self._grads, before):  # what the runs before the record added goes
            grad.zero_() if kept is None else grad.copy_(kept)

    def __call__(self, episodes: Episodes) -> Outcome:
        """Add the meta-gradient of other episodes to ``.grad``; the outcome, detached.

        Raises:
            TypeError, ValueError: episodes of another size, dtype or device than those captured.
            RuntimeError: a parameter's ``.grad`` is another tensor by now.
        """
        if not isinstance(episodes, Episodes):
            raise TypeError(f"episodes: expected metafast.Episodes, got {_check.describe(episodes)}")
        self._learner._check(episodes, self._weights)
        held = self._held
        if (len(episodes), episodes.signature, episodes.masked) != (len(held), held.signature, False):
            raise ValueError(
                f"episodes: expected those captured, {_describe(held)}, got {_describe(episodes)}; capture anew"
            )
        if any(p.grad is not grad for p, grad in self._grads):
            raise RuntimeError(
                "a parameter's .grad is not the tensor that was captured: clear gradients by "
                "zero_grad(set_to_none=False), or capture anew"
            )
        for to, value in zip(_parts(held), _parts(episodes)):
            to.copy_(value)
        self._replay()
        return self._outcome


def _parts(episodes: Episodes) -> tuple[Tensor, ...]:
    return episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y


def _describe(episodes: Episodes) -> str:
    labels = "" if episodes.classes is None else f", {episodes.classes} classes"
    return f"support {_check.describe(episodes.support_x)}, query {_check.describe(episodes.query_x)}{labels}"


def _record_on_gpu(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    with torch.cuda.device(device):
        # CUDA wants what is set up at first calls to be set up, on a stream that is not the default one.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    replay: Callable[[], None] = graph.replay
    return replay
