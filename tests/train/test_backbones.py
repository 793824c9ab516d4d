from __future__ import annotations

from functools import partial

import open_clip
import pytest
import torch
from segment_anything.modeling.image_encoder import ImageEncoderViT
from tokenizers import Tokenizer
from torch import nn
from transformers import BertModel

from rt_ris_train.backbones import clip_text, efficientnet_lite, minilm, sam
from rt_ris_train.backbones.sam_sizes import SamSize


@pytest.mark.parametrize(
    "sentence",
    [
        "The man in red!",
        "it's a dog's 3rd ball",
        "an emoji \N{GRINNING FACE} in a na\u00efve caf\u00e9",
        "second   apple from the left",
        "\u4e2d\u6587 don't 12345",
        "a photo-like thing (left)\u2026",
    ],
)
def test_clip_ids_equal_open_clip(sentence: str) -> None:
    ours = Tokenizer.from_str(clip_text.tokenizer_json()).encode(sentence).ids
    plain = " ".join(sentence.split()).lower()
    theirs = open_clip.SimpleTokenizer().encode(plain)
    assert ours == [clip_text.START, *theirs, clip_text.END]


def test_clip_words_equal_open_clip() -> None:
    size = clip_text.ClipTextSize(width=64, heads=1, layers=2)
    ours = clip_text.ClipText(size, length=24).eval()
    theirs = open_clip.model.TextTransformer(
        context_length=77,
        width=64,
        heads=1,
        layers=2,
        output_dim=64,
        act_layer=open_clip.model.QuickGELU,
        output_tokens=True,
    ).eval()
    missing, unknown = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert (missing, unknown) == (["text_projection"], [])
    ids = torch.zeros(2, 77).long()
    ids[:, :5] = torch.tensor([[49406, 11, 12, 13, 49407], [49406, 7, 49407, 0, 0]])
    with torch.no_grad():
        _, words = theirs(ids)
        found = ours(ids[:, :24].int())
    torch.testing.assert_close(found[:, :3], words[:, :3], rtol=1e-4, atol=1e-5)


def test_the_clip_sentence_equals_open_clip() -> None:
    size = clip_text.ClipTextSize(width=64, heads=1, layers=2)
    ours = clip_text.ClipText(size, length=8, projection=32).eval()
    theirs = open_clip.model.TextTransformer(
        context_length=77,
        width=64,
        heads=1,
        layers=2,
        output_dim=32,
        act_layer=open_clip.model.QuickGELU,
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ids = torch.zeros(2, 77).long()
    ids[:, :5] = torch.tensor([[49406, 11, 12, 13, 49407], [49406, 7, 49407, 0, 0]])
    short = ids[:, :8].int()
    with torch.no_grad():
        found = ours.sentence(ours(short), short)
        torch.testing.assert_close(found, theirs(ids), rtol=1e-4, atol=1e-5)


def test_sam_taps_are_segment_anythings_with_windows_that_need_padding() -> None:
    size = SamSize(width=32, depth=6, heads=2, global_blocks=(1, 2, 4, 5), image_size=128, window=3)
    assert size.cells % size.window
    encoder = sam.SamEncoder(size).eval()
    theirs = ImageEncoderViT(
        img_size=size.image_size,
        embed_dim=size.width,
        depth=size.depth,
        num_heads=size.heads,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=size.window,
        global_attn_indexes=size.global_blocks,
    ).eval()
    for name, value in theirs.named_parameters():
        if "rel_pos" in name or name == "pos_embed":
            nn.init.normal_(value, std=0.2)
    state = theirs.state_dict()
    keys = sam.official_file(encoder, "").keys
    released = {f"image_encoder.{name}": value for name, value in state.items()}
    encoder.load_state_dict({own: released[name] for own, name in keys.items()})
    seen: list[torch.Tensor] = []
    for index in size.global_blocks[1:]:
        theirs.blocks[index].register_forward_hook(lambda _, __, output: seen.append(output))
    image = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        taps = encoder(image)
        theirs(image)
    for tap, output in zip(taps, seen, strict=True):
        torch.testing.assert_close(tap, output)


def test_minilm_equals_transformers_with_the_packaged_weights() -> None:
    encoder = minilm.MiniLm().eval()
    minilm.load_packaged(encoder)
    reference = BertModel.from_pretrained(
        minilm._folder(), attn_implementation="eager", local_files_only=True
    ).eval()
    tokenizer = Tokenizer.from_str(minilm.tokenizer_json())
    encoded = [tokenizer.encode(text).ids for text in ("the red bus on the left", "a cat")]
    ids = torch.zeros(2, 16).int()
    mask = torch.zeros(2, 16).bool()
    for row, tokens in enumerate(encoded):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        mask[row, : len(tokens)] = True
    with torch.no_grad():
        found = encoder(ids, mask)
        wanted = reference(input_ids=ids.long(), attention_mask=mask.long()).last_hidden_state
    for row, tokens in enumerate(encoded):
        torch.testing.assert_close(
            found[row, : len(tokens)], wanted[row, : len(tokens)], rtol=1e-4, atol=1e-5
        )


def test_efficientnet_sees_an_espresso() -> None:
    """The packaged weights stand in timm's order: a classifier made of them knows its classes."""
    import timm
    from skimage import data

    released = list(torch.load(efficientnet_lite.packaged_file(), weights_only=True).values())
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    network.load_state_dict(dict(zip(network.state_dict(), released, strict=True)))
    coffee = torch.tensor(data.coffee().copy()).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate((coffee - 127) / 128, size=(224, 336), mode="bilinear")
    with torch.no_grad():
        probability = network(image[..., 56:280]).softmax(-1)[0]
    espresso = 967
    assert int(probability.argmax()) == espresso
    encoder = efficientnet_lite.EfficientNetLite0(strides=(8, 16, 32)).eval()
    efficientnet_lite.load_packaged(encoder)
    with torch.no_grad():
        levels = encoder(image)
    assert [level.shape[-1] for level in levels] == [40, 112, 320]
