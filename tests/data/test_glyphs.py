"""The letters: splits, pictures, and that a render is repeatable."""

from __future__ import annotations

import builtins
import unicodedata
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch

from metafast.data import Glyphs, _glyph_images

pytest.importorskip("PIL")

FEW = [*"AaBbIJШЯԱՖჰ", "\N{GREEK CAPITAL LETTER ALPHA}", "\N{CYRILLIC CAPITAL LETTER A}"]


@pytest.fixture(scope="module")
def splits() -> dict[str, Glyphs]:
    """All three, from the user's cache: keyed by fonts, options and code, it cannot be out of date."""
    return {split: Glyphs(split) for split in ("train", "val", "test")}


@pytest.fixture
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own and a dozen letters, so that rendering takes no time."""
    monkeypatch.setenv("METAFAST_CACHE", str(tmp_path))
    monkeypatch.setattr(_glyph_images, "common_letters", lambda fonts: sorted(FEW))
    return tmp_path


def test_splits_share_no_script_and_no_picture(splits: dict[str, Glyphs]) -> None:
    scripts = {s: {_glyph_images.script(letter) for letter in g.letters} for s, g in splits.items()}
    assert scripts == {
        "train": {"LATIN", "GREEK", "COMMON"},
        "val": {"CYRILLIC"},
        "test": {"ARMENIAN", "GEORGIAN"},
    }
    letters = [letter for g in splits.values() for letter in g.letters]
    assert len(set(letters)) == len(letters)
    assert all(unicodedata.category(letter).startswith("L") for letter in letters)


def test_sizes_as_documented(splits: dict[str, Glyphs]) -> None:
    for split, about in (("train", 1090), ("val", 107), ("test", 108)):
        assert abs(splits[split].classes - about) < 0.03 * about
        assert splits[split].counts.unique().tolist() == [24]


def test_no_two_letters_look_the_same(splits: dict[str, Glyphs]) -> None:
    for glyphs in splits.values():
        assert glyphs.items.unique(dim=0).shape[0] == glyphs.items.shape[0]
    everything = "".join("".join(g.letters) for g in splits.values())
    assert "A" in everything  # the first of three that are one picture
    assert "\N{GREEK CAPITAL LETTER ALPHA}" not in everything
    assert "\N{CYRILLIC CAPITAL LETTER A}" not in everything


def test_pictures_are_ink_on_background(splits: dict[str, Glyphs]) -> None:
    for glyphs in splits.values():
        assert glyphs.items.dtype == torch.uint8
        assert glyphs.items.shape[1:] == (1, 28, 28)
        ink = glyphs.items.float().div(255).mean((1, 2, 3))
        assert ink.min() > 0.002  # no empty picture
        assert ink.max() < 0.5
        border = torch.cat([glyphs.items[..., [0, -1], :].flatten(1), glyphs.items[..., [0, -1]].flatten(1)], 1)
        assert border.float().mean() < 2  # letters lie within the canvas
        assert glyphs.items.unique().numel() == 256  # antialiased


def test_samples_in_unit_interval(splits: dict[str, Glyphs]) -> None:
    e = splits["test"].sample(ways=20, generator=torch.Generator().manual_seed(0))
    assert e.support_x.shape == (32, 20, 1, 28, 28)
    assert e.query_x.shape == (32, 300, 1, 28, 28)
    assert e.support_x.min() == 0
    assert e.support_x.max() == 1


def test_letters_are_recognisable_across_faces(splits: dict[str, Glyphs]) -> None:
    """By the neighbour nearest in pixels, 5-way 1-shot: far better than chance, and far from perfect."""
    e = splits["test"].sample(tasks=200, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(e.query_x.flatten(2), e.support_x.flatten(2)).argmin(-1)
    assert 0.35 < (nearest == e.query_y).double().mean() < 0.95


def test_rendering_is_repeatable_and_cached(few: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Glyphs("train")
    (file,) = few.iterdir()
    content = file.read_bytes()
    file.unlink()
    Glyphs("train")
    assert file.read_bytes() == content
    monkeypatch.setattr("metafast.data.glyphs.render", None)  # a second rendering would fail
    assert torch.equal(Glyphs("train").items, first.items)
    assert Glyphs("test").letters == ("Ա", "Ֆ", "ჰ")


def test_a_damaged_cache_is_rendered_anew(few: Path) -> None:
    first = Glyphs("val")
    (file,) = few.iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged"):
        again = Glyphs("val")
    assert torch.equal(first.items, again.items)
    assert torch.equal(Glyphs("val").items, first.items)


def test_options_change_the_pictures(few: Path) -> None:
    standard = Glyphs("test")
    assert not torch.equal(Glyphs("test", seed=1).items, standard.items)
    assert Glyphs("test", variants=1).counts.tolist() == [12] * 3
    still = Glyphs("test", variants=2, rotation=0, shift=0, scale=0).items.view(3, 12, 2, 28, 28)
    assert torch.equal(still[:, :, 0], still[:, :, 1])


def test_motion_turns_scales_and_shifts_as_told() -> None:
    options = _glyph_images.Options(variants=4000, rotation=15.0, shift=2.0, scale=0.1, seed=0)
    matrix = _glyph_images._motions(1, 1, options)[0, 0].double()
    # From picture to drawing: the inverse of turn, scale, shift.
    scale = matrix[:, :, :2].det() ** -0.5
    angle = torch.atan2(matrix[:, 0, 1], matrix[:, 0, 0]).rad2deg()
    shift = -torch.linalg.solve(matrix[:, :, :2], matrix[:, :, 2:]).squeeze(-1) * 14
    for values, low, high in ((scale, 0.9, 1.1), (angle, -15, 15), (shift, -2, 2)):
        assert low - 1e-5 <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-5


def test_resampling_without_motion_is_area_averaging() -> None:
    page = torch.rand(1, 1, 112, 112, generator=torch.Generator().manual_seed(0))
    still = torch.tensor([[1.0, 0, 0], [0, 1, 0]]).view(1, 1, 1, 2, 3)
    picture = _glyph_images._resample(page, still)
    expected = torch.nn.functional.avg_pool2d(page, 4)[0] * 255
    assert (picture.double() - expected).abs().max() <= 0.51


def test_oversize_letters_are_shrunk_to_the_canvas() -> None:
    drawn = _glyph_images._Pen(_glyph_images.font_paths()).draw("\N{LATIN CAPITAL LETTER DZ WITH CARON}")
    for axes in ((0, 1), (0, 2)):
        assert (drawn.max(axes) > 0).sum() <= _glyph_images.LARGEST + 2


def test_the_first_of_letters_that_look_alike_is_kept() -> None:
    a, b = torch.zeros(2, 28, 28), torch.ones(2, 28, 28)
    half = torch.stack([a[0], b[0]])  # like a in one face
    kept = _glyph_images._distinguishable(torch.stack([b, a, half, a, b]), [1, 0, 0, 1, 2])
    assert kept == [1, 0]


def test_fingerprint_depends_on_options_and_fonts(tmp_path: Path) -> None:
    fonts = _glyph_images.font_paths()
    options = _glyph_images.Options(2, 15.0, 2.0, 0.1, 0)
    other = tmp_path / "font.ttf"
    other.write_bytes(fonts[0].read_bytes() + b"\0")
    prints = {
        _glyph_images.fingerprint(fonts, options),
        _glyph_images.fingerprint(fonts, _glyph_images.Options(2, 15.0, 2.0, 0.1, 1)),
        _glyph_images.fingerprint([other, *fonts[1:]], options),
    }
    assert len(prints) == 3


@pytest.mark.parametrize(
    ("error", "pattern", "kwargs"),
    [
        (ValueError, "split: .*'train', 'val', 'test'.* got 'dev'", {"split": "dev"}),
        (TypeError, "split: ", {"split": 0}),
        (ValueError, "variants: ", {"variants": 0}),
        (TypeError, "variants: ", {"variants": True}),
        (ValueError, "rotation: ", {"rotation": float("nan")}),
        (ValueError, "shift: ", {"shift": -1}),
        (ValueError, "scale: ", {"scale": 1.0}),
        (TypeError, "seed: ", {"seed": "0"}),
        (ValueError, "seed: ", {"seed": -1}),
        (ValueError, "seed: ", {"seed": 2**63}),
    ],
)
def test_refuses(error: type[Exception], pattern: str, kwargs: dict[str, Any]) -> None:
    with pytest.raises(error, match=f"^{pattern}"):
        Glyphs(**kwargs)


def test_missing_matplotlib_tells_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'metafast\[data\]'"):
        Glyphs()


def test_missing_fonts_tell_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matplotlib, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(ImportError, match=r"DejaVuSans\.ttf.*--force-reinstall matplotlib"):
        Glyphs()


def test_letter_table_matches_the_fonts() -> None:
    letters = _glyph_images.common_letters(_glyph_images.font_paths())
    assert 1400 < len(letters) < 1700
    assert letters == sorted(set(letters))
    assert np.isin(list("AzΩЖԱა"), letters).all()
