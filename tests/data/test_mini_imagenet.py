"""miniImageNet in its two layouts, on a few synthetic pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from metafast.data import MiniImageNet

Image = pytest.importorskip("PIL.Image")

CLASSES = {"n01": 3, "n02": 4}


def picture(seed: int, size: tuple[int, int] = (84, 84)) -> Any:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def csv_layout(root: Path, split: str = "train") -> Path:
    (root / "images").mkdir()
    lines = ["filename,label"]
    for c, (name, count) in enumerate(CLASSES.items()):
        for i in range(count):
            picture(10 * c + i).save(root / "images" / f"{name}{i}.png")
            lines.append(f"{name}{i}.png,{name}")
    (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def folder_layout(root: Path, split: str = "train") -> Path:
    for c, (name, count) in enumerate(CLASSES.items()):
        (root / split / name).mkdir(parents=True)
        for i in range(count):
            picture(10 * c + i).save(root / split / name / f"{name}{i}.png")
    return root


@pytest.mark.parametrize("layout", [csv_layout, folder_layout])
def test_layouts_give_the_pictures(tmp_path: Path, layout: Any) -> None:
    data = MiniImageNet(layout(tmp_path, "val"), "val")
    assert data.names == ("n01", "n02")
    assert data.counts.tolist() == [3, 4]
    assert torch.equal(data.of(1)[2], torch.from_numpy(np.array(picture(12))).movedim(-1, 0))
    e = data.sample(2, 2, 1, 2, torch.Generator().manual_seed(0))
    assert e.query_x.shape == (2, 4, 3, 84, 84)
    assert e.query_x.min() >= 0
    assert e.query_x.max() == 1


def test_other_sizes_and_grey_are_converted(tmp_path: Path) -> None:
    place = tmp_path / "train" / "a"
    place.mkdir(parents=True)
    Image.new("L", (120, 60), 51).save(place / "grey.JPEG")
    (place / "notes.txt").write_text("no picture")
    items = MiniImageNet(tmp_path).items
    assert items.shape == (1, 3, 84, 84)
    assert torch.equal(items, torch.full_like(items, 51))


def test_missing_layout_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^root: expected test\.csv beside images/, or a folder test/"):
        MiniImageNet(csv_layout(tmp_path), "test")
    with pytest.raises(FileNotFoundError, match=r"^root: .*nowhere"):
        MiniImageNet("/nowhere")
    with pytest.raises(ValueError, match=r"^split: "):
        MiniImageNet(tmp_path, "dev")
    with pytest.raises(TypeError, match=r"^root: "):
        MiniImageNet(None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "error", "pattern"),
    [
        (b"name,class\na.jpg,n01\n", ValueError, "expected the columns filename, label"),
        (b"", ValueError, "expected the columns filename, label, got None"),
        (b"filename,label\n", ValueError, "found none"),
        (b"filename,label\na.jpg\n", ValueError, "line 2: expected a filename and a label"),
        (b"filename,label\nlost.jpg,n01\n", FileNotFoundError, r"line 2: no file .*lost\.jpg"),
        (b"filename,label\n\xff\xfe,n01\n", ValueError, "no readable CSV"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, content: bytes, error: type[Exception], pattern: str) -> None:
    root = csv_layout(tmp_path)
    (root / "train.csv").write_bytes(content)
    with pytest.raises(error, match=rf"train\.csv.*{pattern}"):
        MiniImageNet(root)


def test_damaged_picture_is_named(tmp_path: Path) -> None:
    path = folder_layout(tmp_path) / "train" / "n02" / "n021.png"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"n021\.png.*damaged image file"):
        MiniImageNet(tmp_path)


def test_empty_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match=r"^root: expected a folder for each class"):
        MiniImageNet(tmp_path)
    (tmp_path / "train" / "n09").mkdir()
    with pytest.raises(ValueError, match=r"^root: expected pictures in .*n09"):
        MiniImageNet(tmp_path)
