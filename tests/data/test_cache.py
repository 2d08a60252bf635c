"""The cache on disk: what is damaged is never used, and what cannot be written is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from metafast.data._cache import Arrays, cache_folder, cached


class Builder:
    """Builds the same arrays every time and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Arrays:
        self.calls += 1
        return {"a": np.arange(1000, dtype=np.uint8).reshape(10, 100), "b": np.array([1, 2], np.int32)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "cache"
    monkeypatch.setenv("METAFAST_CACHE", str(place))
    return place


def test_builds_once_and_reads_the_same_afterwards(folder: Path) -> None:
    build = Builder()
    first = cached("x.npz", build)
    second = cached("x.npz", build)
    assert build.calls == 1
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        np.testing.assert_array_equal(first[key], second[key])
    assert [p.name for p in folder.iterdir()] == ["x.npz"]  # no temporary file is left


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "text", "prefix", "extended"])
def test_a_damaged_file_is_rebuilt_with_a_warning(folder: Path, damage: str) -> None:
    build = Builder()
    good = cached("x.npz", build)
    path = folder / "x.npz"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "empty": b"",
            "truncated": content[:-1],
            "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
            "text": b"not an archive",
            "prefix": bytes([content[0] ^ 1]) + content[1:],
            "extended": content + b"\0",
        }[damage]
    )
    with pytest.warns(UserWarning, match=r"x\.npz' is damaged"):
        again = cached("x.npz", build)
    np.testing.assert_array_equal(again["a"], good["a"])
    assert build.calls == 2
    assert path.read_bytes()[:32] == content[:32]
    cached("x.npz", build)
    assert build.calls == 2  # repaired


def test_a_folder_that_cannot_be_written_is_a_warning(folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    with (
        pytest.warns(UserWarning, match="cannot read the cache file"),
        pytest.warns(UserWarning, match="cannot write the cache file .* set METAFAST_CACHE"),
    ):
        arrays = cached("x.npz", Builder())
    assert arrays["b"].tolist() == [1, 2]


def test_an_interrupted_write_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("metafast.data._cache.Path.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cached("x.npz", Builder())
    assert list(folder.iterdir()) == []


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAFAST_CACHE", "/a/b")
    assert cache_folder() == Path("/a/b")
    monkeypatch.delenv("METAFAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert cache_folder() == Path("/c/metafast")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "metafast"
