"""DMMI reproduces the authors' logits and inner tensors on weights that a rule makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rt_ris_train.architecture import load
from rt_ris_train.architectures.dmmi import Dmmi
from rt_ris_train.backbones.pyramid import SwinTrunk

from .weight_rule import fill, golden, relative, taps, worst

OVERRIDES = {"swin": {}, "r101": {"model.classifier.conv1_1.bias[1]": -0.45}}
LIMIT = 1e-4


def points(network: Dmmi) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Modules whose outputs, and modules whose inputs, are named in the goldens."""
    bert, decoder = network.bert.network, network.decoder
    made: dict[str, nn.Module] = {
        "bert_embeddings": bert.embeddings,
        "bert_layer0": bert.encoder.layer[0],
        "bert_layer5": bert.encoder.layer[5],
        "bert_last_hidden": network.bert,
        "decoder_block4": decoder.block4,
        "decoder_tf1": decoder.fusion1,
        "decoder_block3_G": decoder.block3,
        "decoder_tf2": decoder.fusion2,
        "decoder_block2": decoder.block2,
    }
    if isinstance(network.trunk, SwinTrunk):
        made["patch_embed"] = network.trunk.patch_embed
    taken: dict[str, nn.Module] = {}
    for stage, exchange in enumerate(network.exchanges):
        made[f"stage{stage}_mba_visual"] = exchange.fusion
        made[f"stage{stage}_gate"] = exchange.res_gate
        taken[f"stage{stage}_before_fusion"] = exchange
    return made, taken


@pytest.mark.parametrize("variant", OVERRIDES)
def test_the_authors_numbers_come_out(variant: str) -> None:
    network = load("dmmi").variant(variant).build()
    assert isinstance(network, Dmmi)
    fill(network, network.official_keys()["dmmi"], OVERRIDES[variant])
    truth = golden(f"dmmi_{variant}")
    draw = np.random.Generator(np.random.PCG64(7))
    image = torch.from_numpy(draw.standard_normal((2, 3, 480, 480), dtype=np.float32))
    ids = torch.from_numpy(truth["input_ids"]).to(torch.int32)
    mask = torch.from_numpy(truth["attention_mask"]).to(torch.bool)
    with torch.inference_mode(), taps(*points(network)) as found:
        (words,) = network.text_stage(ids, mask)
        *maps, refined = network.fusion_stage(network.trunk.front(image), words, mask)
        decoded = network.decoder((maps[0], maps[1], maps[2], maps[3]), refined)
        # The authors' two channels, of which the network computes the difference only.
        both = network.decoder.conv1_1(found["decoder_block2"])
        found["logits_480"] = functional.interpolate(
            both, size=480, mode="bilinear", align_corners=True
        )
        found["ccr_lang"] = network.rebuild(decoded.middle, words)
        found["d3_contrastive_visual"] = network.contrast(decoded, refined)[0]
    wanted = truth["logits"][:, 1] - truth["logits"][:, 0]
    assert relative(decoded.logits.numpy(), wanted) <= LIMIT
    assert ((decoded.logits.numpy() > 0) != (wanted > 0)).sum() <= 2
    found |= {f"backbone_c{stage + 1}": feature for stage, feature in enumerate(maps)}
    found["lang_refined"] = refined
    for stage in range(4):
        found[f"stage{stage}_mba_lang"] = found[f"stage{stage}_mba_visual+"]
    error, name = worst(found, truth)
    assert error <= LIMIT, name
