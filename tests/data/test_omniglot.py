"""Omniglot from zip files and folders; on the real files where METAFAST_DATA tells where they are."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metafast.data import Omniglot
from metafast.data.omniglot import _area_weights

Image = pytest.importorskip("PIL.Image")

CHARACTERS = {
    "images_background_small1": {"Alpha": 2, "Beta": 1},
    "images_background_small2": {"Beta": 1, "Gamma": 2},
    "images_background": {"Alpha": 1, "Beta": 1, "Delta": 1},
    "images_evaluation": {"Epsilon": 2},
}
SMALL = ("images_background_small1", "images_background_small2")
FULL = ("images_background", "images_evaluation")


def png(seed: int, size: int = 105) -> bytes:
    """Random strokes, black on white, in the official files' one-bit mode."""
    ink = np.random.default_rng(seed).random((size, size)) < 0.2
    stream = io.BytesIO()
    Image.fromarray(~ink).save(stream, "PNG")
    return stream.getvalue()


def files(name: str) -> dict[str, bytes]:
    """Path: content of a tiny image set, three drawings a character."""
    return {
        f"{name}/{alphabet}/character{c + 1:02}/{c:04}_{d + 1:02}.png": png(hash_of(name, alphabet, c, d))
        for alphabet, count in CHARACTERS[name].items()
        for c in range(count)
        for d in range(3)
    }


def hash_of(*parts: object) -> int:
    return int.from_bytes(repr(parts).encode(), "little") % 2**32


def write_zip(root: Path, name: str, extra: dict[str, bytes] | None = None) -> Path:
    path = root / f"{name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file, content in {**files(name), **(extra or {})}.items():
            archive.writestr(file, content)
    return path


def write_folder(root: Path, name: str, extra: dict[str, bytes] | None = None) -> None:
    for file, content in {**files(name), **(extra or {})}.items():
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    for name in SMALL:
        write_zip(tmp_path, name)
    return tmp_path


def test_zip_and_folder_give_the_same(small: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    extracted = tmp_path_factory.mktemp("extracted")
    junk = {"images_background_small1/Alpha/character01/._0000_01.png": b"what macOS leaves"}
    for name in SMALL:
        write_folder(extracted, name, junk if name == SMALL[0] else None)
    for split in ("train", "test", "all"):
        zipped, folder = Omniglot(small, split), Omniglot(extracted, split)
        assert torch.equal(zipped.items, folder.items)
        assert torch.equal(zipped.counts, folder.counts)
        assert zipped.names == folder.names


def test_subfolders_are_looked_into(tmp_path: Path) -> None:
    for place in ("omniglot", "omniglot-py"):
        (tmp_path / place).mkdir()
    write_zip(tmp_path / "omniglot", SMALL[0])
    write_folder(tmp_path / "omniglot-py", SMALL[1])
    assert Omniglot(tmp_path, "test").names == ("Gamma/character01", "Gamma/character02")


def test_pictures_are_exact_area_averages_with_ink_one(small: Path) -> None:
    data = Omniglot(small, rotations=False)
    assert data.names == ("Alpha/character01", "Alpha/character02", "Beta/character01")
    assert data.items.shape == (9, 1, 28, 28)
    content = files(SMALL[0])["images_background_small1/Alpha/character02/0001_03.png"]
    ink = 1 - torch.from_numpy(np.asarray(Image.open(io.BytesIO(content))).astype(np.float64))
    # 105 / 28 = 15 / 4: repeat every pixel four times, then average 15 x 15 blocks.
    fine = ink.repeat_interleave(4, 0).repeat_interleave(4, 1)
    expected = fine.view(28, 15, 28, 15).mean((1, 3)) * 255
    assert (data.of(1)[2, 0] - expected).abs().max() <= 0.501


def test_area_weights_sum_to_one() -> None:
    torch.testing.assert_close(_area_weights(105, 28).sum(1), torch.ones(28))
    torch.testing.assert_close(_area_weights(105, 28).sum(0), torch.full((105,), 28 / 105))
    assert torch.equal(_area_weights(4, 2), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]))


def test_rotations_are_classes(small: Path) -> None:
    plain, turned = Omniglot(small, rotations=False), Omniglot(small)
    assert turned.classes == 4 * plain.classes
    assert turned.names[3:] == tuple(f"{n}/rot{k}" for k in (90, 180, 270) for n in plain.names)
    for k in range(4):
        for c in range(3):
            assert torch.equal(turned.of(3 * k + c), torch.rot90(plain.of(c), k, (-2, -1)))
    assert Omniglot(small, "test").classes == 2  # not by default
    assert Omniglot(small, "test", rotations=True).classes == 8


def test_small_splits_share_no_alphabet(small: Path) -> None:
    assert {n.split("/")[0] for n in Omniglot(small, "train").names} == {"Alpha", "Beta"}
    assert {n.split("/")[0] for n in Omniglot(small, "test").names} == {"Gamma"}
    everything = Omniglot(small, "all").names
    assert everything == (
        *("Alpha/character01", "Alpha/character02"),
        *("Beta/character01", "Gamma/character01", "Gamma/character02"),
    )


def test_small_sets_swapped(small: Path) -> None:
    train, test = (Omniglot(small, split, source="small-swapped", rotations=False) for split in ("train", "test"))
    assert train.names == ("Beta/character01", "Gamma/character01", "Gamma/character02")
    assert test.names == ("Alpha/character01", "Alpha/character02")


def test_full_sets_are_preferred_where_they_are(small: Path) -> None:
    for name in FULL:
        write_zip(small, name)
    assert Omniglot(small, rotations=False).classes == 3
    assert Omniglot(small, "test").names == ("Epsilon/character01", "Epsilon/character02")
    assert Omniglot(small, "test", source="small").names[0] == "Gamma/character01"


def test_alphabets(small: Path) -> None:
    assert Omniglot(small, "all", alphabets=["Gamma", "Beta"]).classes == 3
    with pytest.raises(ValueError, match=r"^alphabets: expected some of Alpha, Beta, got 'Gamma'"):
        Omniglot(small, "train", alphabets=["Gamma"])
    with pytest.raises(ValueError, match=r"^alphabets: "):
        Omniglot(small, alphabets=[])
    with pytest.raises(TypeError, match=r"^alphabets: "):
        Omniglot(small, alphabets="Alpha")


@pytest.mark.parametrize(
    ("error", "pattern", "kwargs"),
    [
        (ValueError, "split: ", {"split": "val"}),
        (TypeError, "split: ", {"split": None}),
        (ValueError, "source: ", {"source": "tiny"}),
        (TypeError, "rotations: ", {"rotations": 1}),
        (TypeError, "root: ", {"root": 3}),
        (FileNotFoundError, "root: .*nowhere", {"root": "/nowhere"}),
    ],
)
def test_refuses(small: Path, error: type[Exception], pattern: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        Omniglot(**{"root": small, **kwargs})


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^root: .*images_background\.zip, .*images_background_small1\.zip"):
        Omniglot(tmp_path)
    write_zip(tmp_path, "images_background")
    with pytest.raises(FileNotFoundError, match=r"^root: .*images_evaluation\.zip"):
        Omniglot(tmp_path, "test")


def test_damaged_zip(small: Path) -> None:
    path = small / f"{SMALL[0]}.zip"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"^root: .*images_background_small1\.zip' is no readable zip"):
        Omniglot(small)
    flipped = bytearray(content)
    flipped[200] ^= 255  # in the compressed data of the first member
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"^images_background_small1/Alpha/character01/0000_01\.png in .*damaged"):
        Omniglot(small)


def test_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images_background_small1.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match=r"^root: expected images_background_small1/ALPHABET/CHARACTER"):
        Omniglot(tmp_path)


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (png(0)[:300], "damaged image file"),
        (b"", "damaged image file"),
        (png(0, 28), "105x105 pixels, got 28x28"),
    ],
)
@pytest.mark.parametrize("write", [write_zip, write_folder])
def test_damaged_drawing_is_named(tmp_path: Path, content: bytes, pattern: str, write: Any) -> None:
    name = f"{SMALL[0]}/Alpha/character01/0000_02.png"
    write(tmp_path, SMALL[0], {name: content})
    with pytest.raises(ValueError, match=f"^{name} in .*{pattern}"):
        Omniglot(tmp_path)


@pytest.fixture(scope="module")
def real() -> str:
    root = os.environ.get("METAFAST_DATA")
    if root is None:
        pytest.skip("METAFAST_DATA is not set: no Omniglot files to test on")
    return root


def test_real_files(real: str) -> None:
    train, test = Omniglot(real, "train", source="small"), Omniglot(real, "test", source="small")
    assert (train.classes, test.classes) == (136 * 4, 106)
    assert {n.split("/")[0] for n in train.names} == {"Balinese", "Early_Aramaic", "Greek", "Korean", "Latin"}
    assert {n.split("/")[0] for n in test.names} == {"Japanese_(katakana)", "Sanskrit", "Tagalog"}
    swapped = Omniglot(real, "test", source="small-swapped")
    assert swapped.classes == 86 and {n.split("/")[0] for n in swapped.names} == {"Balinese", "Early_Aramaic", "Korean"}
    for data in (train, test, swapped):
        assert data.counts.unique().tolist() == [20]
        ink = data.items.float().div(255).mean()
        assert 0.02 < ink < 0.2
    e = test.sample(tasks=100, ways=5, shots=1, queries=15, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(e.query_x.flatten(2), e.support_x.flatten(2)).argmin(-1)
    # Vinyals et al. (2016) report 42 % for the neighbour nearest in pixels, on the full set.
    assert 0.3 < (nearest == e.query_y).double().mean() < 0.6
