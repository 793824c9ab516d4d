"""What doctor predicts of machines that are not here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from rt_ris.cli.probe import Engine, Gpu, Kernels, Machine
from rt_ris.cli.requirements import Row, numbers, requirements
from rt_ris.manifest import Manifest, Member, parse_manifest
from rt_ris.spec import TargetSpec

TINY = Path(__file__).parents[2] / "fixtures" / "tiny" / "manifest.json"
OPERATOR = "rt_ris::MaskedMutualAttention"
ORT = Engine(version="1.31.1", providers=("CPUExecutionProvider",))
LAPTOP = Machine(
    python="3.11.7",
    bits=64,
    architecture="x86_64",
    no_cuda="libcuda.so.1: cannot open shared object file",
    engines={
        "onnxruntime": ORT,
        "tensorrt": Engine(),
        "tensorrt_rtx": Engine(version="1.7.1.116"),
        "cuda.bindings": Engine(),
    },
    wheels=("onnxruntime",),
    kernels=Kernels(channels=(128, 256), least_sm=80, for_cuda_12=(87,)),
    memory_mib=16_000,
    disk_mib=50_000,
)


def with_gpu(gpu: Gpu, *, cuda: int = 13000, l4t: int | None = None, **engines: str) -> Machine:
    """A machine with everything that its GPU can use, in the versions given."""
    newest = {"tensorrt": "11.4.1.5", "tensorrt_rtx": "1.7.1.116", "cuda_bindings": "13.5.0"}
    modules = {
        name.replace("cuda_", "cuda."): Engine(version=version)
        for name, version in {**newest, **engines}.items()
    }
    return replace(
        LAPTOP,
        cuda=cuda,
        no_cuda="",
        l4t=l4t,
        gpus=(gpu,),
        engines={**LAPTOP.engines, **modules},
        architecture="aarch64" if l4t else "x86_64",
    )


H100 = with_gpu(Gpu(name="NVIDIA H100", sm=90, total_mib=81_000, free_mib=80_000))
T4 = with_gpu(Gpu(name="Tesla T4", sm=75, total_mib=15_000, free_mib=14_000))
RTX_4090 = with_gpu(Gpu(name="NVIDIA GeForce RTX 4090", sm=89, total_mib=24_000, free_mib=1_024))
PASCAL = with_gpu(Gpu(name="GTX 1080", sm=61, total_mib=8_000, free_mib=7_000))
ORIN = with_gpu(
    Gpu(name="Orin", sm=87, total_mib=30_000, free_mib=200, integrated=True),
    cuda=12060,
    l4t=36,
    tensorrt="10.3.0",
    cuda_bindings="12.6.2",
)
THOR = with_gpu(Gpu(name="Thor", sm=110, total_mib=120_000, free_mib=90_000, integrated=True))


def bundle(
    *, channels: tuple[int, ...] = (), mib: int = 600, precision: str = "fp16", dmmi: bool = False
) -> Manifest:
    """A manifest whose graphs have a size, whose fusion holds our operator, of a precision."""
    tiny = parse_manifest(TINY.read_bytes())
    stages = tuple(
        replace(
            stage,
            target=TargetSpec(precision="fp32" if precision == "fp32" else "fp16"),
            operators={OPERATOR: channels} if channels and stage.spec.id == "fusion" else {},
        )
        for stage in tiny.stages
    )
    members = {**tiny.members, "image.onnx": Member(sha256="0" * 64, bytes=mib << 20)}
    names = ("dmmi", "swin") if dmmi else ("maris", "vit_b")
    return replace(tiny, stages=stages, members=members, architecture=names[0], variant=names[1])


def rows(manifest: Manifest, machine: Machine) -> Mapping[str, Row]:
    return {row.need: row for row in requirements(manifest, machine)}


def verdicts(manifest: Manifest, machine: Machine) -> Mapping[str, str]:
    return {need: row.verdict for need, row in rows(manifest, machine).items()}


MARIS = bundle(channels=(256,))


def test_a_machine_without_gpu_runs_on_its_processor_and_builds_for_others() -> None:
    found = rows(MARIS, LAPTOP)
    assert {need: row.verdict for need, row in found.items()} == {
        "Python": "ok",
        "ONNX Runtime": "ok",
        "CUDA in ONNX Runtime": "unneeded",
        "host memory": "ok",
        "NVIDIA driver": "absent",
        "GPU": "absent",
        "device memory": "absent",
        "TensorRT": "absent",
        "TensorRT-RTX": "ok",
        "our kernels": "absent",
        "cuda-bindings": "unneeded",
        "disk": "ok",
    }
    assert "--target tensorrt-rtx --sm" in found["GPU"].consequence
    assert "libcuda.so.1" in found["NVIDIA driver"].found


def test_nothing_known_is_never_ok() -> None:
    blank = Machine(python="3.11.7", bits=64, architecture="x86_64")
    ok = [need for need, verdict in verdicts(MARIS, blank).items() if verdict == "ok"]
    assert ok == ["Python"]


@pytest.mark.parametrize(("machine", "sm"), [(H100, "9.0"), (ORIN, "8.7"), (THOR, "11.0")])
def test_tensorrt_rtx_refuses_hopper_and_jetsons(machine: Machine, sm: str) -> None:
    row = rows(MARIS, machine)["TensorRT-RTX"]
    assert row.verdict == "fails"
    assert row.found.endswith(sm)
    assert "--target tensorrt on this machine" in row.consequence
    assert rows(MARIS, machine)["TensorRT"].verdict == "ok"


def test_hopper_runs_our_kernels_and_tensorrt() -> None:
    ready = ("NVIDIA driver", "GPU", "device memory", "TensorRT", "our kernels", "cuda-bindings")
    assert {verdicts(MARIS, H100)[need] for need in ready} == {"ok"}


def test_cuda_12_loads_our_kernels_on_orin_alone() -> None:
    assert verdicts(MARIS, ORIN)["our kernels"] == "ok"
    older = rows(MARIS, replace(ORIN, cuda=12020))["our kernels"]
    assert older.verdict == "fails"
    row = rows(MARIS, replace(H100, cuda=12060))["our kernels"]
    assert row.verdict == "fails"
    assert "need a driver of CUDA 13, this one is CUDA 12.6" in row.consequence
    assert "--no-plugin" in row.consequence
    assert verdicts(bundle(), ORIN)["our kernels"] == "unneeded"


def test_jetsons_share_their_memory() -> None:
    row = rows(MARIS, ORIN)["device memory"]
    assert (row.verdict, row.found[:9]) == ("ok", "16000 MiB")  # not the 200 that CUDA calls free
    assert "shared with the processor" in row.found
    assert verdicts(MARIS, replace(ORIN, memory_mib=900))["device memory"] == "fails"


def test_bindings_follow_the_driver() -> None:
    row = rows(MARIS, with_gpu(ORIN.gpus[0], cuda=12060, cuda_bindings="13.5.0"))["cuda-bindings"]
    assert row.verdict == "unknown"
    assert '"cuda-bindings>=12.0,<13"' in row.consequence
    assert verdicts(MARIS, ORIN)["cuda-bindings"] == "ok"


def test_a_t4_inlines_our_operator() -> None:
    found = rows(MARIS, T4)
    assert "build takes the operator's function" in found["our kernels"].consequence
    assert found["TensorRT-RTX"].verdict == "ok"
    single = rows(bundle(channels=(256,), precision="fp32"), T4)["TensorRT-RTX"]
    assert (single.verdict, "export it in fp16" in single.consequence) == ("fails", True)
    assert verdicts(bundle(precision="fp32"), T4)["TensorRT-RTX"] == "ok"


def test_what_tensorrt_rtx_is_known_to_refuse() -> None:
    row = rows(bundle(dmmi=True), T4)["TensorRT-RTX"]
    assert row.verdict == "fails"
    assert "'fusion' is refused for 7.5" in row.consequence
    assert verdicts(bundle(dmmi=True), RTX_4090)["TensorRT-RTX"] == "ok"
    assert (
        "'fusion' is refused for 7.5" in rows(bundle(dmmi=True), LAPTOP)["TensorRT-RTX"].consequence
    )


def test_memory_is_judged_by_the_estimate_that_is_told() -> None:
    row = rows(MARIS, RTX_4090)["device memory"]
    assert row.verdict == "fails"
    assert "about 1100 MiB to run (estimate, never measured" in row.expected
    assert row.found == "1024 MiB free, 24000 in all"
    assert verdicts(bundle(mib=100), RTX_4090)["device memory"] == "ok"
    silent = replace(RTX_4090, gpus=(replace(RTX_4090.gpus[0], free_mib=None),))
    assert verdicts(MARIS, silent)["device memory"] == "unknown"
    small = replace(LAPTOP, memory_mib=1500, disk_mib=800)
    assert verdicts(MARIS, small)["host memory"] == "fails"
    assert verdicts(MARIS, small)["disk"] == "fails"
    dark = replace(LAPTOP, memory_mib=None, disk_mib=None)
    assert verdicts(MARIS, dark)["host memory"] == verdicts(MARIS, dark)["disk"] == "unknown"


def test_other_channels_are_refused_by_the_builder() -> None:
    row = rows(bundle(channels=(64, 256)), H100)["our kernels"]
    assert f"refuses {OPERATOR} with 64 and 256 channels; build with --no-plugin" in row.consequence
    assert verdicts(bundle(channels=(128, 256)), H100)["our kernels"] == "ok"
    assert verdicts(bundle(channels=(64,)), LAPTOP)["our kernels"] == "fails"
    assert verdicts(MARIS, replace(H100, kernels=None))["our kernels"] == "fails"


def test_a_manifest_that_does_not_say_is_not_called_ok() -> None:
    silent = tuple(replace(stage, operators=None) for stage in MARIS.stages)
    assert verdicts(replace(MARIS, stages=silent), H100)["our kernels"] == "unknown"


def test_old_gpus_drivers_and_engines() -> None:
    found = verdicts(MARIS, PASCAL)
    assert {found[need] for need in ("GPU", "TensorRT", "TensorRT-RTX")} == {"fails"}
    old = with_gpu(T4.gpus[0], cuda=12000, tensorrt="10.0.1", cuda_bindings="12.3.0")
    found = verdicts(MARIS, old)
    needs = ("NVIDIA driver", "TensorRT", "TensorRT-RTX", "cuda-bindings")
    assert {found[need] for need in needs} == {"fails"}
    assert "cu13 wheel needs a driver of CUDA 13" in rows(MARIS, old)["TensorRT-RTX"].consequence


def test_jetpack_5_is_too_old_in_every_way() -> None:
    xavier = replace(
        with_gpu(
            Gpu(name="Xavier", sm=72, total_mib=30_000, free_mib=1, integrated=True),
            cuda=11040,
            l4t=35,
            tensorrt="8.5.2.2",
        ),
        python="3.8.10",
    )
    found = verdicts(MARIS, xavier)
    needs = ("Python", "NVIDIA driver", "GPU", "TensorRT", "TensorRT-RTX")
    assert {found[need] for need in needs} == {"fails"}


def test_tensorrt_is_got_in_two_ways() -> None:
    missing = {"tensorrt": Engine()}
    pip, jetpack = (
        rows(MARIS, replace(one, engines={**one.engines, **missing}))["TensorRT"]
        for one in (H100, ORIN)
    )
    assert "pip install tensorrt" in pip.consequence
    assert "part of JetPack" in jetpack.consequence


def test_engines_that_are_there_but_broken() -> None:
    broken = Engine(fault="libnvinfer.so.11: cannot open shared object file")
    names = ("onnxruntime", "tensorrt", "cuda.bindings")
    found = rows(MARIS, replace(H100, engines=dict.fromkeys(names, broken)))
    for need in ("ONNX Runtime", "TensorRT", "cuda-bindings"):
        assert found[need].verdict == "fails"
        assert "libnvinfer.so.11" in found[need].found


def test_cuda_that_onnx_runtime_would_silently_lack() -> None:
    listed = Engine(version="1.31.1", providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    gpu_wheel = replace(LAPTOP, wheels=("onnxruntime-gpu",), engines={"onnxruntime": listed})
    row = rows(MARIS, gpu_wheel)["CUDA in ONNX Runtime"]
    assert row.verdict == "absent"
    assert "fall back to the processor without an error" in row.consequence
    lost = replace(gpu_wheel, engines={"onnxruntime": ORT})
    assert "its module lacks CUDA" in rows(MARIS, lost)["CUDA in ONNX Runtime"].consequence
    both = replace(gpu_wheel, wheels=("onnxruntime", "onnxruntime-gpu"))
    assert "both wheels own one module" in rows(MARIS, both)["CUDA in ONNX Runtime"].consequence


@pytest.mark.parametrize(
    ("change", "need"),
    [
        ({"python": "3.9.2"}, "Python"),
        ({"bits": 32}, "Python"),
        ({"architecture": "riscv64"}, "Python"),
        ({"engines": {"onnxruntime": Engine()}}, "ONNX Runtime"),
        ({"engines": {"onnxruntime": Engine(version="1.9.0")}}, "ONNX Runtime"),
        ({"engines": {"onnxruntime": Engine(version="1.31.1")}}, "ONNX Runtime"),
    ],
)
def test_what_stops_the_processor(change: dict[str, object], need: str) -> None:
    assert verdicts(MARIS, replace(LAPTOP, **change))[need] == "fails"


def test_graphs_for_onnx_runtime_are_for_no_builder() -> None:
    own = replace(MARIS.stages[1], target=TargetSpec(format="onnxruntime"))
    manifest = replace(MARIS, stages=(MARIS.stages[0], own, *MARIS.stages[2:]))
    found = rows(manifest, H100)
    for need in ("TensorRT", "TensorRT-RTX"):
        assert found[need].verdict == "fails"
        assert f"do not read '{own.spec.id}'" in found[need].consequence
        assert "--target onnx" in found[need].consequence
    assert found["our kernels"].verdict == "unneeded"
    assert found["ONNX Runtime"].verdict == "ok"
    old = replace(H100, engines={**H100.engines, "onnxruntime": replace(ORT, version="1.20.1")})
    assert rows(MARIS, old)["ONNX Runtime"].verdict == "ok"
    assert rows(manifest, old)["ONNX Runtime"].verdict == "fails"
    assert rows(manifest, old)["ONNX Runtime"].expected.startswith("1.21 or later")


def test_versions_compare_as_numbers() -> None:
    assert numbers("10.10.0.31") > numbers("10.3.0.post1") == (10, 3, 0)
    assert numbers("11.4.1rc1") == (11, 4, 1)
    assert numbers("") == ()
