from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import rt_ris
from rt_ris.errors import BackendError, ImageError, IntegrityError, RtRisError, TextError
from rt_ris.predictor import Predictor

Picture = npt.NDArray[np.uint8]


@pytest.fixture
def colours(tiny: Path) -> Predictor:
    pytest.importorskip("onnxruntime")
    return Predictor.load(tiny, threads=1)


def test_the_tiny_bundle_finds_colours(colours: Predictor, picture: Picture) -> None:
    colours.set_image(picture)
    red, blue, green = colours.segment(["the red thing", "blue", "the green one"])
    inside = np.zeros(picture.shape[:2], dtype=np.bool_)
    inside[4:20, 4:16] = True
    assert (red.binary & inside).sum() / (red.binary | inside).sum() > 0.7
    assert blue.box is not None
    assert blue.box.left >= 20
    assert not green.exists
    assert red.existence is not None
    assert red.existence > 0.9
    assert red.score > 0.7


def test_a_text_gives_a_mask_and_a_list_a_list(colours: Predictor, picture: Picture) -> None:
    with colours as predictor:
        predictor.set_image(picture)
        alone, listed = predictor.segment("red"), predictor.segment(("red",))
    assert isinstance(listed, list)
    assert np.array_equal(alone.logits, listed[0].logits)


def test_all_kinds_of_pictures_give_the_same(
    colours: Predictor, picture: Picture, tmp_path: Path
) -> None:
    Image.fromarray(picture).save(tmp_path / "a.png")
    sources = (picture, Image.fromarray(picture), tmp_path / "a.png", str(tmp_path / "a.png"))
    masks = [colours.segment("red", image=source) for source in sources]
    assert all(np.array_equal(mask.logits, masks[0].logits) for mask in masks)
    assert colours.stats.stages["image"].runs == 1


def test_features_may_be_kept_and_used_later(colours: Predictor, picture: Picture) -> None:
    first, second = colours.encode_image(picture), colours.encode_image(picture[:, ::-1])
    assert colours.segment("red", image=second).box != colours.segment("red", image=first).box
    [mask] = colours.decode(first, colours.encode_text("red"))
    assert np.array_equal(mask.logits, colours.segment("red", image=first).logits)


def test_the_order_of_calls_is_explained(colours: Predictor) -> None:
    with pytest.raises(RtRisError, match=r"set_image\(picture\) first"):
        colours.segment("red")


def test_a_bad_picture_leaves_the_one_before(colours: Predictor, picture: Picture) -> None:
    colours.set_image(picture)
    before = colours.segment("red")
    with pytest.raises(ImageError):
        colours.set_image("no such file")
    assert np.array_equal(colours.segment("red").logits, before.logits)


@pytest.mark.parametrize("sentences", ["", "  ", [], ["red", ""], [None], 5])
def test_bad_sentences_are_refused(
    colours: Predictor, picture: Picture, sentences: list[str]
) -> None:
    colours.set_image(picture)
    with pytest.raises(TextError):
        colours.segment(sentences)


def test_a_closed_predictor_says_so(colours: Predictor, picture: Picture) -> None:
    colours.close()
    colours.close()
    with pytest.raises(BackendError, match="closed"):
        colours.set_image(picture)


def test_by_default_all_members_are_checked(tiny: Path) -> None:
    raw = (tiny / "golden.npz").read_bytes()
    (tiny / "golden.npz").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    Predictor.load(tiny, backend="fake", verify="used").close()
    with pytest.raises(IntegrityError, match=r"golden\.npz"):
        Predictor.load(tiny, backend="fake")


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000)])
def test_extreme_sizes_work(colours: Predictor, size: tuple[int, int]) -> None:
    red = np.zeros((*size, 3), dtype=np.uint8)
    red[..., 0] = 255
    mask = colours.segment("red", image=red)
    assert mask.binary.shape == size
    assert mask.probability.shape == size


def test_public_names_are_what_they_say() -> None:
    assert sorted(rt_ris.__all__) == rt_ris.__all__
    for name in rt_ris.__all__:
        assert getattr(rt_ris, name).__name__ == name
        assert name in dir(rt_ris)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = rt_ris.Nothing  # type: ignore[attr-defined]
