"""What the launcher checks before a launch, with a recorder in the driver's place."""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rt_ris.errors import IntegrityError, ShapeError, TargetMismatchError
from rt_ris_kernels.arguments import Arguments
from rt_ris_kernels.arrays import DeviceArray, device_array
from rt_ris_kernels.binary import BINARIES, NAME, load_binary
from rt_ris_kernels.geometry import MAX_BLOCKS, Launch, geometry, workspace_bound
from rt_ris_kernels.launch import MaskedMutualAttentionLauncher

N, P, L, C = 2, 70, 9, 128
SHAPES = {
    "z_v": (1, P, C),
    "z_l": (N, L, C),
    "word_mask": (N, L),
    "gamma_v": (C,),
    "beta_v": (C,),
    "gamma_l": (C,),
    "beta_l": (C,),
    "f_lav": (N, P, C),
    "f_val": (N, L, C),
}
OUTPUTS = ("f_lav", "f_val")


@dataclass
class Recorder:
    """A driver that launches nothing and notes what it was asked."""

    capability: int = 90
    cuda: int = 13000
    device_of: int = 0
    stream_device: int = 0
    launched: list[tuple[Launch, Arguments, bool]] = field(default_factory=list)
    room: dict[str, int] = field(default_factory=dict)

    def cuda_version(self) -> int:
        return self.cuda

    def compute_capability(self, device: int) -> int:
        return self.capability

    def multiprocessors(self, device: int) -> int:
        return 132

    def current_device(self) -> int:
        return self.device_of

    def device_of_pointer(self, pointer: int, *, name: str) -> int:
        return self.device_of

    def device_of_stream(self, stream: int) -> int:
        return self.stream_device

    def load(self, code: bytes, *, device: int) -> object:
        return code

    def kernel(self, library: object, name: str, *, device: int, shared_bytes: int) -> object:
        self.room[name] = shared_bytes
        return name

    def launch(
        self, kernel: object, launch: Launch, *, arguments: int, stream: int, dependent: bool
    ) -> None:
        assert kernel == launch.kernel
        assert launch.shared_bytes <= self.room[launch.kernel]
        copied = Arguments.from_buffer_copy(
            ctypes.cast(arguments, ctypes.POINTER(Arguments)).contents
        )
        self.launched.append((launch, copied, dependent))


class Foreign:
    """An array of another library in GPU memory, as pycuda, CuPy or torch describe theirs."""

    def __init__(self, shape: tuple[int, ...], typestr: str = "<f2", **changed: Any) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": typestr,
            "data": (0x7F0000000000, False),
            "version": 3,
            **changed,
        }


def call(launcher: MaskedMutualAttentionLauncher, **changed: Any) -> None:
    arrays = {name: Foreign(shape) for name, shape in SHAPES.items()}
    arrays.update({name: changed.pop(name) for name in list(changed) if name in SHAPES})
    given: dict[str, Any] = {
        "workspace": Foreign((1 << 20,), "<f4"),
        "stream": 7,
        **changed,
    }
    inputs = [array for name, array in arrays.items() if name not in OUTPUTS]
    launcher.launch(inputs, [arrays[name] for name in OUTPUTS], **given)


def test_two_launches_with_the_given_pointers_and_attributes() -> None:
    driver = Recorder()
    launcher = MaskedMutualAttentionLauncher(driver=driver)
    call(launcher, attributes={"threshold": 0.75, "normalize": 1})
    (forward, arguments, first), (reduce, again, second) = driver.launched
    assert (forward.kernel, reduce.kernel) == ("forward_f16_c128_w32_p32", "reduce_f16_c128")
    assert forward.grid == (3, N)
    assert reduce.grid == (L, N)
    assert bytes(arguments) == bytes(again)
    assert (arguments.pixels, arguments.words, arguments.splits) == (P, L, 3)
    assert (arguments.tiles_per_block, arguments.longer_blocks) == (1, 0)
    assert arguments.threshold == pytest.approx(np.log(3.0))
    assert (arguments.z_v_step, arguments.normalize) == (0, 1)
    assert arguments.masses - arguments.sums == 4 * N * 3 * L * C
    assert (first, second) == (False, True)


def test_separate_pixels_have_a_step_and_older_gpus_no_dependent_launch() -> None:
    driver = Recorder(capability=87)
    call(MaskedMutualAttentionLauncher(driver=driver), z_v=Foreign((N, P, C)))
    assert driver.launched[0][1].z_v_step == P * C
    assert [dependent for *_, dependent in driver.launched] == [False, False]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"z_l": Foreign(SHAPES["z_l"], "<f4")}, "'z_l' is float32 and 'z_v' is float16"),
        ({"f_val": Foreign(SHAPES["f_val"], "<f8")}, "'f_val' is float64 and 'z_v' is float16"),
        ({"z_v": Foreign((1, P, C), strides=(2, 2, 2 * P))}, "'z_v' has shape .* contiguous"),
        ({"f_lav": Foreign((N, P, C), data=(0x7F0000000000, True))}, "'f_lav' is read-only"),
        ({"z_v": Foreign((1, P, C), data=(0x7F0000000008, False))}, "multiples of 16"),
        (
            {"z_l": Foreign((N, 0, C)), "word_mask": Foreign((N, 0)), "f_val": Foreign((N, 0, C))},
            "L=0",
        ),
        ({"z_v": Foreign((1, 0, C)), "f_lav": Foreign((N, 0, C))}, "at least 1"),
        (
            {
                "z_l": Foreign((N, 81, C)),
                "word_mask": Foreign((N, 81)),
                "f_val": Foreign((N, 81, C)),
            },
            "L=81 words; they take 1 to 80",
        ),
        ({"gamma_v": Foreign((C + 1,))}, "'gamma_v' as"),
        ({"f_lav": Foreign((1, P, C))}, "'f_lav' as"),
        ({"workspace": Foreign((16,), "<f4")}, "'workspace' is float32 of 64 bytes; .* is needed"),
        ({"workspace": [0.0]}, "'workspace' is list; an array in GPU memory is needed"),
    ],
)
def test_a_wrong_array_is_named_before_anything_is_launched(
    changed: dict[str, Any], sentence: str
) -> None:
    driver = Recorder()
    with pytest.raises(ShapeError, match=sentence):
        call(MaskedMutualAttentionLauncher(driver=driver), **changed)
    assert not driver.launched


def test_the_launcher_is_of_the_current_gpu_unless_another_is_named() -> None:
    driver = Recorder(device_of=3, stream_device=3)
    assert MaskedMutualAttentionLauncher(driver=driver).device == 3
    assert MaskedMutualAttentionLauncher(0, driver=driver).device == 0


def test_memory_and_streams_of_another_gpu_are_refused() -> None:
    for driver, sentence in (
        (Recorder(device_of=1), "'z_v' is on GPU 1; this launcher is of 0"),
        (Recorder(stream_device=1), "Stream 0x7 belongs to GPU 1"),
    ):
        with pytest.raises(ShapeError, match=sentence):
            call(MaskedMutualAttentionLauncher(0, driver=driver))
        assert not driver.launched


def test_an_older_gpu_is_refused_with_the_way_out() -> None:
    with pytest.raises(
        TargetMismatchError, match=r"7\.5; the kernels need 8\.0.*standard-operator"
    ):
        MaskedMutualAttentionLauncher(driver=Recorder(capability=75))


def test_a_missing_array_is_counted() -> None:
    launcher = MaskedMutualAttentionLauncher(driver=Recorder())
    with pytest.raises(ShapeError, match="got 1 inputs and 0 outputs; they take 7 and 2"):
        launcher.launch([Foreign((1,))], [], workspace=Foreign((1,), "<f4"), stream=0)


@pytest.mark.parametrize("multiprocessors", [8, 16, 128, 132, 148, 170])
@pytest.mark.parametrize("expressions", [1, 3, 16, 1000])
@pytest.mark.parametrize("words", [1, 25, 33, 80])
def test_workspace_stays_within_its_bound(
    multiprocessors: int, expressions: int, words: int
) -> None:
    for pixels in (1, 31, 4096, 20_000):
        plan = geometry(
            expressions=expressions,
            pixels=pixels,
            words=words,
            channels=256,
            dtype="float16",
            multiprocessors=multiprocessors,
        )
        bound = workspace_bound(expressions=expressions, words=words, channels=256)
        assert plan.workspace_bytes <= bound
        assert 1 <= plan.splits <= plan.tiles
        assert plan.splits * expressions <= max(MAX_BLOCKS, expressions)
        assert plan.reduce.threads % 32 == 0
        assert 256 <= plan.reduce.threads <= 512
        assert plan.forward.shared_bytes <= 99 * 1024, "the least limit of a supported GPU"


def copy_of_binary(folder: Path, **changed: Any) -> Path:
    facts = json.loads((BINARIES / f"{NAME}.json").read_text())
    (folder / f"{NAME}.json").write_text(json.dumps({**facts, **changed}))
    for path in BINARIES.iterdir():
        if path.suffix != ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_a_binary_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetMismatchError, match="interface 999; this rt-ris launches interface"):
        load_binary(copy_of_binary(tmp_path, interface=999))


@pytest.mark.parametrize("name", [f"{NAME}.fatbin", f"{NAME}.cuda12.sm_87.cubin"])
@pytest.mark.parametrize("at", [0, 1000, -1])
def test_a_changed_binary_is_refused(tmp_path: Path, at: int, name: str) -> None:
    path = copy_of_binary(tmp_path) / name
    code = bytearray(path.read_bytes())
    code[at] ^= 1
    path.write_bytes(code)
    with pytest.raises(IntegrityError, match="other bytes than its record says"):
        load_binary(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "text", "keys"])
def test_a_binary_without_its_record_is_refused(tmp_path: Path, damage: str) -> None:
    path = copy_of_binary(tmp_path) / f"{NAME}.json"
    if damage == "missing":
        path.unlink()
    else:
        path.write_text("no JSON" if damage == "text" else "{}")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_binary(tmp_path)


def test_jetpack_6_gets_code_that_its_driver_loads() -> None:
    binary = load_binary()
    assert set(binary.for_cuda_12) == {87}
    assert binary.code_for(capability=87, cuda=13000) == binary.code
    older = MaskedMutualAttentionLauncher(0, driver=Recorder(capability=87, cuda=12060))
    assert older._library == binary.for_cuda_12[87]
    for capability, cuda in ((87, 12020), (89, 12080)):
        recorder = Recorder(capability=capability, cuda=cuda)
        said = f"driver has CUDA 12.{cuda % 1000 // 10}; the kernels need one of CUDA 13, or on"
        with pytest.raises(TargetMismatchError, match=said):
            MaskedMutualAttentionLauncher(0, driver=recorder)


def test_arrays_are_read_by_dlpack_too() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(ShapeError, match=r"kind 1 \(DLPack\); the kernels read GPU memory"):
        device_array(torch.zeros(3), name="z_v")

    class OnGpu:
        """A CPU tensor that claims to lie on a GPU: its capsule is read, its memory is not."""

        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 0)

        def __dlpack__(self) -> object:
            return self.tensor.__dlpack__()

    tensor = torch.zeros(2, 5, dtype=torch.float16)
    found = device_array(OnGpu(tensor[1:]), name="z_v")
    assert found == DeviceArray(pointer=tensor[1:].data_ptr(), shape=(1, 5), dtype="float16")
    assert found.nbytes == 10
    with pytest.raises(ShapeError, match="contiguous"):
        device_array(OnGpu(tensor.T), name="z_v")
    assert device_array(OnGpu(tensor.to(torch.bfloat16)), name="z_v").dtype == "bfloat16"
