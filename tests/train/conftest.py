from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SENTENCES = ("red box", "the red square", "square thing")


@pytest.fixture(scope="session")
def red_boxes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noisy pictures with one red box each, and three with a sentence about nothing."""
    root = tmp_path_factory.mktemp("red-boxes")
    (root / "images").mkdir()
    draw = np.random.default_rng(0)
    images, annotations, refs = [], [], []
    for index in range(15):
        pixels = draw.integers(0, 255, (90, 120, 3), dtype=np.uint8)
        left = int(draw.integers(0, 80))
        pixels[30:70, left : left + 40] = (255, 0, 0)
        name = f"{index}.png"
        Image.fromarray(pixels).save(root / "images" / name)
        images.append({"id": index, "file_name": name, "height": 90, "width": 120})
        corners = [left, 30, left + 40, 30, left + 40, 70, left, 70]
        annotations.append(
            {"id": index, "image_id": index, "category_id": 1, "segmentation": [corners],
             "bbox": [left, 30, 40, 40], "area": 1600, "iscrowd": 0}
        )  # fmt: skip
        absent = index % 5 == 4
        texts = ("blue circle",) if absent else SENTENCES
        refs.append(
            {"ref_id": index, "ann_id": [-1] if absent else index, "image_id": index,
             "category_id": 1, "file_name": name, "split": "train" if index < 10 else "val",
             "sent_ids": [index],
             "sentences": [
                 {"sent_id": 3 * index + k, "sent": text, "raw": text, "tokens": text.split()}
                 for k, text in enumerate(texts)
             ]}
        )  # fmt: skip
    document = {
        "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]
    }  # fmt: skip
    (root / "instances.json").write_text(json.dumps(document))
    (root / "refs(synth).json").write_text(json.dumps(refs))
    return root
