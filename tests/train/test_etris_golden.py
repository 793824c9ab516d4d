"""ETRIS reproduces the authors' logits and inner tensors on weights that a rule makes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from rt_ris_train.architecture import load
from rt_ris_train.architectures.etris import Etris
from rt_ris_train.backbones.clip_image import ClipResNet

from .weight_rule import fill, golden, relative, taps, worst

BIAS = {"r101": -16.0, "r50": -1.0, "v16": -20.0}
"""The one value that the rule overrides, so that masks are neither empty nor full."""

LIMIT = 1e-4


def points(network: Etris) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """Modules whose outputs, and modules whose inputs, are named in the goldens."""
    visual, bridger, neck = network.visual, network.bridger, network.neck
    made: dict[str, nn.Module] = {}
    if isinstance(visual, ClipResNet):
        made["visual_layer1"] = visual.network.layer1
        for depth in (2, 3, 4):
            made[f"visual_layer{depth}_before_fusion"] = getattr(visual.network, f"layer{depth}")
    else:
        made["visual_ln_pre"] = visual.ln_pre
        for block in (4, 8, 12):
            made[f"visual_block{block}_before_fusion"] = visual.transformer.resblocks[block - 1]
    for block in (4, 8, 12):
        text = network.textual.transformer.resblocks[block - 1]
        made[f"text_block{block}_before_fusion"] = text
    for kind in ("zoom_in", "zoom_out", "fusion_v", "fusion_t"):
        for depth, module in enumerate(getattr(bridger, kind)):
            made[f"bridger_{kind}{depth}"] = module
    for number in (3, 4, 5):
        made[f"neck_f{number}"] = getattr(neck, f"f{number}_proj")
        made[f"neck_fusion{number}"] = getattr(neck, f"fusion{number}")
    made |= {"neck_aggr": neck.aggr, "neck_out": neck}
    made |= {f"decoder_layer{n}": layer for n, layer in enumerate(network.decoder.layers)}
    made |= {"decoder_out": network.decoder, "proj_txt": network.proj.txt}
    taken = {f"bridger_vis{n - 3}": getattr(neck, f"f{n}_proj") for n in (3, 4, 5)}
    return made, taken


@pytest.mark.parametrize("variant", BIAS)
def test_the_authors_numbers_come_out(variant: str) -> None:
    network = load("etris").variant(variant).build()
    assert isinstance(network, Etris)
    file = network.official_keys()["etris"]
    fill(network, file, {"proj.txt.bias[2304]": BIAS[variant]})
    truth = golden(f"etris_{variant}")
    draw = np.random.Generator(np.random.PCG64(7))
    image = torch.from_numpy(draw.standard_normal((2, 3, 416, 416), dtype=np.float32))
    ids = torch.from_numpy(truth["input_ids"]).to(torch.int32)
    with torch.inference_mode(), taps(*points(network)) as found:
        front = network.visual.front(image)
        f_q, words, state = network.fusion_stage(front, *network.text_stage(ids), ids)
        (logits,) = network.decoder_stage(f_q, words, state, ids)
        # The network joins the last convolution with the kernel; its module is still the authors'.
        found["proj_vis"] = network.proj.vis(found["decoder_out"])
    assert relative(logits.numpy(), truth["logits"][:, 0]) <= LIMIT
    found |= {"words": words, "state": state}
    error, name = worst(found, truth)
    assert error <= LIMIT, name
