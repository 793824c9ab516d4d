"""A TensorRT that builds plans which ONNX Runtime computes: its bindings' names, our behaviours."""

from __future__ import annotations

import base64
import ctypes
import json
import os
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from bindings import Module

MAGIC = b"FAKEPLAN"
_TYPES = {
    "tensor(float)": "FLOAT",
    "tensor(float16)": "HALF",
    "tensor(uint8)": "UINT8",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(bool)": "BOOL",
}
_NUMPY = {"FLOAT": "f4", "HALF": "f2", "UINT8": "u1", "INT32": "i4", "INT64": "i8", "BOOL": "?"}
BEHAVIOURS: dict[str, Callable[..., Any]] = {}


class Fake(Module):
    """The module, and what a test may ask of it.

    Attributes:
        _faults: what fails: ``parse``, ``build``, ``plan``, ``context``, ``profile``, ``shape``,
            ``address``, ``location``, ``execute``, ``register``, ``mismatch`` (of timings).
        _cudart: the GPU; None where nothing is run.
        _plugins: layers of each parsed network are our plugin.
        _channels: of that plugin's first input.
        _registry: creators by name, version and namespace.
        _during: called at each of the ``_steps`` of a build.
        _known: what each build was given of timings.
        _bias: what is added to every output.
    """

    def __init__(self, version: str) -> None:
        super().__init__(version, BEHAVIOURS)
        state: dict[str, Any] = {
            "_faults": set(),
            "_cudart": None,
            "_plugins": False,
            "_channels": 256,
            "_registry": {},
            "_during": lambda: None,
            "_steps": 1,
            "_bias": 0,
            "_known": [],
        }
        self.__dict__.update(state)
        self.__spec__ = ModuleSpec("tensorrt", None)

    @property
    def is_rtx(self) -> bool:
        return "ComputeCapability" in self._api["classes"]


def does(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        BEHAVIOURS[name] = function
        return function

    return keep


def _session(graph: bytes) -> Any:
    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


def _tensors(arguments: Any) -> list[list[Any]]:
    return [
        [
            one.name,
            _TYPES[one.type],
            [size if isinstance(size, int) else -1 for size in one.shape],
        ]
        for one in arguments
    ]


# Building


@does("ILogger.__init__")
@does("IProgressMonitor.__init__")
def _(trt: Fake, self: Any) -> None: ...


@does("Builder.__init__")
def _(trt: Fake, self: Any, log: Any) -> None:
    self._log = log


@does("Builder.create_network")
def _(trt: Fake, self: Any, flags: int = 0) -> Any:
    assert flags & 1 << int(trt._classes["NetworkDefinitionCreationFlag"].STRONGLY_TYPED)
    return trt.make("INetworkDefinition", graph=b"", inputs=[], outputs=[])


@does("OnnxParser.__init__")
def _(trt: Fake, self: Any, network: Any, log: Any) -> None:
    self._network = network
    self._errors = []


@does("OnnxParser.parse_from_file")
def _(trt: Fake, self: Any, path: str) -> bool:
    with open(path, "rb") as stream:
        graph = stream.read()
    if "parse" in trt._faults:
        self._errors.append("no importer")
        return False
    session = _session(graph)
    self._network._graph = graph
    self._network._inputs = _tensors(session.get_inputs())
    self._network._outputs = _tensors(session.get_outputs())
    return True


@does("OnnxParser.num_errors")
def _(trt: Fake, self: Any) -> int:
    return len(self._errors)


@does("OnnxParser.get_error")
def _(trt: Fake, self: Any, index: int) -> Any:
    return trt.make("ParserError", text=self._errors[index])


@does("ParserError.desc")
def _(trt: Fake, self: Any) -> str:
    return str(self._text)


@does("ParserError.node_name")
def _(trt: Fake, self: Any) -> str:
    return "node_7"


@does("ParserError.node_operator")
def _(trt: Fake, self: Any) -> str:
    return "Resize"


@does("INetworkDefinition.num_layers")
def _(trt: Fake, self: Any) -> int:
    return 2


@does("INetworkDefinition.get_layer")
def _(trt: Fake, self: Any, index: int) -> Any:
    kinds = trt._classes["LayerType"]
    kind = kinds.PLUGIN_V3 if trt._plugins and index == 0 else kinds.ELEMENTWISE
    return trt.make("ILayer", type=kind)


@does("ILayer.type")
def _(trt: Fake, self: Any) -> Any:
    return self._type


@does("ILayer.name")
def _(trt: Fake, self: Any) -> str:
    return "attention"


@does("ILayer.get_input")
def _(trt: Fake, self: Any, index: int) -> Any:
    return trt.make("ITensor", tensor=["z_v", "HALF", [1, 64, trt._channels]])


@does("INetworkDefinition.num_inputs")
def _(trt: Fake, self: Any) -> int:
    return len(self._inputs)


@does("INetworkDefinition.get_input")
def _(trt: Fake, self: Any, index: int) -> Any:
    return trt.make("ITensor", tensor=self._inputs[index])


@does("ITensor.name")
def _(trt: Fake, self: Any) -> str:
    return str(self._tensor[0])


@does("ITensor.shape")
def _(trt: Fake, self: Any) -> Any:
    return tuple(self._tensor[2])


@does("Builder.create_builder_config")
def _(trt: Fake, self: Any) -> Any:
    return trt.make("IBuilderConfig", profiles=[], pools={}, sm=None, cache=None)


@does("IBuilderConfig.set_memory_pool_limit")
def _(trt: Fake, self: Any, pool: Any, size: int) -> None:
    self._pools[str(pool)] = size


@does("IBuilderConfig.set_compute_capability")
def _(trt: Fake, self: Any, capability: Any, index: int) -> bool:
    if index >= self.num_compute_capabilities:
        return False
    self._sm = int(str(capability).removeprefix("ComputeCapability.SM"))
    return self._sm != 87


@does("IBuilderConfig.add_optimization_profile")
def _(trt: Fake, self: Any, profile: Any) -> int:
    self._profiles.append(profile._shapes)
    return len(self._profiles) - 1


@does("Builder.create_optimization_profile")
def _(trt: Fake, self: Any) -> Any:
    return trt.make("IOptimizationProfile", shapes={})


@does("IOptimizationProfile.set_shape")
def _(trt: Fake, self: Any, name: str, *shapes: Any) -> None:
    self._shapes[name] = [list(shape) for shape in shapes]


@does("IBuilderConfig.create_timing_cache")
def _(trt: Fake, self: Any, known: bytes) -> Any:
    if bytes(known).startswith(b"damaged"):
        return None
    return trt.make("ITimingCache", known=bytes(known))


@does("IBuilderConfig.set_timing_cache")
def _(trt: Fake, self: Any, cache: Any, ignore_mismatch: bool) -> bool:
    if cache._known and "mismatch" in trt._faults:
        return False
    trt._known.append(cache._known)
    self._cache = cache
    return True


@does("IBuilderConfig.get_timing_cache")
def _(trt: Fake, self: Any) -> Any:
    return self._cache


@does("ITimingCache.serialize")
def _(trt: Fake, self: Any) -> Any:
    return HostMemory(self._known)


class HostMemory(bytes):
    """Stands for ``IHostMemory``, of which only the buffer is used."""


@does("Builder.build_serialized_network")
def _(trt: Fake, self: Any, network: Any, config: Any) -> Any:
    monitor = config.__dict__.get("_set_progress_monitor")
    if monitor is not None:
        monitor.phase_start("Building", None, 2)
    if config._cache is not None:
        config._cache._known += b"timed;"
    for step in range(trt._steps):
        trt._during()
        if monitor is not None and not monitor.step_complete("Building", step):
            return None
    if monitor is not None:
        monitor.phase_finish("Building")
    if "build" in trt._faults:
        self._log.log(trt._classes["ILogger.Severity"].ERROR, "no implementation")
        self._log.log(trt._classes["ILogger.Severity"].WARNING, "beside the point")
        return None
    free = [name for name, _, shape in network._inputs if -1 in shape]
    assert all(set(free) <= set(profile) for profile in config._profiles)
    assert bool(free) == bool(config._profiles), "a free axis needs profiles"
    facts = {
        "version": trt.__dict__["__version__"],
        "sm": config._sm,
        "plugin": trt._plugins,
        "inputs": network._inputs,
        "outputs": network._outputs,
        "profiles": config._profiles,
        "workspace": config._pools,
        "graph": base64.b64encode(network._graph).decode(),
    }
    return HostMemory(MAGIC + json.dumps(facts).encode())


# Running


@does("Runtime.__init__")
def _(trt: Fake, self: Any, log: Any) -> None:
    self._log = log


@does("Runtime.deserialize_cuda_engine")
def _(trt: Fake, self: Any, plan: bytes) -> Any:
    said = trt._classes["ILogger.Severity"].ERROR
    if not plan.startswith(MAGIC) or "plan" in trt._faults:
        self._log.log(said, "magic tag does not match")
        return None
    facts = json.loads(plan[len(MAGIC) :])
    if facts["plugin"] and not trt._registry:
        self._log.log(said, "getPluginCreator could not find plugin")
        return None
    graph = base64.b64decode(facts["graph"])
    return trt.make("ICudaEngine", facts=facts, session=_session(graph), log=self._log)


def _io(self: Any) -> dict[str, list[Any]]:
    return {one[0]: one for one in (*self._facts["inputs"], *self._facts["outputs"])}


@does("ICudaEngine.num_io_tensors")
def _(trt: Fake, self: Any) -> int:
    return len(_io(self))


@does("ICudaEngine.get_tensor_name")
def _(trt: Fake, self: Any, index: int) -> str:
    return list(_io(self))[index]


@does("ICudaEngine.get_tensor_mode")
def _(trt: Fake, self: Any, name: str) -> Any:
    modes = trt._classes["TensorIOMode"]
    into = name in [one[0] for one in self._facts["inputs"]]
    return modes.INPUT if into else modes.OUTPUT


@does("ICudaEngine.get_tensor_dtype")
def _(trt: Fake, self: Any, name: str) -> Any:
    return getattr(trt._classes["DataType"], _io(self)[name][1])


@does("ICudaEngine.get_tensor_shape")
def _(trt: Fake, self: Any, name: str) -> Any:
    return tuple(_io(self)[name][2])


@does("ICudaEngine.get_tensor_location")
def _(trt: Fake, self: Any, name: str) -> Any:
    places = trt._classes["TensorLocation"]
    return places.HOST if "location" in trt._faults else places.DEVICE


@does("ICudaEngine.num_optimization_profiles")
def _(trt: Fake, self: Any) -> int:
    return max(1, len(self._facts["profiles"]))


@does("ICudaEngine.get_tensor_profile_shape")
def _(trt: Fake, self: Any, name: str, index: int) -> Any:
    return [tuple(shape) for shape in self._facts["profiles"][index][name]]


@does("ICudaEngine.create_execution_context")
def _(trt: Fake, self: Any) -> Any:
    if "context" in trt._faults:
        self._log.log(trt._classes["ILogger.Severity"].ERROR, "out of memory")
        return None
    return trt.make(
        "IExecutionContext", engine=self, profile=0, shapes={}, addresses={}, log=self._log
    )


@does("IExecutionContext.set_optimization_profile_async")
def _(trt: Fake, self: Any, index: int, stream: int) -> bool:
    assert stream in trt._cudart.streams
    self._profile = index  # also where it fails: nothing says what is left of the old one
    self._shapes.clear()
    return "profile" not in trt._faults


@does("IExecutionContext.set_input_shape")
def _(trt: Fake, self: Any, name: str, shape: tuple[int, ...]) -> bool:
    profiles = self._engine._facts["profiles"]
    if profiles and name in profiles[self._profile]:
        low, _, high = profiles[self._profile][name]
        if not all(a <= size <= b for a, size, b in zip(low, shape, high, strict=True)):
            return False
    self._shapes[name] = shape
    return "shape" not in trt._faults


@does("IExecutionContext.set_tensor_address")
def _(trt: Fake, self: Any, name: str, address: int) -> bool:
    assert address in trt._cudart.live
    self._addresses[name] = address
    return "address" not in trt._faults


@does("IExecutionContext.execute_async_v3")
def _(trt: Fake, self: Any, stream: int) -> bool:
    engine = self._engine
    if "execute" in trt._faults:
        self._log.log(trt._classes["ILogger.Severity"].ERROR, "an illegal memory access")
        return False
    assert set(self._addresses) == set(_io(engine)), "every tensor needs an address"
    shapes, addresses = dict(self._shapes), dict(self._addresses)

    def compute() -> None:
        feeds = {
            name: _at(trt, addresses[name], kind, shapes[name]).copy()
            for name, kind, _ in engine._facts["inputs"]
        }
        names = [one[0] for one in engine._facts["outputs"]]
        for (name, kind, _), made in zip(
            engine._facts["outputs"], engine._session.run(names, feeds), strict=True
        ):
            _at(trt, addresses[name], kind, made.shape)[...] = made + made.dtype.type(trt._bias)

    trt._cudart.streams[stream].append(compute)
    return True


def _at(trt: Fake, address: int, kind: str, shape: tuple[int, ...]) -> Any:
    """The array in a buffer of the GPU."""
    dtype = np.dtype(_NUMPY[kind])
    size = int(np.prod(shape)) * dtype.itemsize
    memory = trt._cudart.live[address]
    assert size <= len(memory), "a tensor beyond its buffer"
    raw = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(raw, dtype).reshape(shape)


# Plugins


@does("get_plugin_registry")
def _(trt: Fake) -> Any:
    return trt.make("IPluginRegistry")


@does("IPluginRegistry.get_creator")
def _(trt: Fake, self: Any, name: str, version: str, namespace: str = "") -> Any:
    return trt._registry.get((name, version, namespace))


@does("IPluginRegistry.register_creator")
def _(trt: Fake, self: Any, creator: Any, namespace: str = "") -> bool:
    trt._registry[creator.name, creator.plugin_version, namespace] = creator
    return "register" not in trt._faults


@does("PluginField.__init__")
def _(trt: Fake, self: Any, name: str = "", data: Any = None, kind: Any = None) -> None:
    self._set_name, self._set_data, self._set_type = name, data, kind


@does("PluginFieldCollection.__init__")
def _(trt: Fake, self: Any, members: Any = ()) -> None:
    self._members = list(members)


for _name in ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuild", "IPluginV3OneRuntime"):
    BEHAVIOURS[f"{_name}.__init__"] = lambda trt, self, *given: None
BEHAVIOURS["IPluginCreatorV3One.__init__"] = lambda trt, self: None


def from_environment() -> Fake:
    """The module that the environment of a test asks for."""
    made = Fake(os.environ["RT_RIS_FAKE_TENSORRT"])
    if os.environ.get("RT_RIS_FAKE_FAULT"):
        made._faults.add(os.environ["RT_RIS_FAKE_FAULT"])
    if os.environ.get("RT_RIS_FAKE_SLOW"):  # a file that says that a build is under way

        def wait() -> None:
            Path(os.environ["RT_RIS_FAKE_SLOW"]).touch()
            time.sleep(0.02)

        made._during, made._steps = wait, 1500
    return made
