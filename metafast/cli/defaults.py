"""The settings that a learner starts from on each data set, and those that do not apply to it."""

from __future__ import annotations

from typing import Any, Literal

Learner = Literal["maml", "fomaml", "reptile", "lomaml", "protonets"]
Data = Literal["sinusoid", "glyphs", "omniglot", "miniimagenet"]
Settings = dict[str, Any]

# Omniglot, miniImageNet: sections 5.2 and 5.3 of Finn, Abbeel, Levine, ICML 2017, and section 3 of Snell, Swersky,
# Zemel, NeurIPS 2017. Sinusoid: section 5.1 of the former, but for what its 70,000 meta-steps of one inner step and
# Adam at 1e-3 leave to patience: five inner steps and 3e-3 are twice as near to the waves after 3,000.
# Glyphs: what gets furthest within a minute of two cores.
_DATA: dict[str, Settings] = {
    "sinusoid": {"shots": 10, "queries": 10, "tasks": 25, "width": 40, "steps": 5, "meta_lr": 3e-3},
    "glyphs": {"ways": 5, "shots": 1, "queries": 5, "tasks": 4, "width": 16, "steps": 1, "meta_lr": 5e-3},
    "omniglot": {
        "ways": 5,
        "shots": 1,
        "queries": 15,
        "tasks": 32,
        "width": 64,
        "steps": 1,
        "meta_lr": 1e-3,
        "source": "auto",
    },
    "miniimagenet": {"ways": 5, "shots": 1, "queries": 15, "tasks": 4, "width": 32, "steps": 5, "meta_lr": 1e-3},
}
_LEARNER: dict[tuple[str, str], Settings] = {
    ("maml", "sinusoid"): {"lr": 0.01, "iterations": 3000},
    ("maml", "glyphs"): {"lr": 0.4, "iterations": 1000},
    ("maml", "omniglot"): {"lr": 0.4, "iterations": 40_000},
    ("maml", "miniimagenet"): {"lr": 0.01, "iterations": 60_000},
    # More steps than MAML: what Reptile sees of a task is how far they lead.
    ("reptile", "sinusoid"): {"lr": 0.02, "steps": 10, "iterations": 3000},
    ("reptile", "glyphs"): {"lr": 0.1, "steps": 5, "iterations": 1000},
    ("reptile", "omniglot"): {"lr": 0.1, "steps": 5, "iterations": 40_000},
    ("reptile", "miniimagenet"): {"lr": 0.01, "steps": 8, "iterations": 60_000},
    # The learned optimiser starts as gradient descent at these rates.
    ("lomaml", "sinusoid"): {"lr": 0.01, "iterations": 1000},
    ("lomaml", "glyphs"): {"lr": 0.4, "iterations": 600},
    ("lomaml", "omniglot"): {"lr": 0.4, "iterations": 40_000},
    ("lomaml", "miniimagenet"): {"lr": 0.01, "iterations": 60_000},
    ("protonets", "glyphs"): {"train_ways": 40, "queries": 3, "tasks": 1, "iterations": 600},
    ("protonets", "omniglot"): {"train_ways": 60, "queries": 5, "tasks": 1, "iterations": 20_000},
    ("protonets", "miniimagenet"): {"train_ways": 30, "tasks": 1, "width": 64, "iterations": 20_000},
}


def defaults(learner: str, data: str) -> Settings:
    """Every setting that applies to ``learner`` on ``data``, and ``iterations``.

    Raises:
        ValueError: the learner does not fit the data.
    """
    if learner == "protonets" and data == "sinusoid":
        raise ValueError(
            "--data: protonets classifies and sinusoids have no classes; expected glyphs, omniglot or miniimagenet"
        )
    rule = "maml" if learner == "fomaml" else learner
    chosen: Settings = {"seed": 0, "batch_norm": "batch", "first_order": learner == "fomaml", "rule_lr": 1e-3}
    chosen |= _DATA[data] | _LEARNER[rule, data]
    return {name: value for name, value in chosen.items() if name not in unfit(learner, data)}


def unfit(learner: str, data: str) -> dict[str, str]:
    """The settings that do not apply to ``learner`` on ``data``, each with the reason."""
    reasons = {}
    if data == "sinusoid":
        reasons["ways"] = "waves have no classes"
        reasons["batch_norm"] = "the net for sinusoids has no batch normalisation"
    if learner == "protonets":
        reasons |= dict.fromkeys(("steps", "lr", "first_order"), "ProtoNets has no inner loop")
    else:
        if learner == "reptile":
            reasons["first_order"] = "Reptile takes no derivative of its inner loop"
        reasons["train_ways"] = "only ProtoNets trains on other ways than it is tested on"
    if data != "omniglot":
        reasons["source"] = "only Omniglot comes in several sets"
    if learner != "lomaml":
        reasons["rule_lr"] = "only LOMAML learns its update rule"
    return reasons
