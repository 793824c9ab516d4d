"""Builds an ONNX file with TensorRT-RTX, without a GPU; prints one JSON document.

In a process of its own, because the library aborts the process on some faults and must find its own
unversioned name before it starts.
"""

from __future__ import annotations

import hashlib
import json
import sys

import tensorrt_rtx as trt

from rt_ris.build.log import error_log
from rt_ris_kernels import plugin

NAME = b"MaskedMutualAttention"


def build(path: str, sm: int) -> dict[str, object]:
    log = error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        return {"sm": sm, "errors": [str(parser.get_error(i)) for i in range(parser.num_errors)]}
    kinds = [str(network.get_layer(i).type).split(".")[-1] for i in range(network.num_layers)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = list(tensor.shape)
        if -1 in sizes:
            shapes = [
                [value if size == -1 else size for size, value in zip(sizes, values, strict=True)]
                for values in RANGES[tensor.name]
            ]
            profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"sm": sm, "errors": log.errors}
    data = bytes(plan)
    return {
        "sm": sm,
        "errors": log.errors,
        "layers": len(kinds),
        "plugin_layers": kinds.count("PLUGIN_V3"),
        "named_in_plan": NAME in data,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
    }


RANGES = {
    "z_l": ([1, 1, 256], [1, 25, 256], [16, 80, 256]),
    "word_mask": ([1, 1], [1, 25], [16, 80]),
}


def main() -> None:
    path, how, *sms = sys.argv[1:]
    if how == "plugin":
        plugin.register(trt)
        plugin.register(trt)  # a second time changes nothing
    elif how != "inlined":
        registry = trt.get_plugin_registry()
        assert registry.load_library(how) is not None
        assert registry.get_creator(NAME.decode(), plugin.VERSION, "rt_ris") is not None
        plugin.register(trt)  # there is one of this name, so this changes nothing
    print(json.dumps([build(path, int(sm)) for sm in sms]))


if __name__ == "__main__":
    main()
