"""The names of TensorRT that the plugin uses, without TensorRT: to call the plugin by hand."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

__version__ = "0"


class IPluginV3: ...


class IPluginV3OneCore: ...


class IPluginV3OneBuild: ...


class IPluginV3OneRuntime: ...


class IPluginCreatorV3One: ...


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1
    INT8 = 2


class TensorFormat(enum.Enum):
    LINEAR = 0
    CHW2 = 1


class PluginFieldType(enum.Enum):
    FLOAT32 = 1
    INT32 = 5


@dataclass
class PluginField:
    name: str
    data: Any
    type: PluginFieldType


class PluginFieldCollection(list[PluginField]): ...


class DimsExprs(list[Any]):
    def __init__(self, source: int | list[Any]) -> None:
        super().__init__([None] * source if isinstance(source, int) else source)


@dataclass
class Registry:
    creators: dict[tuple[str, str, str], Any] = field(default_factory=dict)
    refuses: bool = False

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get((name, version, namespace))

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return not self.refuses


REGISTRY = Registry()


def get_plugin_registry() -> Registry:
    return REGISTRY


def desc(dims: tuple[int, ...], type: DataType = DataType.HALF) -> SimpleNamespace:
    """A PluginTensorDesc; wrapped for building, a DynamicPluginTensorDesc."""
    return SimpleNamespace(dims=dims, type=type, format=TensorFormat.LINEAR)


def dynamic(dims: tuple[int, ...], type: DataType = DataType.HALF) -> SimpleNamespace:
    return SimpleNamespace(desc=desc(dims, type), min=dims, max=dims)
