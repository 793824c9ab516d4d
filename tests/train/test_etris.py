from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rt_ris_train.architecture import load
from rt_ris_train.architectures.etris import Etris
from rt_ris_train.backbones.clip_image import resize_matrix
from rt_ris_train.blocks.alignment import Gate, Projector
from rt_ris_train.blocks.attention import PackedAttention
from rt_ris_train.checkpoint import trained_state


@pytest.fixture(scope="module")
def tiny() -> Etris:
    network = load("etris").variant("tiny").build()
    assert isinstance(network, Etris)
    return network


def test_an_attention_to_one_token_is_a_gate() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(32, 8, batch_first=True)
    nn.init.normal_(attention.in_proj_bias)
    nn.init.normal_(attention.out_proj.bias)
    gate = Gate(32)
    gate.value.weight.data = attention.in_proj_weight.data[64:]
    gate.value.bias.data = attention.in_proj_bias.data[64:]
    gate.out = attention.out_proj
    image, sentence = torch.randn(2, 32, 5, 5), torch.randn(2, 32)
    pixels, token = image.flatten(2).transpose(1, 2), sentence[:, None]
    theirs = pixels * attention(pixels, token, token, need_weights=False)[0]
    ours = gate(image, sentence).flatten(2).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_packed_attention_is_pytorchs_with_its_own_weights() -> None:
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    ours = PackedAttention(width=32, heads=4)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 7, 32), torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    visible = torch.tensor([[True] * 5, [True, True, False, False, True]])
    wanted = theirs(query, key, value, key_padding_mask=~visible, need_weights=False)[0]
    torch.testing.assert_close(ours(query, key, value, visible=visible), wanted)


def test_the_kernel_of_a_sentence_is_a_grouped_convolution() -> None:
    torch.manual_seed(0)
    projector = Projector(width=32, sentence=24).eval()
    image, sentence = torch.randn(3, 32, 4, 4), torch.randn(3, 24)
    with torch.no_grad():
        ours = projector(image, sentence)
        fine, made = projector.vis(image), projector.txt(sentence)
        kernel, bias = made[:, :-1].reshape(3, 16, 3, 3), made[:, -1]
        theirs = functional.conv2d(fine.reshape(1, 48, 16, 16), kernel, bias, padding=1, groups=3)
    torch.testing.assert_close(ours, theirs[0], atol=1e-5, rtol=1e-5)


def test_positions_are_resized_as_by_interpolation() -> None:
    table = torch.randn(49, 8)
    grid = table.T.reshape(1, 8, 7, 7)
    wanted = functional.interpolate(grid, size=(13, 13), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(resize_matrix(7, 13) @ table, wanted, atol=1e-6, rtol=1e-5)


def test_only_positions_of_the_towers_train_and_moving_statistics_are_kept() -> None:
    with torch.device("meta"):
        network = load("etris").variant("r101").build()
    towers = ("visual.", "textual.")
    trained = [name for name, value in network.named_parameters() if value.requires_grad]
    assert {name for name in trained if name.startswith(towers)} == {
        "visual.network.attnpool.positional_embedding",
        "textual.positional_embedding",
    }
    kept = trained_state(network)
    # Frozen, but counted on in training, or drawn at random and in no file of CLIP's.
    assert "visual.network.layer3.0.bn1.running_mean" in kept
    assert "visual.network.attnpool.connect.0.weight" in kept
    assert "visual.network.layer3.0.conv1.weight" not in kept
    assert "textual.transformer.resblocks.0.ln_1.weight" not in kept


def test_the_bridger_sees_pads_and_the_decoder_does_not(tiny: Etris) -> None:
    ids = torch.zeros(1, 17, dtype=torch.int32)
    ids[0, :4] = torch.tensor([49406, 500, 600, 49407])
    front = tiny.visual.front(torch.randn(1, 3, 96, 96))
    with torch.no_grad():
        (words,) = tiny.text_stage(ids)
        moved = words.clone()
        moved[:, 10] += 1  # a pad
        fused = tiny.fusion_stage(front, words, ids)
        assert not torch.allclose(fused[0], tiny.fusion_stage(front, moved, ids)[0])
        f_q, f_w, f_s = fused
        hidden = f_w.clone()
        hidden[:, 10] += 1
        torch.testing.assert_close(
            tiny.decoder_stage(f_q, hidden, f_s, ids), tiny.decoder_stage(f_q, f_w, f_s, ids)
        )


def test_a_picture_serves_many_sentences(tiny: Etris) -> None:
    ids = torch.zeros(3, 17, dtype=torch.int32)
    ids[:, :3] = torch.tensor([[49406, 500, 49407], [49406, 700, 49407], [49406, 900, 49407]])
    front = tiny.visual.front(torch.randn(1, 3, 96, 96))
    with torch.no_grad():
        (words,) = tiny.text_stage(ids)
        together = tiny.fusion_stage(front, words, ids)[0]
        alone = [tiny.fusion_stage(front, words[n : n + 1], ids[n : n + 1])[0] for n in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert np.ptp(together.mean((1, 2, 3)).numpy()) > 0
