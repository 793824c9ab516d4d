from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from rt_ris_train.architecture import load
from rt_ris_train.architectures.dmmi import (
    Dmmi,
    contrastive_loss,
    similarity_loss,
)
from rt_ris_train.backbones.pyramid import ResNetSize, ResNetTrunk, SwinSize, SwinTrunk
from rt_ris_train.blocks.bidirectional import BidirectionalAttention, PixelQuery, WordQuery
from rt_ris_train.blocks.text_to_image import TextToImage
from rt_ris_train.blocks.transformer import TransformerLayer
from rt_ris_train.data.erasing import erase_nouns, noun_runs


@pytest.fixture(scope="module")
def tiny() -> Dmmi:
    network = load("dmmi").variant("tiny").build()
    assert isinstance(network, Dmmi)
    return network


def test_a_window_of_cells_is_unfolded_by_a_convolution() -> None:
    torch.manual_seed(0)
    query = PixelQuery(width=8, inner=4, words=6, window=3)
    grid = torch.randn(2, 4, 5, 5)
    flat = query.gather.weight.reshape(8, 36)  # the authors' layout: channel, then place
    unfolded = functional.unfold(grid, 3, padding=1)
    theirs = (flat @ unfolded + query.gather.bias[:, None]).reshape(2, 8, 5, 5)
    torch.testing.assert_close(query.gather(grid), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("run", [1, 2, 3])
def test_a_run_of_words_repeats_the_ends(run: int) -> None:
    torch.manual_seed(0)
    query = WordQuery(width=8, inner=4, words=6, run=run)
    pixels, words, real = torch.randn(2, 9, 8), torch.randn(2, 5, 6), torch.ones(2, 5, 1)
    line = query.squeeze(words).mT
    padded = functional.pad(line, (run // 2, (run - 1) // 2), mode="replicate")
    keys = query.key(pixels)
    keys = functional.instance_norm(keys.mT).mT
    theirs = query.gather(padded).mT @ keys.mT
    torch.testing.assert_close(query(pixels, words, real), theirs, atol=1e-5, rtol=1e-4)


def test_one_logit_is_the_difference_of_two() -> None:
    torch.manual_seed(0)
    decoder = TextToImage((4, 8, 8, 16), width=16, hidden=32, heads=4).eval()
    maps = tuple(
        torch.randn(2, width, side, side)
        for width, side in zip((4, 8, 8, 16), (16, 8, 4, 2), strict=True)
    )
    kept: list[torch.Tensor] = []
    decoder.block2.register_forward_hook(lambda _m, _i, output: kept.append(output))
    with torch.no_grad():
        decoded = decoder((maps[0], maps[1], maps[2], maps[3]), torch.randn(2, 5, 16))
        both = decoder.conv1_1(kept[0])
    torch.testing.assert_close(decoded.logits, both[:, 1] - both[:, 0], atol=1e-5, rtol=1e-4)


def test_a_padded_word_reads_nothing_of_the_picture() -> None:
    # Its query is zero, so it sees all pixels alike, and their mean is zero after the norm.
    torch.manual_seed(0)
    attention = BidirectionalAttention(width=8, words=6)
    mask = torch.tensor([[True, True, False, False]])
    with torch.no_grad():
        _, read = attention(torch.randn(1, 16, 8), torch.randn(1, 4, 6), mask, 4)
    bias = attention.to_words.bias.expand(2, -1)
    torch.testing.assert_close(read[0, 2:], bias, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(read[0, :2], bias, atol=1e-3)


def test_the_layer_is_pytorchs() -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).eval()
    ours = TransformerLayer(width=32, heads=4, hidden=64, dropout=0.1).eval()
    ours.load_state_dict(theirs.state_dict())
    own, memory = torch.randn(2, 7, 32), torch.randn(2, 5, 32)
    torch.testing.assert_close(ours(own, memory), theirs(own, memory), atol=1e-5, rtol=1e-5)


def test_swin_is_torchvisions_on_maps_that_need_padding() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.SwinTransformer(
        [4, 4], 24, [2, 2, 2, 2], [2, 2, 4, 4], [4, 4]
    ).eval()
    ours = SwinTrunk(
        SwinSize(width=24, depths=(2, 2, 2, 2), heads=(2, 2, 4, 4), window=4, drop_path=0.0)
    ).eval()
    state = theirs.state_dict()
    made = {}
    for name in ours.state_dict():
        if name.startswith("patch_embed."):
            place = name.replace("patch_embed.proj", "features.0.0")
            made[name] = state[place.replace("patch_embed.norm", "features.0.2")]
        else:
            _, stage, kind, rest = name.split(".", 3)
            layer = 2 * int(stage) + (1 if kind == "blocks" else 2)
            made[name] = state[f"features.{layer}.{rest}"]
    ours.load_state_dict(made)
    image = torch.randn(1, 3, 80, 80)  # 20, 10, 5 and 3 cells; windows of 4
    with torch.no_grad():
        tokens = ours.front(image)
        for stage, cells in ((1, 20), (2, 10), (3, 5)):
            tokens = ours.step(stage, tokens, cells)
        wanted = theirs.features(image).flatten(1, 2)
    torch.testing.assert_close(tokens, wanted, atol=1e-5, rtol=1e-5)


def test_the_resnet_is_torchvisions() -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1]).eval()
    ours = ResNetTrunk(ResNetSize(layers=(1, 1, 1, 1))).eval()
    names = {"conv1.": "layer1.0.", "bn1.": "layer1.1.", "layer1.": "layer1.4."}
    made = {}
    for name, value in theirs.state_dict().items():
        start = next((old for old in names if name.startswith(old)), None)
        made[name if start is None else names[start] + name[len(start) :]] = value
    ours.load_state_dict({name: made[name] for name in ours.state_dict()})
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = ours.front(image)
        for stage, cells in ((1, 16), (2, 8), (3, 4)):
            tokens = ours.step(stage, tokens, cells)
        features = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        for layer in (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4):
            features = layer(features)
    torch.testing.assert_close(tokens, features.flatten(2).mT)


def test_what_trains_is_what_the_authors_train() -> None:
    with torch.device("meta"):
        network = load("dmmi").variant("swin").build()
    still = {name for name, value in network.named_parameters() if not value.requires_grad}
    prefix = "bert.network."
    assert all(name.startswith(prefix) for name in still)
    layers = {name.split(".")[4] for name in still if name.startswith(f"{prefix}encoder.layer.")}
    assert layers == {"10", "11"}
    assert any(name.startswith(f"{prefix}embeddings.") for name in still)
    network.train()
    assert isinstance(network, Dmmi)
    assert not any(module.training for module in network.bert.modules())


def test_similarity_by_hand() -> None:
    # Cosines 1 and 0 on two real words, 1 on a pad that does not count; then a sentence without
    # a target, which counts nothing: 1 - (0.5 + 0) / 2.
    refined = torch.tensor([[[1.0, 0], [1, 0], [1, 0]]]).expand(2, 3, 2)
    rebuilt = torch.tensor([[[2.0, 0], [0, 3], [1, 0]]]).expand(2, 3, 2)
    mask = torch.tensor([[True, True, False]]).expand(2, 3)
    loss = similarity_loss(refined, rebuilt, mask, torch.tensor([True, False]))
    assert float(loss) == pytest.approx(1 - 0.25)


def test_contrast_by_hand() -> None:
    # Orthogonal pairs: scores 1 on the diagonal, 0 beside it, over 0.05: twice log(1 + exp(-20)).
    image = torch.tensor([[2.0, 0], [0, 2]])
    present = torch.tensor([True, True])
    assert float(contrastive_loss(image, image, present)) == pytest.approx(0, abs=1e-6)
    wrong = contrastive_loss(image, image.flip(0), present)
    assert float(wrong) == pytest.approx(40, abs=1e-4)
    half = contrastive_loss(image, image.flip(0), torch.tensor([True, False]))
    assert float(half) == pytest.approx(20, abs=1e-4)


def test_runs_of_nouns_are_found_and_one_is_erased() -> None:
    sentence = "the man in a baseball cap"
    assert noun_runs(sentence, longest=19) == ((1,), (4, 5))
    ids = np.arange(100, 120, dtype=np.int32)[None]
    seen = set()
    for seed in range(8):
        erased = erase_nouns(ids, [sentence], seed=seed)
        seen.add(tuple(np.flatnonzero(erased[0] == 0)))
        assert (erased == erase_nouns(ids, [sentence], seed=seed)).all()
    assert seen == {(2,), (5, 6)}  # behind the start token
    assert (erase_nouns(ids, ["over there"], seed=0) == ids).all()
    assert noun_runs(sentence, longest=5) == ((1,), (4,))


def test_the_losses_of_training_reach_their_branches(tiny: Dmmi) -> None:
    torch.manual_seed(0)
    count, side = 3, tiny.image.size
    ids = torch.randint(1000, 2000, (count, 20), dtype=torch.int32)
    values = {
        "pixels": torch.randint(0, 255, (1, side, side, 3), dtype=torch.uint8),
        "valid_box": torch.tensor([[0, 0, side, side]], dtype=torch.int32),
        "token_ids": ids,
        "token_mask": torch.ones(count, 20, dtype=torch.bool),
        "erased_ids": ids.where(ids > 1300, 0),
    }
    tiny.train()
    index = torch.zeros(count, dtype=torch.int64)
    outputs, losses = tiny.training_run(values, index, present=torch.ones(count, dtype=torch.bool))
    assert set(losses) == {"similarity", "contrastive"}
    torch.autograd.backward(outputs.logits.mean() + sum(losses.values()))
    missing = {name for name, value in tiny.named_parameters() if value.grad is None}
    # Of a Swin only what the words gave is read after the last stage, not the gated sum.
    assert missing == {f"exchanges.3.res_gate.{layer}.weight" for layer in (0, 2)}
    tiny.zero_grad()
    tiny.eval()
