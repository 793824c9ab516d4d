from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from rt_ris.image import prepare
from rt_ris_train.architecture import Batch, load
from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.evaluate import EvaluationOptions, evaluate
from rt_ris_train.runner import predictor_of


@dataclass
class Said:
    binary: npt.NDArray[np.bool_]


class RedFinder:
    """Answers with the red pixels, or with nothing where the sentence speaks of a circle."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.pictures = 0

    def set_image(self, image: npt.NDArray[np.uint8]) -> None:
        self.pictures += 1
        self.red = (image == (255, 0, 0)).all(axis=-1)

    def segment(self, sentences: Sequence[str]) -> list[Said]:
        self.heard += sentences
        return [Said(self.red & ("circle" not in text)) for text in sentences]


def test_every_sentence_counts_once_and_every_picture_is_set_once(red_boxes: Path) -> None:
    finder = RedFinder()
    found = evaluate(finder, RefDataset.open(red_boxes, split="val"))
    assert found["sentences"] == len(finder.heard) == 4 * 3 + 1
    assert finder.pictures == 5
    assert found["no_target"] == 1
    assert found["N_acc"] == 100.0
    assert found["T_acc"] == 100.0
    oiou = found["oIoU"]
    assert isinstance(oiou, float)
    assert oiou > 90  # the polygon's edge differs from the drawn box by half a pixel


def test_a_limit_spreads_over_the_split(red_boxes: Path) -> None:
    finder = RedFinder()
    found = evaluate(
        finder, RefDataset.open(red_boxes, split="val"), options=EvaluationOptions(limit=5)
    )
    assert found["sentences"] == 5
    assert finder.pictures == 5


def test_shuffled_sentences_come_from_other_pictures(red_boxes: Path) -> None:
    dataset = RefDataset.open(red_boxes, split="val")
    plain, shuffled = RedFinder(), RedFinder()
    evaluate(plain, dataset)
    options = EvaluationOptions(shuffle_seed=1)
    first = evaluate(shuffled, dataset, options=options)
    assert first["shuffled"] is True
    assert shuffled.heard != plain.heard
    again = RedFinder()
    evaluate(again, dataset, options=options)
    assert again.heard == shuffled.heard


def test_the_predictor_over_pytorch_gives_the_network_s_own_logits() -> None:
    network = load("maris").variant("tiny").build().eval()
    image = np.random.default_rng(0).integers(0, 255, (40, 70, 3), dtype=np.uint8)
    sentences = ["a red box", "the box on the left", "box"]
    predictor = predictor_of(network)
    predictor.set_image(image)
    masks = predictor.segment(sentences)
    prepared = prepare(image, network.image)
    tokens = predictor.tokenizer.encode(sentences)
    batch = Batch(
        pixels=torch.from_numpy(prepared.pixels),
        valid_box=torch.from_numpy(prepared.valid_box),
        token_ids=torch.from_numpy(tokens.token_ids),
        token_mask=torch.from_numpy(tokens.token_mask),
        image_index=torch.zeros(3, dtype=torch.int64),
    )
    with torch.no_grad():
        expected = network(batch).logits.numpy()
    for mask, logits in zip(masks, expected, strict=True):
        np.testing.assert_allclose(mask.logits, logits, rtol=1e-4, atol=1e-5)
        assert mask.binary.shape == (40, 70)


@pytest.mark.parametrize("shuffle", [None, 0])
def test_one_picture_can_be_evaluated(
    red_boxes: Path, monkeypatch: pytest.MonkeyPatch, shuffle: int | None
) -> None:
    dataset = RefDataset.open(red_boxes, split="val")
    one = tuple(ref for ref in dataset.refs if ref.image_id == dataset.refs[0].image_id)
    monkeypatch.setattr(dataset, "refs", one)
    found = evaluate(RedFinder(), dataset, options=EvaluationOptions(shuffle_seed=shuffle))
    assert found["sentences"] == 3
