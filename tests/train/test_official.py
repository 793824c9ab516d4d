from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rt_ris.errors import CheckpointError
from rt_ris_train.architecture import ReferringNetwork, load
from rt_ris_train.containers import read_tree, tensors_of
from rt_ris_train.official import check_complete, load_official, named_files


@pytest.fixture(scope="module")
def tiny() -> ReferringNetwork:
    return load("maris").variant("tiny").build()


def released(network: ReferringNetwork, label: str, *, seed: int) -> dict[str, Tensor]:
    """Seeded random tensors under the published names and shapes, with tensors nobody uses."""
    generator = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    wanted = network.official_keys()[label]
    tensors = {
        name: torch.randn(state[own].shape, generator=generator)
        for own, name in wanted.keys.items()
    }
    return tensors | {f"{prefix}extra": torch.zeros(1) for prefix in wanted.unused}


@pytest.mark.parametrize("label", ["sam", "clip"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_a_published_file_fills_its_encoder(
    tiny: ReferringNetwork, tmp_path: Path, *, label: str, suffix: str, wrapped: bool
) -> None:
    tensors = released(tiny, label, seed=1)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, path)
    else:
        inner = {f"module.{name}": tensor for name, tensor in tensors.items()}
        torch.save({"state_dict": inner} if wrapped else tensors, path)
    (imported,) = load_official(tiny, {label: path})
    state = tiny.state_dict()
    for own, name in tiny.official_keys()[label].keys.items():
        torch.testing.assert_close(state[own], tensors[name])
    assert imported.taken == len(tiny.official_keys()[label].keys)
    assert sum(imported.dropped.values()) == len(tiny.official_keys()[label].unused)


def test_missing_and_unknown_names_are_said_with_the_nearest(
    tiny: ReferringNetwork, tmp_path: Path
) -> None:
    tensors = released(tiny, "clip", seed=1)
    tensors["ln_finale.weight"] = tensors.pop("ln_final.weight")
    path = tmp_path / "clip.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError) as raised:
        load_official(tiny, {"clip": path})
    assert "missing: ln_final.weight (found: ln_finale.weight)" in str(raised.value)
    assert "ln_finale.weight (nearest expected: ln_final.weight)" in str(raised.value)


def test_another_variant_is_refused_by_shape(tiny: ReferringNetwork, tmp_path: Path) -> None:
    tensors = released(tiny, "sam", seed=1)
    tensors["image_encoder.pos_embed"] = torch.zeros(1, 64, 64, 768)
    path = tmp_path / "sam.pth"
    torch.save(tensors, path)
    with pytest.raises(CheckpointError, match=r"pos_embed is \(1, 64, 64, 768\), expected"):
        load_official(tiny, {"sam": path})


class Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("this must never run",)


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "hostile.pth"
    torch.save({"weight": Hostile()}, path)
    with pytest.raises(CheckpointError, match="nothing in a file is run"):
        tensors_of(read_tree(path), path)
    assert "must never run" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [b"", b"not weights at all"])
def test_a_damaged_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be read as plain tensors"):
        tensors_of(read_tree(path), path)


def test_a_published_size_is_not_used_with_random_encoders(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = load("maris").variant("vit_b").build()
    with pytest.raises(CheckpointError, match="--weights sam=FILE --weights clip=FILE"):
        check_complete(network, {}, published=True)
    with pytest.raises(CheckpointError, match="--weights clip=FILE"):
        check_complete(network, {"sam": tmp_path / "sam.pth"}, published=True)
    check_complete(network, {}, published=False)


def test_unknown_labels_and_missing_files(tiny: ReferringNetwork, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="it takes sam, clip"):
        load_official(tiny, {"swin": tmp_path / "x.pth"})
    with pytest.raises(CheckpointError, match="no weight file"):
        load_official(tiny, {"sam": tmp_path / "x.pth"})
    with pytest.raises(CheckpointError, match="LABEL=FILE"):
        named_files(["sam_vit_b.pth"])
