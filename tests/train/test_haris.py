from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.architecture import load
from rt_ris_train.architectures.haris import Haris
from rt_ris_train.blocks.human_like_attention import Hierarchy, HumanLikeAttention


@pytest.fixture(scope="module")
def tiny() -> Haris:
    network = load("haris").variant("tiny").build()
    assert isinstance(network, Haris)
    return network


def literal_block(
    block: HumanLikeAttention, v: Tensor, w: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """One picture and one sentence without pads, pixel by pixel and word by word."""
    width = v.shape[1]

    def scores(pixel: Tensor) -> Tensor:
        return (block.ask_w(w) @ block.ask_v(pixel)) / width**0.5

    def weighted(pixel: Tensor) -> Tensor:
        return block.norm_v(scores(pixel).softmax(0) @ block.give_w(w) + pixel)

    second = []
    for pixel in v:
        first = weighted(pixel)
        likeness = functional.cosine_similarity(first, s, dim=0).clamp(0, 1)
        second.append(weighted(pixel + block.feedback(likeness * first)))
    table = torch.stack([scores(pixel) for pixel in v])
    words = [
        block.norm_w(table[:, word].softmax(0) @ block.give_v(v) + w[word])
        for word in range(len(w))
    ]
    return torch.stack(second), torch.stack(words)


def test_a_block_does_what_the_text_says() -> None:
    torch.manual_seed(0)
    block = HumanLikeAttention(8)
    last = block.feedback[2]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.5)
    v, w, s = torch.randn(6, 8), torch.randn(4, 8), torch.randn(8)
    with torch.no_grad():
        pixels, words = block(v[None], w[None], s[None], torch.ones(1, 4, dtype=torch.bool))
        wanted = literal_block(block, v, w, s)
    torch.testing.assert_close(pixels[0], wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(words[0], wanted[1], atol=1e-5, rtol=1e-5)


def test_without_training_the_feedback_changes_nothing() -> None:
    torch.manual_seed(0)
    block = HumanLikeAttention(8)
    v, w, mask = torch.randn(1, 6, 8), torch.randn(1, 4, 8), torch.ones(1, 4, dtype=torch.bool)
    with torch.no_grad():
        one, _ = block(v, w, torch.randn(1, 8), mask)
        other, _ = block(v, w, torch.randn(1, 8), mask)
    torch.testing.assert_close(one, other)


def test_the_convolution_over_both_is_the_sum_of_its_halves() -> None:
    torch.manual_seed(0)
    merge = Hierarchy(8, cells=4).eval()
    whole = nn.Conv2d(16, 8, 3, padding=1, bias=False)
    whole.weight.data = torch.cat((merge.of_block.weight, merge.of_tap.weight), dim=1)
    block, tap = torch.randn(2, 16, 8), torch.randn(2, 8, 4, 4)
    grid = block.mT.reshape(2, 8, 4, 4)
    with torch.no_grad():
        ours = merge(block, merge.of_tap(tap))
        theirs = functional.gelu(merge.norm(whole(torch.cat((grid, tap), dim=1))))
    torch.testing.assert_close(ours, theirs.flatten(2).mT, atol=1e-5, rtol=1e-5)


def fused(network: Haris, words: Tensor, mask: Tensor) -> Tensor:
    torch.manual_seed(1)
    p, c, h = network.cells**2, network.config.width, network.cells
    image = (torch.randn(1, p, c), torch.randn(1, c, h, h), torch.randn(1, c, h, h))
    sentence = torch.randn(len(words), c)
    pixels, read = network.fusion_stage(*image, words, sentence, mask)
    return network.decoder_stage(pixels, read, mask)[0]


def test_pads_never_matter(tiny: Haris) -> None:
    torch.manual_seed(0)
    words = torch.randn(2, tiny.text.length, tiny.config.width)
    mask = torch.arange(tiny.text.length)[None] < torch.tensor([[3], [7]])
    changed = words + torch.where(mask[..., None], 0.0, 5.0)
    with torch.no_grad():
        torch.testing.assert_close(fused(tiny, changed, mask), fused(tiny, words, mask))
        assert not torch.allclose(fused(tiny, words + 0.5, mask), fused(tiny, words, mask))


def test_everything_that_trains_gets_a_gradient_and_the_encoders_stay(tiny: Haris) -> None:
    network = load("haris").variant("tiny").build().train()
    assert isinstance(network, Haris)
    assert not network.image_encoder.training
    for block in network.blocks:  # the last layer begins at zero and would hide the first
        assert isinstance(block, HumanLikeAttention)
        nn.init.normal_(block.feedback[2].weight)
    side = network.image.size
    pixels = torch.randint(0, 255, (1, side, side, 3), dtype=torch.uint8)
    ids = torch.randint(1, 400, (2, network.text.length), dtype=torch.int32)
    ids[:, 4] = 49407
    values = {
        "pixels": pixels,
        "valid_box": torch.tensor([[0, 0, side, side]], dtype=torch.int32),
        "token_ids": ids,
        "token_mask": torch.arange(network.text.length)[None].expand(2, -1) < 5,
    }
    outputs = network.run(values, torch.zeros(2, dtype=torch.int64))
    torch.autograd.backward(outputs.logits.square().mean())
    without = {name for name, value in network.named_parameters() if value.grad is None}
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    assert without == frozen
    assert all(name.startswith(("image_encoder.", "text_encoder.")) for name in frozen)
