"""Every architecture learns: a colour in seconds, and, slowly, things on composite scenes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from rt_ris.cli import main
from rt_ris_train.architecture import names
from rt_ris_train.baselines import baselines
from rt_ris_train.data import RefDataset, open_training
from rt_ris_train.evaluate import EvaluationOptions, evaluate
from rt_ris_train.loop import Trainer
from rt_ris_train.recipe import TrainRecipe, find_recipe, read_recipe
from rt_ris_train.runner import predictor_of
from rt_ris_train.threads import use_threads

COLOURS = {"red": (220, 20, 20), "blue": (30, 30, 220)}
PICTURES, SIDE, BOX = 48, 96, 40


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy pictures with a red and a blue box side by side or one above the other."""
    root = tmp_path_factory.mktemp("boxes")
    (root / "images").mkdir()
    draw = np.random.default_rng(3)
    images, annotations, refs = [], [], []
    for index in range(PICTURES):
        pixels = draw.integers(60, 190, (SIDE, SIDE, 3)).astype(np.uint8)
        places = draw.permutation([(4, 4), (4, 52), (52, 4), (52, 52)])[:2]
        name = f"{index}.png"
        for number, (colour, value) in enumerate(COLOURS.items()):
            top, left = (int(edge) for edge in places[number])
            pixels[top : top + BOX, left : left + BOX] = value
            ann_id = 2 * index + number
            corners = [left, top, left + BOX, top, left + BOX, top + BOX, left, top + BOX]
            annotations.append({"id": ann_id, "image_id": index, "segmentation": [corners]})
            text = f"the {colour} box"
            refs.append(
                {
                    "ref_id": ann_id,
                    "ann_id": ann_id,
                    "image_id": index,
                    "split": "train" if index < PICTURES - 8 else "val",
                    "sentences": [{"sent_id": ann_id, "sent": text, "raw": text}],
                }
            )
        Image.fromarray(pixels).save(root / "images" / name)
        images.append({"id": index, "file_name": name, "height": SIDE, "width": SIDE})
    document = {"images": images, "annotations": annotations, "categories": []}
    (root / "instances.json").write_text(json.dumps(document))
    (root / "refs(synth).json").write_text(json.dumps(refs))
    return root


def iou(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return float((one & other).sum() / max((one | other).sum(), 1))


def tiny_recipe(name: str, **changed: object) -> TrainRecipe:
    recipe = read_recipe(find_recipe(f"{name.replace('_', '-')}-tiny"))
    return replace(recipe, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", names())
def test_a_minute_is_enough_to_tell_red_from_blue(name: str, boxes: Path, tmp_path: Path) -> None:
    use_threads(1)
    recipe = tiny_recipe(
        name,
        steps=STEPS[name],
        sentences=2,
        learning_rate=2e-3,
        warmup_steps=10,
        validate_every=10_000,
        validate_sentences=4,
        save_every=10_000,
    )
    trainer = Trainer(recipe, data=open_training([boxes]), out=tmp_path / "run")
    trainer.run()
    dataset = RefDataset.open(boxes, split="val")
    right, wrong = [], []
    with predictor_of(trainer.network) as predictor:
        for ref, sentence in dataset.samples():
            found = predictor.segment([sentence.text], image=dataset.image(ref))[0].binary
            other = next(each for each in dataset if each.image_id == ref.image_id and each != ref)
            right.append(iou(found, dataset.mask(ref)))
            wrong.append(iou(found, dataset.mask(other)))
    assert np.mean(right) > 0.5, (np.mean(right), np.mean(wrong))
    assert np.mean(right) > np.mean(wrong) + 0.3, (np.mean(right), np.mean(wrong))


STEPS = {"maris": 120, "haris": 120, "etris": 120, "dmmi": 120, "shared_ris": 120}


NOUNS = "banana,lobster,whale,broccoli,eggplant,basketball,flamingo,swan"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Composites of eight things of one colour each."""
    root = tmp_path_factory.mktemp("scenes") / "few"
    counts = ["--train", "1000", "--val", "60", "--test", "140"]
    assert main(["synth", "--out", str(root), "--nouns", NOUNS, *counts]) == 0
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_it_learns_things_on_composites_and_can_be_exported(
    name: str, scenes: Path, tmp_path: Path
) -> None:
    use_threads(1)
    trainer = Trainer(tiny_recipe(name), data=open_training([scenes]), out=tmp_path / "run")
    checkpoint = trainer.run()
    dataset = RefDataset.open(scenes, split="test")
    training = RefDataset.open(scenes, split="train")
    best = max(float(str(evaluate(each, dataset)["oIoU"])) for each in baselines(training).values())
    with predictor_of(trainer.network) as predictor:
        scores = [
            float(str(evaluate(predictor, dataset, options=options)["oIoU"]))
            for options in (EvaluationOptions(), EvaluationOptions(shuffle_seed=1))
        ]
    assert scores[0] >= best + 10, (scores, best)
    assert scores[0] >= scores[1] + 15, (scores, best)
    words = ["export", "--arch", name, "--variant", "tiny", "--checkpoint", str(checkpoint)]
    bundle = tmp_path / "learned.bundle"
    assert main([*words, "--gate", str(scenes), "--out", str(bundle)]) == 0
    record = json.loads((bundle / "parity.json").read_text())
    assert record["proving"] > 0
