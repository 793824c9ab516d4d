"""Running engines: bindings as strict as TensorRT's own, and a GPU of host memory."""

from __future__ import annotations

import hashlib
import importlib
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rt_ris.backends import cuda, versions
from rt_ris.backends.base import Array, Runner
from rt_ris.backends.tensorrt import open_engine, stage_opener
from rt_ris.build.find import read_engine, read_record
from rt_ris.build.record import EngineRecord
from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.errors import BackendError, MissingExtraError, PluginError, TargetMismatchError
from rt_ris.predictor import Predictor
from rt_ris.records import to_json
from rt_ris.spec import StageSpec, TensorSpec

Pixels = npt.NDArray[np.uint8]
Capture = pytest.CaptureFixture[str]
WORDS = ["red cup", "blue ball", "the green thing", "a red thing on the left", "yellow"]


def record_of(engines: Path, stage: str) -> EngineRecord:
    (path,) = engines.glob(f"{stage}.*.engine.json")
    return read_record(path)


def opened(world: Any, engines: Path, stage: str) -> Runner:
    bundle = Bundle.open(engines.with_name("tiny"))
    record = record_of(engines, stage)
    plan = read_engine(engines, record)
    spec = bundle.manifest.stage(stage).spec
    return open_engine(world.trt, spec, record, plan, gpu=cuda.open_cuda())


def sentences(count: int) -> dict[str, Array]:
    ids = np.random.default_rng(count).integers(0, 8, (count, 8)).astype(np.int32)
    return {"token_ids": ids, "token_mask": ids > 0}


@pytest.mark.parametrize("count", [1, 3, 16, 17])
def test_masks_are_those_of_onnx_runtime(
    world: Any, engines: Path, tiny: Path, picture: Pixels, count: int
) -> None:
    said = [WORDS[number % len(WORDS)] for number in range(count)]
    with Predictor.load(tiny, backend="onnxruntime") as truth:
        expected = truth.segment(said, image=picture)
    with Predictor.load(tiny, backend=world.target, max_expressions=16) as predictor:
        found = predictor.segment(said, image=picture)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-6)
        np.testing.assert_array_equal(a.binary, b.binary)


def test_profiles_follow_the_number_of_sentences(world: Any, engines: Path) -> None:
    runner = opened(world, engines, "text")
    truth = Predictor.load(engines.with_name("tiny"), backend="onnxruntime")
    for count in (16, 1, 5, 2, 2, 4, 16):
        given = sentences(count)
        expected = truth.session._runners["text"].run(given)["weights"]
        np.testing.assert_allclose(runner.run(given)["weights"], expected, atol=1e-6)
    with pytest.raises(BackendError, match=r"'text' got N = 17 .*1 to 16.*max_expressions=16"):
        runner.run(sentences(17))
    runner.run(sentences(3))
    runner.close()


def test_results_belong_to_the_caller(world: Any, engines: Path) -> None:
    runner = opened(world, engines, "text")
    first = runner.run(sentences(4))["weights"]
    kept = first.copy()
    runner.run({name: array[::-1] for name, array in sentences(4).items()})
    runner.close()
    np.testing.assert_array_equal(first, kept)
    first[...] = 0  # writable


def test_threads_take_turns(world: Any, engines: Path) -> None:
    runner = opened(world, engines, "text")
    expected = {count: runner.run(sentences(count))["weights"] for count in range(1, 9)}
    wrong: list[int] = []

    def many(count: int) -> None:
        for _ in range(20):
            if not np.array_equal(runner.run(sentences(count))["weights"], expected[count]):
                wrong.append(count)

    threads = [threading.Thread(target=many, args=(count,)) for count in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    runner.close()
    assert not wrong


def test_an_older_error_is_not_told_again(world: Any, engines: Path) -> None:
    runner = opened(world, engines, "text")
    for fault, said in (("execute", "an illegal memory access"), ("shape", "it gave no reason")):
        world.trt._faults = {fault}
        with pytest.raises(BackendError, match=said):
            runner.run(sentences(2))
    runner.close()


def test_a_closed_stage_says_so_and_may_be_closed_again(world: Any, engines: Path) -> None:
    runner = opened(world, engines, "image")
    runner.close()
    runner.close()
    with pytest.raises(BackendError, match="'image' was closed"):
        runner.run({"pixels": np.zeros((1, 32, 32, 3), np.uint8)})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("execute", "did not execute: an illegal memory access"),
        ("profile", "refused its profile 2 for 7 sentences"),
        ("shape", r"refused 'token_ids' of shape \[7, 8\]: it gave no reason"),
        ("address", "refused the memory of 'token_ids'"),
    ],
)
def test_what_fails_in_a_run_is_named(world: Any, engines: Path, fault: str, said: str) -> None:
    runner = opened(world, engines, "text")
    world.trt._faults.add(fault)
    with pytest.raises(BackendError, match=f"stage 'text' {said}") as caught:
        runner.run(sentences(7))
    assert caught.value.exit_code == 6
    world.trt._faults.clear()
    runner.run(sentences(1))
    runner.run(sentences(7))
    runner.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("context", "cannot prepare to run 'text.*: out of memory. The GPU's memory may be"),
        (
            "location",
            r"declares token_ids int32 \[N, 8\]; the engine has .* at TensorLocation.HOST",
        ),
    ],
)
def test_what_fails_at_opening_is_named(world: Any, engines: Path, fault: str, said: str) -> None:
    world.trt._faults.add(fault)
    with pytest.raises(BackendError, match=said):
        opened(world, engines, "text")


@pytest.mark.parametrize("room", [0, 100, 1000])
def test_an_exhausted_memory_leaves_nothing_allocated(world: Any, engines: Path, room: int) -> None:
    world.cudart.capacity = room
    with pytest.raises(BackendError, match=r"memory is exhausted: cuda.* of .* bytes failed"):
        opened(world, engines, "text")


def test_bytes_that_tensorrt_refuses(world: Any, engines: Path) -> None:
    spec = Bundle.open(engines.with_name("tiny")).manifest.stage("text").spec
    with pytest.raises(BackendError, match=r"does not open 'text.*: magic tag does not match"):
        open_engine(world.trt, spec, record_of(engines, "text"), b"junk", gpu=cuda.open_cuda())


def test_an_engine_of_another_stage_is_refused(world: Any, engines: Path) -> None:
    bundle = Bundle.open(engines.with_name("tiny"))
    record = record_of(engines, "text")
    plan = read_engine(engines, record)

    def refused(spec: StageSpec, said: str) -> None:
        with pytest.raises(BackendError, match=said):
            open_engine(world.trt, spec, record, plan, gpu=cuda.open_cuda())

    refused(bundle.manifest.stage("fusion").spec, "declares input 'grid'.*has input 'token_ids'")
    spec = bundle.manifest.stage("text").spec
    ids, mask = spec.inputs
    refused(replace(spec, inputs=(replace(ids, dtype="int64"), mask)), "int64.*DataType.INT32")
    refused(replace(spec, inputs=(replace(ids, shape=("N", 9)), mask)), r"\[N, 9\].*\[-1, 8\]")


def test_half_precision_goes_in_and_out(world: Any, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    half = onnx.TensorProto.FLOAT16
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
        "half",
        [onnx.helper.make_tensor_value_info("a", half, ["N", 5])],
        [onnx.helper.make_tensor_value_info("b", half, ["N", 5])],
    )
    opset = [onnx.helper.make_opsetid("", 20)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "g")
    child = importlib.import_module("rt_ris.build.child")
    job = child.Job(
        stage="half", graph=str(tmp_path / "g"), engine=str(tmp_path / "e"), sm=None, plugin=False
    )
    child.build(world.trt, job, workspace_mib=None)
    spec = StageSpec(
        id="half",
        role="fusion",
        inputs=(TensorSpec(name="a", dtype="float16", shape=("N", 5)),),
        outputs=(TensorSpec(name="b", dtype="float16", shape=("N", 5)),),
    )
    plan = (tmp_path / "e").read_bytes()
    record: Any = None
    runner = open_engine(world.trt, spec, record, plan, gpu=cuda.open_cuda())
    given = np.arange(15, dtype=np.float16).reshape(3, 5)
    found = runner.run({"a": given})["b"]
    runner.close()
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, given * 2)


class TestPlugins:
    @pytest.fixture
    def with_plugin(self, world: Any, engines: Path) -> Path:
        """Engines whose records and plans ask for our plugin."""
        for path in engines.glob("*.engine.json"):
            record = read_record(path)
            engine = engines / record.engine
            engine.write_bytes(engine.read_bytes().replace(b'"plugin": false', b'"plugin": true'))
            sha256 = hashlib.sha256(engine.read_bytes()).hexdigest()
            size = engine.stat().st_size
            path.write_bytes(to_json(replace(record, sha256=sha256, bytes=size, plugin=True)))
        return engines

    def opener(self, world: Any, folder: Path) -> Any:
        bundle = Bundle.open(folder.with_name("tiny"))
        opener = stage_opener(bundle, target=world.target, folder=None, allow_unverified=True)
        return opener(bundle.manifest.stage("text").spec)

    def test_they_are_registered_before_an_engine_is_read(
        self, world: Any, with_plugin: Path
    ) -> None:
        assert not world.trt._registry
        self.opener(world, with_plugin).close()
        assert ("MaskedMutualAttention", "1", "rt_ris") in world.trt._registry

    def test_without_them_no_engine_is_read(self, world: Any, with_plugin: Path) -> None:
        world.monkeypatch.setitem(sys.modules, "rt_ris_kernels.plugin", None)
        with pytest.raises(PluginError, match=r"rt_ris_kernels is not installed.*--no-plugin"):
            self.opener(world, with_plugin)

    def test_a_refusal_is_said(self, world: Any, with_plugin: Path) -> None:
        world.trt._faults.add("register")
        with pytest.raises(PluginError, match="refused the plugin"):
            self.opener(world, with_plugin)

    def test_other_kernels_than_those_that_passed_do_not_count(
        self, world: Any, with_plugin: Path, tiny: Path, capsys: Capture
    ) -> None:
        assert main(world.words("verify", tiny)) == 0
        Predictor.load(tiny, backend=world.target).close()
        world.monkeypatch.setattr("rt_ris.build.gate.kernels_identity", lambda: "newer")
        with pytest.raises(TargetMismatchError, match=r"with kernels rt_ris::.*it is newer"):
            Predictor.load(tiny, backend=world.target)

    def test_engines_without_plugins_need_none(self, world: Any, engines: Path) -> None:
        world.monkeypatch.setitem(sys.modules, "rt_ris_kernels.plugin", None)
        self.opener(world, engines).close()
        assert not world.trt._registry


class TestCuda:
    def test_no_gpu_is_an_environment_that_does_not_fit(
        self, world: Any, engines: Path, tiny: Path, capsys: Capture
    ) -> None:
        world.cudart.present = False
        assert main(world.words("verify", tiny)) == 3
        assert (
            "no usable GPU here: CUDA says cudaErrorInsufficientDriver" in capsys.readouterr().err
        )

    def test_missing_bindings_give_the_pip_line(self, world: Any, engines: Path) -> None:
        world.monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
        with pytest.raises(MissingExtraError, match="pip install cuda-bindings"):
            cuda.open_cuda()

    @pytest.mark.parametrize("name", ["cudaMemcpyAsync", "cudaStreamSynchronize"])
    def test_a_fault_in_a_run_is_named(self, world: Any, engines: Path, name: str) -> None:
        runner = opened(world, engines, "text")
        world.cudart.faults.add(name)
        with pytest.raises(BackendError, match=f"CUDA refused {name}: cudaErrorIllegalAddress"):
            runner.run(sentences(2))
        world.cudart.faults.clear()
        runner.close()

    def test_a_fault_at_opening_is_named(self, world: Any, engines: Path) -> None:
        world.cudart.faults.add("cudaStreamCreateWithFlags")
        with pytest.raises(BackendError, match="CUDA refused cudaStreamCreateWithFlags"):
            opened(world, engines, "text")

    def test_the_driver_is_named_where_linux_knows_it(self, world: Any, tmp_path: Path) -> None:
        world.monkeypatch.setattr(cuda, "DRIVER_FILE", tmp_path / "version")
        (tmp_path / "version").write_text("580.82.07\n")
        gpu = cuda.open_cuda().gpu()
        assert gpu == cuda.Gpu(
            name="NVIDIA Test 4000",
            sm=89,
            multiprocessors=24,
            memory_mib=8192,
            driver="CUDA 12.6, 580.82.07",
        )
        assert gpu.slug == "nvidia-test-4000"

    def test_the_real_bindings_have_every_name_of_the_fake(self, world: Any) -> None:
        names = [name for name in vars(sys.modules["cuda.bindings.runtime"]) if name[0] != "_"]
        world.monkeypatch.delitem(sys.modules, "cuda.bindings.runtime")
        real = pytest.importorskip("cuda.bindings.runtime")
        assert not [name for name in names if not hasattr(real, name)]
        for kind in ("cudaError_t", "cudaMemcpyKind"):
            fake = importlib.import_module("fake_cudart")
            assert all(hasattr(getattr(real, kind), one.name) for one in getattr(fake, kind))
        facts = real.cudaDeviceProp()
        wanted = ("name", "major", "minor", "multiProcessorCount", "totalGlobalMem")
        assert all(hasattr(facts, name) for name in wanted)


def test_versions_tell_of_the_gpu(world: Any) -> None:
    found = versions(world.target)
    assert world.trt.__version__ in found.values()
    assert found["gpu"] == "NVIDIA Test 4000, compute capability 8.9, CUDA 12.6"
