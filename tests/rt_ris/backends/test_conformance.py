"""Every name that builder, adapter and plugin ask of TensorRT exists in every version we support.

The fakes are made from dumps of the real bindings, so running our code over them is the check, for
each version; the first test below sees to it that no line with such a name is left out. That the
dumps are the real bindings' is checked in ``tests/tools/test_tensorrt_api.py``.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest

import rt_ris
import rt_ris_kernels
from rt_ris.backends.base import Array
from rt_ris.backends.tensorrt import stage_opener, versions
from rt_ris.build import child
from rt_ris.build.request import Job, Request
from rt_ris.bundle import Bundle
from rt_ris.errors import BackendError
from rt_ris.records import to_json
from rt_ris_kernels.plugin import creator_type, plugin_type

RUNTIME = Path(rt_ris.__file__).parent
OURS = [
    RUNTIME / "build" / "child.py",
    RUNTIME / "build" / "log.py",
    RUNTIME / "build" / "timings.py",
    RUNTIME / "backends" / "tensorrt.py",
]
PLUGIN = Path(rt_ris_kernels.__file__).parent / "plugin.py"
RTX_ONLY = {"ComputeCapability"}


def asked(path: Path, api: set[str]) -> dict[tuple[str, int], str]:
    """Attributes of a module that TensorRT's objects have, by file and line."""
    tree = ast.parse(path.read_text())
    hints: set[ast.AST] = set()
    for node in ast.walk(tree):
        for hint in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            hints |= set() if hint is None else set(ast.walk(hint))
    found = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in api and node not in hints
    ]
    return {(str(path), node.end_lineno or 0): node.attr for node in found}


class Lines:
    """Which lines of our modules were run."""

    def __init__(self) -> None:
        self.run: set[tuple[str, int]] = set()

    def __enter__(self) -> Lines:
        self.before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *given: object) -> None:
        sys.settrace(self.before)

    def _trace(self, frame: FrameType, event: str, given: object) -> Any:
        path = frame.f_code.co_filename
        if Path(path) not in OURS:
            return None
        self.run.add((path, frame.f_lineno))
        return self._trace


def chains(path: Path) -> Iterator[list[str]]:
    """``trt.A`` and ``trt.A.B`` in a module, as lists of names."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        inner: ast.expr | ast.AST = node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if names and isinstance(inner, ast.Name) and inner.id in ("trt", "_trt"):
            yield names


def members(api: dict[str, Any]) -> set[str]:
    """All names of a version's API."""
    found = {*api["functions"], *api["constants"]}
    for name, described in api["classes"].items():
        found.add(name.rpartition(".")[2])
        for kind in ("methods", "properties", "members", "constants"):
            found |= set(described[kind])
    return {name for name in found if not name.startswith("_")}


def everything(world: Any, engines: Path, tiny: Path) -> None:
    """Every way through the builder and the adapter that asks TensorRT for something."""
    made = tiny.with_name("made")
    rtx = world.target == "tensorrt-rtx"
    job = Job(
        stage="text",
        graph=str(tiny / "text.onnx"),
        engine=str(made),
        sm=89 if rtx else None,
        plugin=True,
    )
    request = Request(
        target=world.target,
        workspace_mib=32,
        timings=None if rtx else str(tiny.with_name("gpu")),
        jobs=(job,),
    )
    tiny.with_name("request").write_bytes(to_json(request))
    for channels, plugins, fault in (
        (256, True, "parse"),
        (256, True, "build"),
        (64, True, "channels"),
        (256, True, ""),
        (256, True, "mismatch"),
        (256, False, ""),
    ):
        world.trt._plugins, world.trt._channels, world.trt._faults = plugins, channels, {fault}
        code = int(fault in ("parse", "build", "channels"))
        assert child.main([str(tiny.with_name("request"))]) == code
    assert child.main(["version", world.target]) == 0
    versions(world.target)
    bundle = Bundle.open(tiny)
    spec = bundle.manifest.stage("text").spec
    opener = stage_opener(bundle, target=world.target, folder=engines, allow_unverified=False)
    runner = opener(spec)
    for count in (1, 3, 16):
        runner.run(sentences(count))
    for fault in ("execute", "profile", "shape", "address"):
        world.trt._faults = {fault}
        with pytest.raises(BackendError):
            runner.run(sentences(3 if fault == "profile" else 16))
    world.trt._faults = set()
    with pytest.raises(BackendError):
        runner.run(sentences(17))
    runner.close()
    for fault in ("context", "location", "plan"):
        world.trt._faults = {fault}
        with pytest.raises(BackendError):
            opener(spec)


def sentences(count: int) -> dict[str, Array]:
    ids = np.ones((count, 8), np.int32)
    return {"token_ids": ids, "token_mask": ids > 0}


RUN: dict[str, set[tuple[str, int]]] = {}


def test_the_code_runs_on_every_version(
    world: Any, engines: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Lines() as lines:
        everything(world, engines, tiny)
    RUN[world.trt.__version__] = lines.run
    if len(RUN) < len(_versions()):
        return
    api = set().union(*(members(bindings_api(one)) for one in _versions()))
    names: dict[tuple[str, int], str] = {}
    for path in OURS:
        names |= asked(path, api)
    assert len(set(names.values())) > 40
    run = set().union(*RUN.values())
    assert {where: name for where, name in names.items() if where not in run} == {}


def _versions() -> list[str]:
    found: list[str] = importlib.import_module("bindings").VERSIONS
    return found


def bindings_api(version: str) -> dict[str, Any]:
    found: dict[str, Any] = importlib.import_module("bindings").read_api(version)
    return found


@pytest.mark.parametrize("path", [*OURS, PLUGIN], ids=lambda path: path.stem)
def test_names_of_the_module_exist(world: Any, path: Path) -> None:
    for first, *rest in chains(path):
        if first in RTX_ONLY and world.target == "tensorrt":
            continue
        found = getattr(world.trt, first)
        assert not rest or hasattr(found, rest[0]), f"{first}.{rest[0]}"


def test_what_tensorrt_calls_on_the_plugin_is_called_so(world: Any) -> None:
    for kind in (plugin_type(world.trt), creator_type(world.trt)):
        bases = [base.__name__ for base in kind.__mro__ if "_module" in vars(base)]
        classes = bindings_api_of(world)["classes"]
        known = set().union(*(classes[base]["methods"] for base in bases))
        ours = {name for name in vars(kind) if callable(vars(kind)[name]) and name[0] != "_"}
        assert ours
        assert ours - known == set(), bases


def bindings_api_of(world: Any) -> dict[str, Any]:
    found: dict[str, Any] = world.trt._api
    return found


class TestTheFakesAreStrict:
    def test_unknown_names(self, world: Any) -> None:
        trt = world.trt
        with pytest.raises(AttributeError):
            trt.BuilderFlags  # noqa: B018
        with pytest.raises(AttributeError):
            trt.ICudaEngine.get_binding_index  # noqa: B018  # gone since TensorRT 10
        config = trt.make("IBuilderConfig")
        with pytest.raises(AttributeError):
            config.max_workspace_size = 1
        assert hasattr(trt, "ComputeCapability") is (world.target == "tensorrt-rtx")
        assert hasattr(trt.BuilderFlag, "FP16") is trt.__version__.startswith("10.")

    def test_arguments(self, world: Any) -> None:
        trt = world.trt
        context = trt.make("IExecutionContext", addresses={}, shapes={})
        for given in ((), ("a",), ("a", 1, 2), ("a", "1"), (1, "a"), ("a", None)):
            with pytest.raises(TypeError):
                context.set_tensor_address(*given)
        with pytest.raises(TypeError, match="incompatible"):
            trt.OnnxParser(1, 2)
        with pytest.raises(TypeError, match="No constructor"):
            trt.ICudaEngine()
        with pytest.raises(NotImplementedError):
            context.infer_shapes()

    def test_bases_must_be_initialised(self, world: Any) -> None:
        class Log(world.trt.ILogger):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                self.errors: list[str] = []

        with pytest.raises(TypeError, match=r"ILogger\.__init__\(\) must be called"):
            Log()


def test_the_dumps_are_of_what_the_readme_says() -> None:
    """10.3 is JetPack 6's; one late 10, one 11 and one TensorRT-RTX stand beside it."""
    path = Path(__file__).parents[2] / "fakes" / "api"
    names = sorted(one.name.split(".")[0] for one in path.iterdir())
    assert names == ["10", "10", "11", "rtx-1"]
