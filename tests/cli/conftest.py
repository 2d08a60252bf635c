"""What the tests of the command line share."""

from __future__ import annotations

import pytest

from metafast.cli import plots


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that leave no pictures: drawing takes longer than a small training."""
    for name in ("curves", "sinusoid", "episode"):
        monkeypatch.setattr(plots, name, lambda *_: None)
