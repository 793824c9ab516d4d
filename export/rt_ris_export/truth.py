"""PyTorch's side of the gate: what a network computes, stage by stage."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rt_ris.image import Prepared, prepare
from rt_ris.spec import PIXELS, TOKEN_IDS, TOKEN_MASK, VALID_BOX, Dependency
from rt_ris.text import Tokenizer, Tokens, TruncationWarning
from rt_ris_export.gate_data import GateSample
from rt_ris_train.architecture import ReferringNetwork, device_of

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Observation:
    """One call on one picture with N sentences, in PyTorch.

    Attributes:
        sample: the picture.
        prepared: the picture as the network takes it.
        tokens: the N sentences.
        truth: every value that PyTorch computes.
    """

    sample: GateSample
    prepared: Prepared
    tokens: Tokens
    truth: Mapping[str, Array]


def observe(
    network: ReferringNetwork,
    samples: Sequence[GateSample],
    *,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Observation, ...]:
    """PyTorch on all sentences of each picture at once, then on the first alone."""
    return tuple(seen for sample in samples for seen in _observed(network, sample, say))


def _observed(
    network: ReferringNetwork, sample: GateSample, say: Callable[[str], None]
) -> Iterator[Observation]:
    tokenizer = Tokenizer(network.tokenizer_json().encode(), network.text)
    dependency = network.graph().values
    prepared = prepare(sample.picture, network.image)
    seen: Mapping[str, Array] = {PIXELS: prepared.pixels, VALID_BOX: prepared.valid_box}
    for sentences in (sample.sentences, sample.sentences[:1]):
        say(f"PyTorch on {sample.name} with {counted(len(sentences))}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # one sentence is meant to be cut
            tokens = tokenizer.encode(sentences)
        given = {TOKEN_IDS: tokens.token_ids, TOKEN_MASK: tokens.token_mask}
        truth = activations(network, {**seen, **given})
        seen = {name: truth[name] for name in truth if dependency[name] is Dependency.IMAGE}
        yield Observation(sample=sample, prepared=prepared, tokens=tokens, truth=truth)


def activations(network: ReferringNetwork, given: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of one run on one picture and N sentences.

    Does what ``ReferringNetwork.run`` does and keeps what lies between; a value that is given
    already is not computed again.

    Args:
        network: in evaluation mode.
        given: external inputs [1, ...] and [N, ...], and whatever else is known.

    Returns:
        All values by name, image values [1, ...] and the others [N, ...].
    """
    graph, device = network.graph(), device_of(network)
    known = {name: torch.from_numpy(np.array(array)).to(device) for name, array in given.items()}
    with torch.inference_mode():
        for stage in network.stages():
            if all(spec.name in known for spec in stage.spec.outputs):
                continue
            inputs = [known[spec.name] for spec in stage.spec.inputs]
            if graph.dependency(stage.spec.id) is Dependency.BOTH:
                count = max(len(tensor) for tensor in inputs)
                inputs = [tensor.expand(count, *tensor.shape[1:]) for tensor in inputs]
            made = stage.module(*inputs)
            known.update(zip((spec.name for spec in stage.spec.outputs), made, strict=True))
    return {name: tensor.cpu().numpy() for name, tensor in known.items()}


def counted(sentences: int) -> str:
    """So many sentences, in words."""
    return f"{sentences} sentence{'s' if sentences > 1 else ''}"
