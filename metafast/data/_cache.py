"""A cache of numpy arrays on disk: written atomically, checked on reading, never trusted silently.

A file is the SHA-256 of what follows, then an npz archive, read without pickle.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]

_DIGEST = hashlib.sha256().digest_size
_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """``$METAFAST_CACHE``, or ``metafast`` in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    own = os.environ.get("METAFAST_CACHE")
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "metafast"


def cached(name: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays stored as ``name``, else those of ``build()``, which are then stored.

    Warns, and builds anew, where the file is damaged; warns where it cannot be written.
    """
    path = cache_folder() / name
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        _log.info("%s: not there yet, building it", path)
    except OSError as error:
        warnings.warn(f"cannot read the cache file {str(path)!r} ({error}); building it anew", stacklevel=2)
    else:
        if hashlib.sha256(content[_DIGEST:]).digest() == content[:_DIGEST]:
            with np.load(io.BytesIO(content[_DIGEST:]), allow_pickle=False) as archive:
                return {key: archive[key] for key in archive.files}
        warnings.warn(f"the cache file {str(path)!r} is damaged; building it anew", stacklevel=2)
    arrays = build()
    try:
        _write(path, arrays)
    except OSError as error:
        warnings.warn(
            f"cannot write the cache file {str(path)!r} ({error}); set METAFAST_CACHE to a folder that can "
            "be written, or this is built anew every time",
            stacklevel=2,
        )
    return arrays


def _write(path: Path, arrays: Arrays) -> None:
    """Write beside ``path`` and rename, so that nobody ever sees half a file."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    content = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as stream:
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
