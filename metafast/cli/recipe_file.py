"""A recipe as a YAML file: the learner, its data and any of the settings, one "name: value" each."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

from metafast import _check
from metafast.cli.defaults import Data, Learner
from metafast.cli.recipe import SETTINGS

# Of a recipe, and how long its training and its test are.
NAMES = ("learner", "data", *SETTINGS, "iterations", "eval_tasks")


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings of a file, by the names of :class:`~metafast.cli.recipe.Recipe`; their values are checked there.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no YAML mapping, or has a name that no recipe has; file and name are in the message.
        ImportError: PyYAML is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("--recipe: reading YAML needs PyYAML: pip install 'metafast[cli]'") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--recipe: {str(path)!r} is no YAML file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--recipe: expected a mapping of settings in {str(path)!r}, got {_check.describe(content)}")
    for name, value in content.items():
        if name not in NAMES:
            raise ValueError(f"--recipe: {str(path)!r} has {name!r}, expected some of {', '.join(NAMES)}")
        if value is None:
            raise ValueError(f"--recipe: {str(path)!r} gives no value for {name!r}")
    for name, choices in (("learner", get_args(Learner)), ("data", get_args(Data))):
        if name in content:
            _check.choice(f"--recipe: {name} of {str(path)!r}", content[name], choices)
    return content
