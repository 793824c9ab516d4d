"""The plugin's C++ library against the Python plugin: every callback, every launch, every byte.

It is compiled against a stand-in for TensorRT's headers and runs on a stand-in for the CUDA driver.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rt_ris.errors import BuildError, IntegrityError
from rt_ris_kernels import build, plugin, plugin_library
from rt_ris_kernels.arguments import Arguments
from rt_ris_kernels.binary import BINARIES, NAME, Binary, cuda_12_name
from rt_ris_kernels.geometry import CHANNELS, Launch
from rt_ris_kernels.launch import MaskedMutualAttentionLauncher
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION as SPEC
from rt_ris_kernels.simt import host_compiler

FAKES = Path(__file__).parents[1] / "fakes" / "plugin"
CUDA = plugin_library.packaged_cuda()
FLOAT32, FLOAT64, INT32, UNKNOWN = 1, 2, 5, 8
FLOAT, HALF, INT8 = 0, 1, 2
WORKSPACE, STREAM = 1 << 40, 77
POINTERS = [4096 * (index + 1) for index in range(9)]
Calls = Callable[..., list[str]]


def compile_fake(source: str, out: Path, *flags: str) -> None:
    command = [host_compiler(), "-std=c++17", "-Wall", "-Wextra", "-Werror", *flags]
    command += [f"-I{FAKES}", "-isystem", str(CUDA), str(FAKES / source), "-o", str(out), "-ldl"]
    subprocess.run(command, check=True)


@pytest.fixture(scope="module")
def calls(plugin_library: Path, tmp_path_factory: pytest.TempPathFactory) -> Calls:
    """Makes calls in one process and returns what was said, line by line."""
    folder = tmp_path_factory.mktemp("calls")
    compile_fake("calls.cpp", folder / "calls")
    size = ctypes.sizeof(Arguments)
    compile_fake(
        "libcuda.cpp", folder / "libcuda.so.1", "-shared", "-fPIC", f"-DARGUMENT_BYTES={size}"
    )
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_CUDA_CODE": str(BINARIES / f"{NAME}.fatbin"),
        "FAKE_CUDA_DEVICE": "0",
        "FAKE_CUDA_CAPABILITY": "90",
        "FAKE_CUDA_MULTIPROCESSORS": "132",
    }

    def run(*lines: str, driver: bool = True) -> list[str]:
        environment["LD_LIBRARY_PATH"] = str(folder if driver else folder / "nothing")
        done = subprocess.run(
            [str(folder / "calls"), str(plugin_library)],
            input="\n".join(lines),
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, (done.returncode, done.stdout[-500:], done.stderr)
        assert not done.stderr
        return done.stdout.splitlines()

    return run


class Recorder:
    """A driver that writes down launches as the other stand-in prints them."""

    def __init__(self, multiprocessors: int, capability: int) -> None:
        self._multiprocessors, self._capability = multiprocessors, capability
        self.lines: list[str] = []

    def current_device(self) -> int:
        return 0

    def cuda_version(self) -> int:
        return 13000

    def compute_capability(self, device: int) -> int:
        return self._capability

    def multiprocessors(self, device: int) -> int:
        return self._multiprocessors

    def load(self, code: bytes, *, device: int) -> object:
        return code

    def kernel(self, library: object, name: str, *, device: int, shared_bytes: int) -> object:
        return name

    def launch(
        self, kernel: object, launch: Launch, *, arguments: int, stream: int, dependent: bool
    ) -> None:
        packed = ctypes.string_at(arguments, ctypes.sizeof(Arguments)).hex()
        x, y = launch.grid
        self.lines.append(
            f"launch {launch.kernel} {x} {y} 1 {launch.threads} 1 1 {launch.shared_bytes} "
            f"{stream} {int(dependent)} {packed}"
        )


def create(**attributes: float) -> str:
    """A line that makes the plugin, as a plan with these attributes would."""
    given = {**SPEC.attributes, **attributes}
    kinds = {
        name: INT32 if isinstance(kind, int) else FLOAT32 for name, kind in SPEC.attributes.items()
    }
    return "create 1 " + " ".join(f"{name} {kinds[name]} 1 {given[name]}" for name in given)


def in_python(trt: Any, recorder: Recorder, **attributes: float) -> Any:
    """The Python plugin with these attributes, on a driver that writes down launches."""
    trt.REGISTRY.creators.clear()
    binary = Binary(code=b"", sha256="", architectures=(), for_cuda_12={})
    plugin.register(
        trt,
        open_launcher=lambda: MaskedMutualAttentionLauncher(
            driver=recorder,  # type: ignore[arg-type]
            binary=binary,
        ),
    )
    creator = trt.get_plugin_registry().get_creator(SPEC.op_type, plugin.VERSION, SPEC.domain)
    fields = plugin.Fields(trt, {**SPEC.attributes, **attributes})
    return creator.create_plugin("node", fields.collection, None).attach_to_context(None)


def enqueue(z_v: Sequence[int], z_l: Sequence[int], *, half: bool = True) -> str:
    kind = HALF if half else FLOAT
    sizes = " ".join(map(str, (*z_v, *z_l)))
    return f"enqueue {kind} {kind} {len(z_v)} {sizes} {WORKSPACE} {STREAM}"


def compare(
    calls: Calls,
    trt: Any,
    sizes: Sequence[tuple[int, int, int, int, bool, bool]],
    *,
    multiprocessors: int,
    capability: int = 90,
    **attributes: float,
) -> None:
    """Both plugins launch the same for (N, P, L, C, half, shared)."""
    recorder = Recorder(multiprocessors, capability)
    python = in_python(trt, recorder, **attributes)
    lines = [
        f"set FAKE_CUDA_MULTIPROCESSORS {multiprocessors}",
        f"set FAKE_CUDA_CAPABILITY {capability}",
        create(**attributes),
        "attach",
    ]
    for expressions, pixels, words, channels, half, shared in sizes:
        z_v = (1 if shared else expressions, pixels, channels)
        z_l = (expressions, words, channels)
        kind = trt.DataType.HALF if half else trt.DataType.FLOAT
        descs = [trt.desc(z_v, kind), trt.desc(z_l, kind)]
        python.enqueue(descs, None, POINTERS[:7], POINTERS[7:], WORKSPACE, STREAM)
        lines.append(enqueue(z_v, z_l, half=half))
    said = calls(*lines)
    assert said.count("enqueued 0") == len(sizes)
    found = [line for line in said if line.startswith("launch")]
    assert len(found) == 2 * len(sizes)
    assert found == recorder.lines


@pytest.mark.parametrize("multiprocessors", [1, 8, 16, 46, 84, 132, 148, 170, 400])
def test_both_launch_the_same(calls: Calls, trt: Any, multiprocessors: int) -> None:
    sizes = list(
        itertools.product(
            (1, 3, 16, 330),
            (1, 31, 32, 33, 900, 4096, 4097, 16384),
            (1, 17, 32, 33, 80),
            CHANNELS,
            (True, False),
            (True, False),
        )
    )
    compare(calls, trt, sizes, multiprocessors=multiprocessors)


def test_both_launch_the_same_for_every_number_of_words(calls: Calls, trt: Any) -> None:
    sizes = [
        (2, 4096, words, channels, half, True)
        for words in range(1, 81)
        for channels in CHANNELS
        for half in (True, False)
    ]
    compare(calls, trt, sizes, multiprocessors=132)


def test_the_largest_calls_are_the_same(calls: Calls, trt: Any) -> None:
    most = (2**31 - 1) // 256
    sizes = [(65535, 1, 80, 256, True, False), (1, most, 80, 256, False, True)]
    compare(calls, trt, sizes, multiprocessors=170)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_the_second_launch_overlaps_where_python_lets_it(
    calls: Calls, trt: Any, capability: int
) -> None:
    sizes = [(1, 4096, 25, 256, True, True)]
    compare(calls, trt, sizes, multiprocessors=20, capability=capability)


def test_attributes_reach_the_kernels_as_in_python(calls: Calls, trt: Any) -> None:
    thresholds = [0.0, 1.0, 0.5, 1e-7, 1 - 2**-24, *np.linspace(0.01, 0.99, 40)]
    for threshold in thresholds:
        given = {
            "threshold": float(np.float32(threshold)),
            "scale": 0.0625,
            "epsilon": 1e-6,
            "normalize": int(threshold > 0.5),
        }
        compare(calls, trt, [(1, 33, 7, 128, True, True)], multiprocessors=4, **given)


def test_name_fields_and_defaults_are_those_of_python(calls: Calls) -> None:
    said = calls("creator", "create 0", "core", "fields", "tactics")
    fields = [
        f"field {name} {INT32 if isinstance(value, int) else FLOAT32} 1 {bits(value)}"
        for name, value in SPEC.attributes.items()
    ]
    named = f"{SPEC.op_type} {plugin.VERSION} {SPEC.domain}"
    tactics = "outputs 2 tactics 0 limit 100 cache '' metadata 0"
    assert said == [f"creator {named}", *fields, "created 1", f"core {named} 1", *fields, tactics]


def bits(value: float) -> str:
    number = np.array([value], np.int32 if isinstance(value, int) else np.float32)
    return f"{number.view(np.uint32)[0]:08x}"


def test_fields_survive_serialising_cloning_and_attaching(calls: Calls, trt: Any) -> None:
    given: dict[str, float | int] = {
        "threshold": 0.75,
        "scale": -2.5,
        "epsilon": 1e-5,
        "normalize": 1,
    }
    said = calls(create(**given), "clone", "attach", "clone", "fields")
    python = in_python(trt, Recorder(1, 80), **given).get_fields_to_serialize()
    fields = [
        f"field {field.name} {field.type.value} 1 {field.data.view(np.uint32)[0]:08x}"
        for field in python
    ]
    assert said[-5:-1] == fields
    assert said[-1] == "unload"  # with the last plugin that uses them
    others = "create 1 plugin_version 6 1 1 threshold 1 1 0.75 unknown 8 5 0"
    assert calls(others, "fields")[:2] == ["created 1", "field threshold 1 1 3f400000"]


def test_types_shapes_and_workspace(calls: Calls, trt: Any) -> None:
    python = in_python(trt, Recorder(1, 80))
    cases = [(1, 1, 128), (16, 80, 256), (319, 25, 128), (320, 33, 256), (65535, 80, 256)]
    rooms = [python.get_workspace_size([None, trt.dynamic(case)], []) for case in cases]
    lines = [f"workspace {' '.join(map(str, case))}" for case in cases]
    said = calls(create(), "types 1 7", "types 0 7", "shapes 3", *lines)
    # a dimension of tensor i is 10 * i + its axis, counted from one
    shapes = python.get_output_shapes([[1, 2, 3], [11, 12, 13]], None, None)
    assert said[1:4] == [
        "types 0 1 1",
        "types 0 0 0",
        "shapes 0 " + " ".join(str(axis) for shape in shapes for axis in shape),
    ]
    assert said[4:] == [f"workspace {room}" for room in rooms]


def test_formats(calls: Calls, trt: Any) -> None:
    python = in_python(trt, Recorder(1, 80))
    kinds = {FLOAT: trt.DataType.FLOAT, HALF: trt.DataType.HALF, INT8: trt.DataType.INT8}
    formats = {0: trt.TensorFormat.LINEAR, 1: trt.TensorFormat.CHW2}
    wanted, lines = [], [create()]
    for at, first, own, layout in itertools.product(range(9), kinds, kinds, formats):
        tensors = [(first, 0)] * 9
        tensors[at] = (own if at else first, layout)
        lines.append(f"format {at} " + " ".join(f"{kind} {shape}" for kind, shape in tensors))
        described = [trt.dynamic((1, 2, 3), kinds[kind]) for kind, _ in tensors]
        for each, (_, shape) in zip(described, tensors, strict=True):
            each.desc.format = formats[shape]
        wanted.append(f"format {int(python.supports_format_combination(at, described, 7))}")
    assert calls(*lines)[1:] == wanted


def test_kernels_are_loaded_once_per_gpu_and_prepared_there(calls: Calls) -> None:
    small, large = enqueue((1, 32, 256), (1, 9, 256)), enqueue((1, 9999, 256), (1, 9, 256))
    said = calls(
        create(), "set FAKE_CUDA_DEVICE 3", "attach", "clone", small, large, small, large, "clone"
    )
    prepared = [line for line in said if line.startswith("attribute")]
    assert said[1] == "load the shipped code on 3"
    assert said.count(said[1]) == said.count("unload") == 1
    kernel = "attribute 8 of forward_f16_c256_w32_p32 is"  # 8: the most dynamic shared memory
    assert [line for line in prepared if "forward" in line] == [
        f"{kernel} 58880 on 3 with 3 current",
        f"{kernel} 75776 on 3 with 3 current",
    ]
    no_context = calls(create(), "set FAKE_CUDA_DEVICE none", small)
    assert no_context[1] == "load the shipped code on 0"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (enqueue((1, 9, 64), (1, 9, 64)), "got C=64 channels; kernels are compiled for C=128 and"),
        (enqueue((1, 9, 256), (1, 81, 256)), "got L=81 words; the kernels take 1 to 80"),
        (enqueue((1, 9, 256), (1, 0, 256)), "got L=0 words"),
        (enqueue((1, 0, 256), (1, 9, 256)), "got P=0 pixels"),
        (enqueue((1, 2**31, 256), (1, 9, 256)), "P * C up to 2147483647"),
        (enqueue((1, 9, 128), (0, 9, 128)), "got N=0 expressions"),
        (enqueue((1, 9, 128), (65536, 9, 128)), "got N=65536 expressions"),
        (enqueue((2, 9, 128), (3, 9, 128)), "contradict each other"),
        (enqueue((1, 9, 128), (1, 9, 256)), "contradict each other"),
        (enqueue((9, 128), (9, 128)), "got z_v with 2 axes"),
        (f"enqueue 2 2 3 1 9 256 1 9 256 {WORKSPACE} 0", "as types 2 and 2; both are float16"),
        (f"enqueue 1 0 3 1 9 256 1 9 256 {WORKSPACE} 0", "as types 1 and 0; both are float16"),
    ],
)
def test_a_call_without_a_kernel_is_an_error_before_the_driver(
    calls: Calls, line: str, problem: str
) -> None:
    said = calls(create(), line, driver=False)
    assert said[1].startswith(f"log 1 {SPEC.op_type}: ")
    assert problem in said[1]
    assert said[2:] == ["enqueued 1"]


def test_building_with_other_channels_or_counts_is_refused(calls: Calls) -> None:
    said = calls(create(), "configure -1 -1 64", "configure 1 4096 256", "types 1 6", "shapes 2")
    assert "has kernels for C=128 and C=256, not for C=64; build without the plugin" in said[1]
    assert said[2:4] == ["configure 1", "configure 0"]
    assert "got 6 inputs and 2 outputs; it has 7 and 2." in said[4]
    assert said[5].startswith("types 1 ")
    assert "takes z_v and z_l with three axes" in said[6]
    assert said[7].startswith("shapes 1")


@pytest.mark.parametrize(
    "field",
    [
        f"threshold {INT32} 1 1",
        f"threshold {FLOAT64} 1 0.5",
        f"threshold {FLOAT32} 2 0.5",
        f"threshold {FLOAT32} 0 0.5",
        f"threshold {FLOAT32} 1 none",
        f"normalize {FLOAT32} 1 1",
        f"epsilon {UNKNOWN} 4 0",
    ],
)
def test_a_field_of_another_kind_makes_no_plugin(calls: Calls, field: str) -> None:
    said = calls(f"create 0 {field}", "fields")
    assert f"got field '{field.split()[0]}' of PluginFieldType" in said[0]
    assert said[1:] == ["created 0", "no plugin"]


def test_no_fields_at_all_make_no_plugin(calls: Calls) -> None:
    assert calls("nothing") == [f"log 1 {SPEC.op_type}: got no fields.", "created 0"]


def test_without_a_driver_plans_are_built_and_nothing_runs(calls: Calls) -> None:
    said = calls(create(), "configure 1 9 256", "attach", driver=False)
    if "attached 1" in said:
        pytest.skip("this machine has a CUDA driver")
    assert said[:2] == ["created 1", "configure 0"]
    assert "found no CUDA driver" in said[2]
    assert said[3] == "attached 0"


@pytest.mark.parametrize(
    "function",
    [
        "cuInit",
        "cuDeviceGetAttribute",
        "cuDevicePrimaryCtxRetain",
        "cuLibraryLoadData",
        "cuLibraryGetKernel",
        "cuKernelSetAttribute",
        "cuLaunchKernelEx",
    ],
)
def test_what_the_driver_refuses_is_an_error_and_can_be_tried_again(
    calls: Calls, function: str
) -> None:
    call = enqueue((1, 9, 256), (1, 9, 256))
    said = calls(
        f"set FAKE_CUDA_REFUSES {function}", create(), call, "set FAKE_CUDA_REFUSES none", call
    )
    (refused,) = [line for line in said if line.startswith("log")]
    assert "CUDA refused" in refused
    assert "CUDA_ERROR_INVALID_VALUE" in refused
    assert [line for line in said if line.startswith("enq")] == ["enqueued 1", "enqueued 0"]


def test_the_driver_and_the_gpu_choose_the_code(calls: Calls) -> None:
    """A driver of CUDA 12.6 loads nothing of CUDA 13; for Orin there is code that it loads."""
    orin = "set FAKE_CUDA_CAPABILITY 87"
    older = f"set FAKE_CUDA_CODE {BINARIES / cuda_12_name(87)}"
    assert "load the shipped code on 0" in calls(orin, create(), "attach")
    said = calls(orin, "set FAKE_CUDA_VERSION 12060", older, create(), "attach")
    assert "load the shipped code on 0" in said
    for capability, cuda in ((87, 12020), (89, 12080)):
        said = calls(
            f"set FAKE_CUDA_CAPABILITY {capability}",
            f"set FAKE_CUDA_VERSION {cuda}",
            create(),
            "attach",
        )
        assert not any(line.startswith("load") for line in said)
        assert any(
            f"no code for compute capability 8.{capability % 10} and a driver of CUDA 12." in line
            for line in said
        )


def test_an_older_gpu_is_refused(calls: Calls) -> None:
    said = calls("set FAKE_CUDA_CAPABILITY 75", create(), "attach")
    assert "GPU 0 has compute capability 7.5; the kernels need 8.0 or later." in said[1]
    assert said[2] == "attached 0"


def test_a_second_build_writes_the_same_bytes_and_links_nothing(
    plugin_library: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "again.so"
    assert build.main(["--plugin", str(FAKES), "--cuda", str(CUDA), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: {out.stat().st_size} bytes\n"
    assert out.read_bytes() == plugin_library.read_bytes()
    assert (BINARIES / f"{NAME}.fatbin").read_bytes() in out.read_bytes()
    assert b"libnvinfer" not in out.read_bytes()
    assert [path.name for path in out.parent.iterdir()] == ["again.so"]


def refused(out: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a failed build says; it leaves nothing behind."""
    out.parent.mkdir(exist_ok=True)
    out.write_bytes(b"old")
    assert build.main(["--out", str(out), *options]) == BuildError.exit_code
    assert [path.read_bytes() for path in out.parent.iterdir()] == [b"old"]
    return capsys.readouterr().err


def test_missing_and_old_headers_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, headers = tmp_path / "out" / "a.so", tmp_path / "headers"
    headers.mkdir()
    said = refused(out, "--plugin", str(headers), capsys=capsys)
    assert f"{headers} has no NvInferRuntime.h. Name the folder" in said
    (headers / "NvInferRuntime.h").write_text("class IPluginV2DynamicExt;")
    said = refused(out, "--plugin", str(headers), capsys=capsys)
    assert "it is older than TensorRT 10. Name the headers of TensorRT 10.3 or later" in said
    said = refused(out, "--plugin", str(FAKES), "--cuda", str(headers), capsys=capsys)
    assert f"{headers} has no cuda.h" in said


def test_a_compiler_that_is_missing_or_fails_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "a.so"
    monkeypatch.setenv("CXX", "/nowhere/g++")
    said = refused(out, "--plugin", str(FAKES), capsys=capsys)
    assert "/nowhere/g++ cannot be run (No such file or directory). Name a C++ compiler" in said
    monkeypatch.setenv("CXX", "/bin/false")
    said = refused(out, "--plugin", str(FAKES), capsys=capsys)
    assert "/bin/false refused the plugin" in said
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(out, "--plugin", str(FAKES), capsys=capsys)
    assert "No C++ compiler was found: neither g++ nor c++ is on the PATH." in said


def test_damaged_kernels_are_not_built_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged() -> Binary:
        raise IntegrityError("other bytes")

    monkeypatch.setattr(plugin_library, "load_binary", damaged)
    with pytest.raises(IntegrityError):
        plugin_library.build_library(tmp_path / "a.so", headers=FAKES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--cuda"])
def test_options_of_another_build_are_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        build.main([option, "x"])
    assert left.value.code == 2
    assert f"{option} goes with" in capsys.readouterr().err
