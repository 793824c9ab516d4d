"""ETRIS reproduces the authors' logits and inner tensors on weights that a rule makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rt_ris_train.architecture import load
from rt_ris_train.architectures.etris import Etris
from rt_ris_train.backbones.clip_image import ClipResNet

from .weight_rule import compare, fill, golden, relative

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


@contextmanager
def taps(network: Etris) -> Iterator[dict[str, Tensor]]:
    """Collect tensors by their names in the goldens while the network runs."""
    found: dict[str, Tensor] = {}

    def after(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, output: found.__setitem__(name, output)

    def before(name: str) -> Callable[..., None]:
        return lambda _module, inputs: found.__setitem__(name, inputs[0])

    made, taken = points(network)
    with ExitStack() as hooks:
        for name, module in made.items():
            hooks.callback(module.register_forward_hook(after(name)).remove)
        for name, module in taken.items():
            hooks.callback(module.register_forward_pre_hook(before(name)).remove)
        yield found


def laid_out(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In the authors' layout, which has tokens first in places."""
    if tensor.ndim == 4 and len(shape) == 3:
        tensor = tensor.flatten(2).transpose(1, 2)
    if tuple(tensor.shape) != shape:
        tensor = tensor.transpose(0, 1)
    return tensor


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
    with torch.inference_mode(), taps(network) as found:
        front = network.visual.front(image)
        f_q, words, state = network.fusion_stage(front, *network.text_stage(ids), ids)
        (logits,) = network.decoder_stage(f_q, words, state, ids)
        # The network joins the last convolution with the kernel; its module is still the authors'.
        found["proj_vis"] = network.proj.vis(found["decoder_out"])
    assert relative(logits.numpy(), truth["logits"][:, 0]) <= LIMIT
    found |= {"words": words, "state": state}
    names = {name.removesuffix(".shape") for name in truth if name.endswith(".shape")}
    assert names == set(found)
    errors = {
        name: compare(laid_out(found[name], tuple(truth[f"{name}.shape"])), name, truth)
        for name in names
    }
    assert max(errors.values()) <= LIMIT, sorted(errors.items(), key=lambda item: -item[1])[:5]
