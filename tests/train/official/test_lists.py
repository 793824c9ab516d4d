"""Files with the official names and shapes fill the networks that take them.

``tests/fixtures/keys`` lists name and shape of every tensor of fifteen published files, as their
authors' module definitions print them. The files of a list are made without memory.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rt_ris_train.architecture import OfficialFile, ReferringNetwork, load
from rt_ris_train.architectures.maris import build_sam
from rt_ris_train.containers import tensors_of
from rt_ris_train.official import COUNTER, _check, matches

KEYS = Path(__file__).parents[2] / "fixtures" / "keys"
DEAD = {
    "etris": ("backbone.logit_scale",),
    "dmmi": (".decoder_layer.", ".relative_position_index"),
    "clip": ("visual.", "logit_scale", "text_projection"),
    "sam": (".neck.", "prompt_encoder.", "mask_decoder."),
    "swin": ("head.", "norm.", ".attn_mask", ".relative_position_index"),
    "beit3": ("beit3.vision_embed.mask_token",),
}
"""All that may be dropped from the listed files, by label."""

WIDE = "vit_b with a text tower of 768"
"""No variant: the paper does not say which CLIP it has, and MARIS takes a wider one."""

TAKERS = {
    "sam_vit_b": [("maris", "vit_b", "sam"), ("haris", "vit_b", "sam")],
    "sam_vit_l": [("maris", "vit_l", "sam"), ("haris", "vit_l", "sam")],
    "sam_vit_h": [("maris", "vit_h", "sam"), ("haris", "vit_h", "sam")],
    "clip_RN50": [("etris", "r50", "clip")],
    "clip_RN101": [("etris", "r101", "clip"), ("maris", "vit_b", "clip")],
    "clip_ViT-B-16": [
        ("etris", "v16", "clip"),
        ("maris", "vit_b", "clip"),
        ("haris", "vit_b", "clip"),
    ],
    "clip_ViT-L-14": [("maris", WIDE, "clip")],
    "swin_base_w12_384_22k": [("dmmi", "swin", "swin")],
    "beit3_base_224": [("shared_ris", "base", "beit3")],
    "beit3_large_224": [("shared_ris", "large", "beit3")],
    "etris_r50": [("etris", "r50", "etris")],
    "etris_r101": [("etris", "r101", "etris")],
    "etris_v16": [("etris", "v16", "etris")],
    "dmmi_swin": [("dmmi", "swin", "dmmi")],
    "dmmi_res": [("dmmi", "r101", "dmmi")],
}
CASES = [(name, *taker) for name, takers in TAKERS.items() for taker in takers]


def listed(name: str) -> dict[str, tuple[int, ...]]:
    lines = gzip.decompress((KEYS / f"{name}.tsv.gz").read_bytes()).decode().splitlines()
    pairs = (line.split("\t") for line in lines if line)
    return {
        key: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for key, shape in pairs
    }


@cache
def network_of(arch: str, variant: str) -> ReferringNetwork:
    with torch.device("meta"):
        if variant == WIDE:
            return build_sam(size="vit_b", text_width=768)
        return load(arch).variant(variant).build()


def file_of(name: str, network: ReferringNetwork) -> object:
    """The tree of a file: zero-stride tensors under the listed names, in the authors' container."""
    tensors = {key: torch.zeros(()).expand(shape) for key, shape in listed(name).items()}
    if name.startswith("dmmi"):
        bert = network.get_submodule("bert.network").state_dict()
        words = {key: torch.zeros(()).expand(value.shape) for key, value in bert.items()}
        return {"model": tensors, "bert_model": words, "epoch": 3}
    if name.startswith("swin"):
        return {"model": tensors}
    return {"state_dict": tensors} if name.startswith("etris") else tensors


def test_every_list_has_its_takers() -> None:
    there = {path.name.removesuffix(".tsv.gz") for path in KEYS.glob("*.tsv.gz")}
    assert there == set(TAKERS)
    assert len(there) == 15


@pytest.mark.parametrize(("name", "arch", "variant", "label"), CASES)
def test_a_listed_file_fits_and_only_dead_tensors_are_dropped(
    name: str, arch: str, variant: str, label: str
) -> None:
    network = network_of(arch, variant)
    wanted = network.official_keys()[label]
    tensors: dict[str, Tensor] = tensors_of(file_of(name, network), Path(name), wanted.containers)
    state = network.state_dict()
    _check(tensors, wanted, Path(name), {own: tuple(state[own].shape) for own in wanted.keys})
    dropped = set(tensors) - set(wanted.keys.values())
    allowed = DEAD[label]
    assert all(any(part in key for part in allowed) for key in dropped), sorted(dropped)[:5]
    assert all(any(matches(key, pattern) for pattern in wanted.unused) for key in dropped)
    assert_filled(network, wanted, label)
    for own, conversion in wanted.conversions.items():
        made = conversion.apply(torch.zeros(conversion.shape))
        assert made.shape == state[own].shape, own


def assert_filled(network: ReferringNetwork, wanted: OfficialFile, label: str) -> None:
    """A whole file fills every tensor that a network computes with; another fills its encoder."""
    if not wanted.whole:
        return
    known = {id(value): name for name, value in network.state_dict(keep_vars=True).items()}
    filled = {id(network.state_dict(keep_vars=True)[own]) for own in wanted.keys}
    left = {
        name
        for key, name in known.items()
        if key not in filled and not name.endswith((COUNTER, "relative_position_index"))
    }
    assert not left, (label, sorted(left)[:5])
