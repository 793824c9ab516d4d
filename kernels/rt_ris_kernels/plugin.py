"""Masked mutual attention as a TensorRT plugin that launches the shipped kernels.

One class for TensorRT 10.3 and later, TensorRT 11 and TensorRT-RTX: they share ``IPluginV3``, and
the module is given. The engine stores the plugin's name, version, namespace and fields; whoever
deserialises it must have called ``register`` before, or TensorRT refuses the engine.

Where the plugin is not registered, TensorRT inlines the operator's ONNX function instead. That is
the way for GPUs before compute capability 8.0 and for channel counts without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rt_ris.errors import PluginError
from rt_ris_kernels.geometry import CHANNELS, workspace_bound
from rt_ris_kernels.launch import MaskedMutualAttentionLauncher
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION as SPEC

VERSION = str(SPEC.version)
OpenLauncher = Callable[[], MaskedMutualAttentionLauncher]


def register(trt: Any, *, open_launcher: OpenLauncher = MaskedMutualAttentionLauncher) -> None:
    """Makes the plugin known to a TensorRT; a second call changes nothing.

    Args:
        trt: the imported ``tensorrt`` or ``tensorrt_rtx``.
        open_launcher: opens the kernels; called when an engine is about to run, so that engines
            can be built on a machine without a GPU.

    Raises:
        PluginError: TensorRT refused the plugin, or has no ``IPluginV3`` (before 10.0).
    """
    if not hasattr(trt, "IPluginV3"):
        raise PluginError(
            f"TensorRT {getattr(trt, '__version__', '?')} has no IPluginV3; 10.3 or later has."
        )
    registry = trt.get_plugin_registry()
    if registry.get_creator(SPEC.op_type, VERSION, SPEC.domain) is not None:
        return
    creator = creator_type(trt)(open_launcher)
    if not registry.register_creator(creator, SPEC.domain):
        raise PluginError(f"TensorRT refused the plugin {SPEC.op_type} in '{SPEC.domain}'.")
    _REGISTERED.append(creator)


_REGISTERED: list[object] = []
"""TensorRT keeps no reference of its own to a creator written in Python."""


class Fields:
    """The operator's attributes as TensorRT's fields, in the operator's order.

    TensorRT reads them by address after the call that returned them, and its Python fields do not
    keep their numbers alive; so whoever returns ``collection`` keeps this object.
    """

    def __init__(self, trt: Any, attributes: Mapping[str, float | int]) -> None:
        self.numbers = {
            name: np.array([attributes[name]], np.int32 if isinstance(kind, int) else np.float32)
            for name, kind in SPEC.attributes.items()
        }
        self.members = [
            trt.PluginField(
                name,
                number,
                trt.PluginFieldType.INT32
                if number.dtype == np.int32
                else trt.PluginFieldType.FLOAT32,
            )
            for name, number in self.numbers.items()
        ]
        self.collection = trt.PluginFieldCollection(self.members)


def read_fields(given: Any) -> dict[str, float | int]:
    """Attributes from TensorRT's fields; those that are missing have the operator's defaults."""
    attributes = dict(SPEC.attributes)
    for field in given:
        if field.name in attributes:
            attributes[field.name] = np.asarray(field.data).ravel()[0].item()
    return attributes


def plugin_type(trt: Any) -> Any:
    """The plugin's class over a TensorRT module."""

    # The bases come from the module given, so they have no type.
    class MaskedMutualAttention(
        trt.IPluginV3,  # type: ignore[misc]
        trt.IPluginV3OneCore,  # type: ignore[misc]
        trt.IPluginV3OneBuild,  # type: ignore[misc]
        trt.IPluginV3OneRuntime,  # type: ignore[misc]
    ):
        """See the module."""

        def __init__(self, attributes: dict[str, float | int], open_launcher: OpenLauncher) -> None:
            for base in (
                trt.IPluginV3,
                trt.IPluginV3OneCore,
                trt.IPluginV3OneBuild,
                trt.IPluginV3OneRuntime,
            ):
                base.__init__(self)
            self.plugin_name = SPEC.op_type
            self.plugin_version = VERSION
            self.plugin_namespace = SPEC.domain
            self.num_outputs = len(SPEC.outputs)
            self.timing_cache_id = ""
            self.attributes = attributes
            self.fields = Fields(trt, attributes)
            self.open_launcher = open_launcher
            self.launcher: MaskedMutualAttentionLauncher | None = None

        def get_capability_interface(self, kind: object) -> object:
            return self

        def clone(self) -> object:
            twin = MaskedMutualAttention(dict(self.attributes), self.open_launcher)
            twin.launcher = self.launcher
            return twin

        def get_fields_to_serialize(self) -> object:
            return self.fields.collection

        def get_output_data_types(self, types: Sequence[object]) -> list[object]:
            return [types[0], types[0]]

        def get_output_shapes(self, inputs: Any, shape_inputs: object, builder: object) -> object:
            z_v, z_l = inputs[0], inputs[1]
            pixels = trt.DimsExprs(3)
            pixels[0], pixels[1], pixels[2] = z_l[0], z_v[1], z_v[2]
            return [pixels, trt.DimsExprs(z_l)]

        def supports_format_combination(self, at: int, tensors: Any, inputs: int) -> bool:
            desc = tensors[at].desc
            return (
                desc.format == trt.TensorFormat.LINEAR
                and desc.type in (trt.DataType.HALF, trt.DataType.FLOAT)
                and desc.type == tensors[0].desc.type
            )

        def configure_plugin(self, inputs: Any, outputs: Any) -> None:
            channels = inputs[0].desc.dims[2]
            if channels not in CHANNELS:
                raise PluginError(
                    f"{SPEC.op_type} has kernels for {CHANNELS} channels, not {channels}; build "
                    "without the plugin, and TensorRT inlines the operator."
                )

        def get_workspace_size(self, inputs: Any, outputs: object) -> int:
            expressions, words, channels = inputs[1].max
            return workspace_bound(expressions=expressions, words=words, channels=channels)

        def get_valid_tactics(self) -> list[int]:
            return []

        def set_tactic(self, tactic: int) -> None:
            """There is one."""

        def on_shape_change(self, inputs: object, outputs: object) -> None:
            """Sizes are read at each call."""

        def attach_to_context(self, context: object) -> object:
            ready = self.clone()
            ready.launcher = self.launcher or self.open_launcher()  # type: ignore[attr-defined]
            return ready

        def enqueue(
            self,
            input_desc: Any,
            output_desc: object,
            inputs: Sequence[int],
            outputs: Sequence[int],
            workspace: int,
            stream: int,
        ) -> None:
            launcher = self.launcher = self.launcher or self.open_launcher()
            z_v, z_l = input_desc[0], input_desc[1]
            expressions, words, channels = z_l.dims
            sizes = {"expressions": expressions, "pixels": z_v.dims[1], "words": words}
            half = z_v.type == trt.DataType.HALF
            plan = launcher.geometry(
                **sizes, channels=channels, dtype="float16" if half else "float32"
            )
            launcher.launch_unchecked(
                [*inputs, *outputs],
                workspace=workspace,
                plan=plan,
                sizes=sizes,
                shared=z_v.dims[0] == 1,
                stream=stream,
                attributes=self.attributes,
            )

    return MaskedMutualAttention


def creator_type(trt: Any) -> Any:
    """The class of the plugin's creator over a TensorRT module."""
    plugin = plugin_type(trt)

    class MaskedMutualAttentionCreator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        """What TensorRT calls at parsing and at deserialising."""

        def __init__(self, open_launcher: OpenLauncher) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name = SPEC.op_type
            self.plugin_version = VERSION
            self.plugin_namespace = SPEC.domain
            self.fields = Fields(trt, SPEC.attributes)
            self.field_names = self.fields.collection
            self.open_launcher = open_launcher

        def create_plugin(self, name: str, given: object, phase: object) -> object:
            return plugin(read_fields(given), self.open_launcher)

    return MaskedMutualAttentionCreator
