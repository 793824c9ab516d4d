from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rt_ris.spec import Dependency
from rt_ris_kernels.ops.masked_mutual_attention import masked_mutual_attention as reference
from rt_ris_train.architecture import Batch, ReferringNetwork, load
from rt_ris_train.architectures.maris import Maris, MarisConfig
from rt_ris_train.blocks.mutual_attention import Settings, masked_mutual_attention


@pytest.fixture(scope="module")
def tiny() -> ReferringNetwork:
    return load("maris").variant("tiny").build().eval()


def batch_for(network: ReferringNetwork, *, lengths: tuple[int, ...] = (4, 7, 3)) -> Batch:
    side, length = network.image.size, network.text.length
    generator = torch.Generator().manual_seed(3)
    counts = torch.tensor(lengths)
    return Batch(
        pixels=torch.randint(0, 256, (2, side, side, 3), generator=generator).to(torch.uint8),
        valid_box=torch.tensor([[0, 0, side, side], [0, 0, side // 2, side]]).int(),
        token_ids=torch.randint(1, 900, (len(lengths), length), generator=generator).int(),
        token_mask=torch.arange(length)[None] < counts[:, None],
        image_index=torch.tensor([0, 1, 1][: len(lengths)]),
    )


def test_what_depends_on_the_picture_and_what_on_the_sentence(tiny: ReferringNetwork) -> None:
    graph = tiny.graph()
    assert [spec.id for spec in graph.of(Dependency.IMAGE)] == ["image_encoder"]
    assert [spec.id for spec in graph.of(Dependency.TEXT)] == ["text_encoder"]
    assert [spec.name for spec in graph.held(Dependency.IMAGE)] == ["z_v"]


def test_a_published_picture_is_two_megabytes_in_half_precision() -> None:
    with torch.device("meta"):
        network = build_on_meta("vit_b")
    (cached,) = network.graph().held(Dependency.IMAGE)
    assert cached.shape == (1, 4096, 256)


def build_on_meta(size: str) -> Maris:
    from rt_ris_train.architectures.maris import build_sam

    return build_sam(size=size)


@pytest.mark.parametrize("size", ["vit_b", "vit_l", "vit_h"])
def test_the_head_has_the_parameters_of_the_sheet(size: str) -> None:
    # FE 3.28 M (ViT-B) to 3.67 M (ViT-H), mutual attention 0.33 M, decoder 1.89 M.
    with torch.device("meta"):
        network = build_on_meta(size)
    counted = sum(value.numel() for value in network.parameters() if value.requires_grad) / 1e6
    assert counted == pytest.approx({"vit_b": 5.50, "vit_l": 5.70, "vit_h": 5.89}[size], abs=0.02)


def test_logits_have_four_times_the_grid(tiny: ReferringNetwork) -> None:
    with torch.no_grad():
        outputs = tiny(batch_for(tiny))
    assert outputs.logits.shape == (3, tiny.mask.size, tiny.mask.size)
    assert outputs.existence is None
    assert torch.isfinite(outputs.logits).all()


def test_padding_tokens_change_nothing(tiny: ReferringNetwork) -> None:
    batch = batch_for(tiny)
    other = torch.where(batch.token_mask, batch.token_ids, 777).int()
    with torch.no_grad():
        first = tiny(batch).logits
        second = tiny(replace(batch, token_ids=other)).logits
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_sentences_do_not_see_each_other(tiny: ReferringNetwork) -> None:
    batch = batch_for(tiny)
    alone = replace(
        batch,
        token_ids=batch.token_ids[1:2],
        token_mask=batch.token_mask[1:2],
        image_index=batch.image_index[1:2],
    )
    with torch.no_grad():
        torch.testing.assert_close(
            tiny(batch).logits[1:2], tiny(alone).logits, rtol=1e-4, atol=1e-5
        )


def norms(width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, zero = torch.ones(width), torch.zeros(width)
    return one, zero, one, zero


def test_a_pixel_without_a_relevant_word_attends_to_nothing() -> None:
    torch.manual_seed(0)
    z_v, z_l = torch.rand(1, 5, 8), -torch.rand(2, 3, 8)  # every score is negative
    pixels, words = masked_mutual_attention(
        z_v,
        z_l,
        word_mask=torch.ones(2, 3),
        norms=norms(8),
        settings=Settings(threshold=0.5, scale=1.0, normalize=False),
    )
    expected = torch.nn.functional.layer_norm(z_v, (8,)).expand(2, -1, -1)
    torch.testing.assert_close(pixels, expected)
    torch.testing.assert_close(words, torch.nn.functional.layer_norm(z_l, (8,)))


def test_mutual_attention_equals_the_equations_written_out() -> None:
    torch.manual_seed(0)
    z_v, z_l = torch.randn(2, 6, 8), torch.randn(2, 4, 8)
    word_mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    pixels, words = masked_mutual_attention(
        z_v,
        z_l,
        word_mask=word_mask,
        norms=norms(8),
        settings=Settings(threshold=0.6, scale=0.5, normalize=False),
    )
    for n in range(2):
        weights = torch.zeros(6, 4)
        for p in range(6):
            scores = {
                word: float(z_v[n, p] @ z_l[n, word]) * 0.5
                for word in range(4)
                if word_mask[n, word] and torch.sigmoid(z_v[n, p] @ z_l[n, word] * 0.5) >= 0.6
            }
            total = sum(torch.tensor(score).exp() for score in scores.values())
            for word, score in scores.items():
                weights[p, word] = torch.tensor(score).exp() / total
        seen = torch.nn.functional.layer_norm(weights @ z_l[n] + z_v[n], (8,))
        read = torch.nn.functional.layer_norm(weights.T @ z_v[n] + z_l[n], (8,))
        torch.testing.assert_close(pixels[n], seen, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(words[n], read, rtol=1e-4, atol=1e-5)


def test_normalized_words_are_means_of_pixels() -> None:
    z_v = torch.full((1, 7, 8), 2.0)
    z_l = torch.rand(1, 2, 8)
    _, words = masked_mutual_attention(
        z_v,
        z_l,
        word_mask=torch.ones(1, 2),
        norms=norms(8),
        settings=Settings(threshold=0.5, scale=1.0, normalize=True),
    )
    torch.testing.assert_close(
        words, torch.nn.functional.layer_norm(2.0 + z_l, (8,)), rtol=1e-3, atol=1e-3
    )


def test_settled_choices_are_fields() -> None:
    config = MarisConfig(taps=(8, 8, 8), word_width=8, cells=4)
    assert config.lga == "transpose"
    assert not config.scaled
    assert config.threshold == 0.5
    assert (config.coordinates, config.edge_channels, config.existence) == (False, 0, False)


def test_frozen_parts_stay_in_evaluation_mode(tiny: ReferringNetwork) -> None:
    assert isinstance(tiny, Maris)
    tiny.train()
    assert not tiny.image_stage.encoder.training
    assert tiny.image_stage.enhance.training
    tiny.eval()


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shared", [False, True], ids=["separate pixels", "shared pixels"])
def test_pytorch_and_the_kernel_s_reference_agree(*, normalize: bool, shared: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    z_v = torch.randn(1 if shared else 3, 40, 16, generator=generator)
    z_l = torch.randn(3, 6, 16, generator=generator)
    word_mask = (torch.arange(6)[None] < torch.tensor([[6], [3], [1]])).float()
    affine = torch.randn(4, 16, generator=generator).unbind()
    found = masked_mutual_attention(
        z_v,
        z_l,
        word_mask=word_mask,
        norms=affine,  # type: ignore[arg-type]
        settings=Settings(threshold=0.7, scale=0.5, normalize=normalize),
    )
    gamma_v, beta_v, gamma_l, beta_l = (value.numpy() for value in affine)
    expected = reference(
        z_v.numpy(),
        z_l.numpy(),
        word_mask=word_mask.numpy(),
        gamma_v=gamma_v,
        beta_v=beta_v,
        gamma_l=gamma_l,
        beta_l=beta_l,
        threshold=0.7,
        scale=0.5,
        normalize=int(normalize),
    )
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)
