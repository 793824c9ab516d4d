"""Python classes with the names and signatures of TensorRT's bindings, made from their dumps.

They are as strict as the real ones: a name that a version lacks is an AttributeError, arguments
that fit no overload are a TypeError, a class without a constructor cannot be made, and a subclass
that forgets its base's ``__init__`` is refused. What a method does is looked up in a table of
behaviours (``fake_trt``); a name without one raises NotImplementedError. ``seen`` collects every
name that was asked for.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

API = Path(__file__).parent / "api"
VERSIONS = sorted(path.name.removesuffix(".json.gz") for path in API.glob("*.json.gz"))
Behaviours = Mapping[str, Callable[..., Any]]


def read_api(version: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress((API / f"{version}.json.gz").read_bytes()))
    return found


class Module(ModuleType):
    """A module of bindings."""

    def __init__(self, version: str, behaviours: Behaviours) -> None:
        super().__init__("tensorrt")
        self._api = read_api(version)
        self._behaviours = behaviours
        self._classes: dict[str, type] = {}
        self.seen: set[str] = set()
        self.__version__ = self._api["version"]
        for name in self._api["classes"]:
            self._class(name)
        for name, kind in self._classes.items():
            if "." not in name:
                setattr(self, name, kind)
            else:
                owner, _, short = name.rpartition(".")
                type.__setattr__(self._classes[owner], short, kind)
        for name in self._api["functions"]:
            setattr(self, name, _method(self, name, self._api["functions"][name], bound=False))
        for name, (enum, member) in self._api["constants"].items():
            setattr(self, name, getattr(self._classes[enum], member))
        for owner, described in self._api["classes"].items():
            for name, (enum, member) in described["constants"].items():
                type.__setattr__(self._classes[owner], name, getattr(self._classes[enum], member))

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("seen", "make"):
            self.seen.add(name)
        return super().__getattribute__(name)

    def make(self, name: str, **state: Any) -> Any:
        """An object that TensorRT itself would make; ``state`` is for its behaviours."""
        made = object.__new__(self._classes[name])
        for key, value in state.items():
            object.__setattr__(made, f"_{key}", value)
        return made

    def _class(self, name: str) -> type:
        if name not in self._classes:
            described = self._api["classes"][name]
            bases = tuple(
                self._class(base) for base in described["bases"] if base in self._api["classes"]
            )
            self._classes[name] = _make_class(self, name, described, bases or (Object,))
        return self._classes[name]


class _Kind(type):
    """The type of the classes: records names, and checks that bases were initialised."""

    def __getattribute__(cls, name: str) -> Any:
        module = type.__getattribute__(cls, "__dict__").get("_module")
        if module is not None and not name.startswith("_"):
            module.seen.add(name)
        return super().__getattribute__(name)

    def __call__(cls, *given: Any, **named: Any) -> Any:
        made = super().__call__(*given, **named)
        called = made.__dict__.get("_initialised", set())
        generated = [kind for kind in cls.__mro__ if "_module" in vars(kind)]
        for kind in generated:
            derived = any(kind in other.__mro__[1:] for other in generated)
            if not derived and kind.__name__ not in called:
                raise TypeError(f"{kind.__name__}.__init__() must be called when overriding it")
        return made


class Object(metaclass=_Kind):
    """What all of them are."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_"):
            module = getattr(type(self), "_module", None)
            if module is not None:
                module.seen.add(name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        kind = type(self)
        own = "_module" in vars(kind)  # a subclass in Python has a dictionary of its own
        if own and not name.startswith("_") and not isinstance(getattr(kind, name, None), property):
            raise AttributeError(f"'{kind.__name__}' object has no attribute '{name}'")
        kind._module.seen.add(name)  # type: ignore[attr-defined]
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


def _make_class(
    module: Module, name: str, described: Mapping[str, Any], bases: tuple[type, ...]
) -> type:
    body: dict[str, Any] = {"_module": module, "__init__": _constructor(module, name, described)}
    for key, signatures in described["methods"].items():
        if key != "__init__":
            body[key] = _method(module, f"{name}.{key}", signatures, bound=True)
    for key, facts in described["properties"].items():
        body[key] = _property(module, name, key, settable=facts["settable"])
    if described["members"]:
        body["__int__"] = body["__index__"] = lambda self: self._value
        body["__str__"] = lambda self: f"{name.rpartition('.')[2]}.{self._name}"
        body["name"] = property(lambda self: self._name)
    kind = _Kind(name.rpartition(".")[2], bases, body)
    for key, value in described["members"].items():
        member = object.__new__(kind)
        object.__setattr__(member, "_name", key)
        object.__setattr__(member, "_value", value)
        type.__setattr__(kind, key, member)
    return kind


def _constructor(module: Module, name: str, described: Mapping[str, Any]) -> Callable[..., None]:
    signatures = described["methods"].get("__init__", [])

    def __init__(self: Any, *given: Any, **named: Any) -> None:
        if not signatures:
            raise TypeError(f"{name}: No constructor defined!")
        values = _bound(module, f"{name}.__init__", signatures, (self, *given), named)
        self.__dict__.setdefault("_initialised", set()).add(name)
        behaviour = module._behaviours.get(f"{name}.__init__")
        if behaviour is not None:
            behaviour(module, *values)

    return __init__


def _method(module: Module, name: str, signatures: list[Any], *, bound: bool) -> Callable[..., Any]:
    def call(*given: Any, **named: Any) -> Any:
        values = _bound(module, name, signatures, given, named)
        if name not in module._behaviours:
            raise NotImplementedError(f"the fake has no {name}")
        return module._behaviours[name](module, *values)

    return call


def _property(module: Module, owner: str, name: str, *, settable: bool) -> property:
    def get(self: Any) -> Any:
        if f"_set_{name}" in self.__dict__:
            return self.__dict__[f"_set_{name}"]
        if f"{owner}.{name}" not in module._behaviours:
            raise NotImplementedError(f"the fake has no {owner}.{name}")
        return module._behaviours[f"{owner}.{name}"](module, self)

    def put(self: Any, value: object) -> None:
        self.__dict__[f"_set_{name}"] = value

    return property(get, put if settable else None)


def _bound(
    module: Module,
    name: str,
    signatures: list[Any],
    given: tuple[Any, ...],
    named: Mapping[str, Any],
) -> tuple[Any, ...]:
    """The arguments in order, if an overload takes them."""
    for arguments, _ in signatures:
        values = _matched(module, arguments, given, named)
        if values is not None:
            return values
    if signatures:
        shown = [type(value).__name__ for value in given]
        raise TypeError(f"{name}(): incompatible function arguments {shown}; {signatures}")
    return given


def _matched(
    module: Module, arguments: list[Any], given: tuple[Any, ...], named: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    names = [name for name, _, _ in arguments]
    if len(given) > len(names) or set(named) - set(names[len(given) :]):
        return None
    values = []
    for at, (name, kind, optional) in enumerate(arguments):
        if at >= len(given) and name not in named:
            if not optional:
                return None
            continue
        value = given[at] if at < len(given) else named[name]
        if not _fits(module, kind, value):
            return None
        values.append(value)
    return tuple(values)


def _fits(module: Module, kind: str, value: object) -> bool:
    """As pybind11 converts: integers from what has an index, shapes from tuples and lists."""
    if kind in ("int", "typing.SupportsInt", "typing.SupportsInt | typing.SupportsIndex"):
        return hasattr(value, "__index__")
    if kind in ("str", "bool", "tuple", "list"):
        return isinstance(value, {"str": str, "bool": bool, "tuple": tuple, "list": list}[kind])
    if kind == "buffer" or kind.endswith(".Buffer"):
        return hasattr(value, "__array_interface__") or isinstance(value, bytes | bytearray)
    if kind == "FallbackString" and isinstance(value, str | bytes):
        return True
    if kind == "Dims" and isinstance(value, tuple | list):
        return all(hasattr(axis, "__index__") for axis in value)
    if kind in module._classes:
        return isinstance(value, module._classes[kind])
    return True
