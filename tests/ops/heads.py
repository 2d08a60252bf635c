"""Problems for the prototype head, and what it gives by the definition."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.ops.prototypes import prototype_head
from tests.backends import device_of

BAR = 1e-10

# Around vectors (4 to 16 lanes), groups of 16 and blocks of 96 queries, and depths of 256 features; one class, one
# feature: tasks, classes, shots, queries, features.
SIZES = [
    (1, 1, 1, 1, 1),
    (3, 5, 2, 7, 17),
    (2, 2, 1, 15, 15),
    (1, 3, 1, 16, 16),
    (2, 5, 1, 75, 64),
    (1, 20, 2, 97, 33),
    (2, 9, 1, 96, 31),
    (9, 4, 1, 17, 48),
    (1, 60, 1, 113, 8),
    (1, 65, 1, 5, 3),
    (1, 65, 1, 113, 3),
    (2, 7, 3, 61, 257),
    (1, 17, 1, 6, 512),
]


@dataclass(frozen=True)
class Head:
    """Everything that the operator takes."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor
    ways: int
    support_mask: Tensor | None = None
    query_mask: Tensor | None = None
    ways_mask: Tensor | None = None

    @property
    def masks(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return self.support_mask, self.query_mask, self.ways_mask

    def to(self, dtype: torch.dtype) -> Head:
        return replace(self, support=self.support.to(dtype), query=self.query.to(dtype))

    def on(self, backend: str) -> Head:
        """The same where a backend's tensors are."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{n: t.to(device_of(backend)) for n, t in tensors.items() if isinstance(t, Tensor)})

    def run(self, metric: str, support: Tensor | None = None, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Losses and logits by the operator."""
        s, q = self.support if support is None else support, self.query if query is None else query
        return prototype_head(s, self.support_labels, q, self.query_labels, self.ways, metric, *self.masks)

    def plain(self, metric: str, support: Tensor | None = None, query: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The same by the definition, task by task and class by class."""
        all_s, all_q = self.support if support is None else support, self.query if query is None else query
        losses, logits = [], []
        for t in range(len(all_s)):
            here = slice(None) if self.support_mask is None else self.support_mask[t]
            asked = slice(None) if self.query_mask is None else self.query_mask[t]
            classes = list(range(self.ways)) if self.ways_mask is None else self.ways_mask[t].nonzero()[:, 0].tolist()
            s, y, q = all_s[t][here], self.support_labels[t][here], all_q[t][asked]
            means = torch.stack([s[y == c].mean(0) for c in classes])
            if metric == "cosine":
                scores = F.cosine_similarity(q[:, None], means[None], dim=-1)
            else:
                scores = -((q[:, None] - means[None]) ** 2).sum(-1)
                if metric == "euclidean":
                    scores = -(-scores).sqrt()
            targets = torch.tensor([classes.index(int(c)) for c in self.query_labels[t][asked]], device=q.device)
            losses.append(F.cross_entropy(scores, targets))
            full = scores.new_zeros(all_q.shape[1], self.ways)
            full[asked] = full[asked].index_copy(1, torch.tensor(classes, device=q.device), scores)
            absent = [c for c in range(self.ways) if c not in classes]
            full[:, absent] = -math.inf
            logits.append(full)
        return torch.stack(losses), torch.stack(logits)


def problem(tasks: int, ways: int, shots: int, queries: int, features: int, offset: float = 1.0) -> Head:
    """Classes of shots and shots + 1 samples, in any order; queries of any class."""
    generator = torch.Generator().manual_seed(tasks + 10 * ways + 100 * features)
    of_task = torch.arange(ways).repeat_interleave(shots + torch.arange(ways) % 2)
    labels = torch.stack([of_task[torch.randperm(len(of_task), generator=generator)] for _ in range(tasks)])

    def draw(count: int) -> Tensor:
        return offset + torch.randn(tasks, count, features, dtype=torch.float64, generator=generator) / features**0.5

    query_labels = torch.randint(ways, (tasks, queries), generator=generator)
    return Head(draw(len(of_task)), labels, draw(queries), query_labels, ways)


def ragged(features: int = 19) -> Head:
    """Three tasks of 4, 2 and 3 classes, with samples and queries missing; what is not there is NaN and no label."""
    head = problem(3, 4, 3, 21, features)
    ways_mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1]], dtype=torch.bool)
    support_mask = ways_mask.gather(1, head.support_labels)
    first = head.support_labels[0].tolist().index(2)
    support_mask[0, first] = False
    query_mask = ways_mask.gather(1, head.query_labels)
    query_mask[:, 3:20:4] = False
    return replace(
        head,
        support=head.support.masked_fill(~support_mask.unsqueeze(-1), math.nan),
        query=head.query.masked_fill(~query_mask.unsqueeze(-1), math.nan),
        support_labels=head.support_labels.masked_fill(~support_mask, -7),
        query_labels=head.query_labels.masked_fill(~query_mask, 99),
        support_mask=support_mask,
        query_mask=query_mask,
        ways_mask=ways_mask,
    )


def gradients(head: Head, metric: str, by: str, of: str = "both") -> list[Tensor]:
    """Losses, logits and the cotangents of the embeddings, of losses, logits or both."""
    leaves = [head.support.detach().requires_grad_(), head.query.detach().requires_grad_()]
    losses, logits = getattr(head, by)(metric, *leaves)
    finite = logits.masked_fill(logits.isinf(), 0)
    total = losses.new_zeros(())
    if of != "logits":
        total = total + (losses * torch.arange(1, len(losses) + 1, device=losses.device)).sum()
    if of != "losses":
        factors = torch.linspace(-1, 2, finite.numel(), dtype=losses.dtype, device=losses.device)
        total = total + (finite * factors.view_as(finite)).sum()
    return [losses.detach(), logits.detach(), *torch.autograd.grad(total, leaves)]


def close(found: Tensor, wanted: Tensor, bar: float = BAR) -> bool:
    """Norms: a cosine of two one-dimensional vectors has no derivative but rounding."""
    assert torch.equal(found.isinf(), wanted.isinf())
    found, wanted = found.masked_fill(found.isinf(), 0), wanted.masked_fill(wanted.isinf(), 0)
    return float((found - wanted).norm()) <= bar * float(wanted.norm()) + 1e-13


def arguments(head: Head, metric: str, with_labels: bool = True) -> tuple[object, ...]:
    labels = head.query_labels if with_labels else None
    return (head.support, head.support_labels, head.query, labels, head.ways, metric, *head.masks)


def masked(head: Head) -> Head:
    """A head of two tasks of three classes and four queries, of which two are not there, with all masks."""
    return replace(
        head,
        support_mask=torch.ones_like(head.support_labels, dtype=torch.bool),
        query_mask=torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1]], dtype=torch.bool),
        ways_mask=torch.ones(2, 3, dtype=torch.bool),
    )
