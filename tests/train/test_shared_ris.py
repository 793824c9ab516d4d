from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris.errors import CheckpointError
from rt_ris_train.architecture import load
from rt_ris_train.architectures.shared_ris import SharedRis, toy_tokenizer
from rt_ris_train.backbones.beit3 import Beit3, Beit3Size, Expert, Layer, official_file
from rt_ris_train.blocks.shared import SharedDecoder


def by_kind(image: nn.Module, text: nn.Module, tokens: Tensor, split: int) -> Tensor:
    """One sequence, its first part through one module and the rest through the other."""
    return torch.cat((image(tokens[:, :split]), text(tokens[:, split:])), dim=1)


def literal_layer(layer: Layer, tokens: Tensor, hidden: Tensor, split: int) -> Tensor:
    """The layer as torchscale has it: one sequence, split and joined around every weight."""

    def both(name: str, value: Tensor) -> Tensor:
        return by_kind(getattr(layer.image, name), getattr(layer.text, name), value, split)

    normed = both("attention_norm", tokens)
    count, length, width = normed.shape
    shape = (count, length, layer.heads, width // layer.heads)
    query = both("query", normed) * (width // layer.heads) ** -0.5
    q, k, v = (
        value.reshape(shape).transpose(1, 2)
        for value in (query, both("key", normed), both("value", normed))
    )
    scores = (q @ k.mT).masked_fill(hidden[:, None, None, :], float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(count, length, width)
    tokens = tokens + both("out", both("inner_norm", mixed))
    wide = functional.gelu(both("widen", both("feed_norm", tokens)))
    return tokens + both("narrow", both("wide_norm", wide))


def randomise(module: nn.Module) -> None:
    for name, value in module.named_parameters():
        if value.ndim == 1:
            nn.init.normal_(value, mean=float(name.endswith("weight")), std=0.1)


def test_two_streams_are_one_sequence() -> None:
    torch.manual_seed(0)
    size = Beit3Size(width=32, layers=3, heads=4, taps=(1, 2, 3), vocabulary=50, patch=8)
    encoder = Beit3(size, image_size=32, length=6).eval()
    randomise(encoder)
    image, ids = torch.randn(2, 3, 32, 32), torch.randint(0, 50, (2, 6))
    mask = torch.tensor([[True] * 6, [True, True, True, False, False, False]])
    with torch.no_grad():
        found = encoder(image, ids, mask)
        patches = encoder.patches(image).flatten(2).mT
        first = encoder.class_token.expand(2, -1, -1)
        seen = torch.cat((first, patches), dim=1) + encoder.image_positions[2:19]
        read = (encoder.words(ids) + encoder.text_positions[2:8]) * mask[..., None]
        tokens, split = torch.cat((seen, read), dim=1), 17
        hidden = torch.cat((torch.zeros(2, split, dtype=torch.bool), ~mask), dim=1)
        for number, layer in enumerate(encoder.layers):
            assert isinstance(layer, Layer)
            tokens = literal_layer(layer, tokens, hidden, split)
            wanted = tokens
            if number == 2:
                wanted = by_kind(encoder.image_norm, encoder.text_norm, tokens, split)
            streams = torch.cat(found[number], dim=1)
            torch.testing.assert_close(streams, wanted, atol=1e-5, rtol=1e-5)


def test_the_last_convolution_goes_into_the_text_vector() -> None:
    torch.manual_seed(0)
    decoder = SharedDecoder(width=16, heads=4, cells=4).eval()
    tokens, visible = torch.randn(2, 23, 16), torch.ones(2, 23, dtype=torch.bool)
    kept: dict[str, Tensor] = {}
    decoder.ask.register_forward_hook(lambda _m, _i, out: kept.update(vector=out))
    decoder.up[1].register_forward_hook(lambda _m, _i, out: kept.update(fine=out))
    with torch.no_grad():
        ours = decoder(tokens, visible)
        theirs = torch.einsum("nc,nchw->nhw", kept["vector"], decoder.last(kept["fine"]))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_positions_for_480_pixels_come_from_those_for_224() -> None:
    encoder = Beit3(
        Beit3Size(width=8, layers=1, heads=1, taps=(1,), vocabulary=10),
        image_size=480,
        length=4,
    )
    conversion = official_file(encoder, "").conversions["image_positions"]
    table = torch.randn(199, 8)
    assert conversion.shape == (199, 8)
    grid = table[3:].T.reshape(1, 8, 14, 14)
    resized = functional.interpolate(grid, size=(30, 30), mode="bicubic").flatten(2)[0].T
    wanted = torch.cat((table[:3], resized))
    torch.testing.assert_close(conversion.apply(table), wanted, atol=1e-6, rtol=1e-5)


def test_pads_change_nothing_and_words_do() -> None:
    network = load("shared_ris").variant("tiny").build()
    side = network.image.size
    pixels = torch.randint(0, 255, (1, side, side, 3), dtype=torch.uint8)
    box = torch.tensor([[0, 0, side, side]], dtype=torch.int32)
    ids = torch.full((1, 20), 1, dtype=torch.int32)
    ids[0, :4] = torch.tensor([0, 50, 60, 2])
    mask = torch.arange(20)[None] < 4
    (stage,) = network.stages()
    with torch.no_grad():
        (logits,) = stage.module(pixels, box, ids, mask)
        other_pads, other_words = ids.clone(), ids.clone()
        other_pads[0, 4:] = 77
        other_words[0, 2] = 61
        torch.testing.assert_close(stage.module(pixels, box, other_pads, mask)[0], logits)
        assert not torch.allclose(stage.module(pixels, box, other_words, mask)[0], logits)


def test_both_streams_of_a_sample_skip_a_branch_together() -> None:
    torch.manual_seed(0)
    layer = Layer(Beit3Size(width=16, heads=2), drop_path=0.5).train()
    image, text = torch.randn(64, 3, 16), torch.randn(64, 2, 16)
    seen, read = layer(image, text, torch.ones(64, 5, dtype=torch.bool))
    same_image = (seen == image).all(2).all(1)
    same_text = (read == text).all(2).all(1)
    assert (same_image == same_text).all()
    assert 0 < int(same_image.sum()) < 64
    assert isinstance(layer.image, Expert)


def test_without_its_vocabulary_it_says_which_file_and_whence() -> None:
    with torch.device("meta"):
        network = load("shared_ris").variant("base").build()
    with pytest.raises(CheckpointError, match=r"beit3\.spm.*microsoft/unilm.*--tokenizer"):
        network.tokenizer_json()
    document = toy_tokenizer()
    network.use_tokenizer(document)
    assert network.tokenizer_json() == document
    tiny = load("shared_ris").variant("tiny").build()
    assert isinstance(tiny, SharedRis)
    assert tiny.official_tokenizer() is None
    with pytest.raises(CheckpointError, match="brings its own tokenizer"):
        tiny.use_tokenizer("{}")
