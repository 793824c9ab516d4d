"""Strict conversion between plain data (JSON, TOML) and frozen dataclasses.

The annotations of a dataclass are its format: what they do not allow is refused, with the path of
the offending field. Understood are ``int``, ``float``, ``str``, ``bool``, ``None``, ``Literal``,
unions, ``tuple[X, ...]``, ``tuple[X, Y]``, ``Mapping[str, X]`` and nested dataclasses.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any, Final, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from rt_ris.errors import ManifestError

Record = TypeVar("Record")


def parse_json(raw: bytes) -> object:
    """Parse UTF-8 JSON; a duplicate key, NaN, an infinity or absurd nesting is an error.

    Raises:
        ManifestError: the bytes are not such a document.
    """
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"The document is not valid JSON in UTF-8: {error}.") from error


def to_json(record: object) -> bytes:
    """The JSON document of a dataclass: UTF-8, fields in declared order, final newline.

    Raises:
        ManifestError: a value that JSON cannot hold, such as NaN.
    """
    try:
        text = json.dumps(to_data(record), indent=1, ensure_ascii=False, allow_nan=False)
        return text.encode("utf-8") + b"\n"
    except (TypeError, ValueError) as error:
        raise ManifestError(f"A value cannot be written as JSON: {error}.") from error


def to_data(value: object) -> object:
    """Plain dicts, lists and scalars with the content of a dataclass."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value) if field.init)
        return {name: to_data(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {key: to_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_data(item) for item in value]
    return value


def from_data(kind: type[Record], data: object, *, path: str = "") -> Record:
    """A dataclass made from plain data.

    Args:
        kind: the dataclass.
        data: what a JSON or TOML parser returned.
        path: where ``data`` sits in its document, for messages.

    Raises:
        ManifestError: an unknown or missing field, or a value of another type; ``field`` holds
            its path, such as ``stages[0].inputs[1].dtype``.
    """
    if not isinstance(data, dict):
        raise _mismatch(path, data, "an object")
    hints = _hints(cast(Hashable, kind))
    fields = {field.name: field for field in dataclasses.fields(cast(Any, kind)) if field.init}
    unknown = sorted(str(name) for name in set(data) - set(fields))
    if unknown:
        known = ", ".join(fields)
        raise ManifestError(
            f"Unknown field '{_join(path, unknown[0])}'; known here are {known}.",
            field=_join(path, unknown[0]),
        )
    missing = [name for name, field in fields.items() if name not in data and _required(field)]
    if missing:
        where = _join(path, missing[0])
        raise ManifestError(f"Field '{where}' is missing.", field=where)
    return kind(
        **{
            name: _decode(hints[name], data[name], _join(path, name))
            for name in fields
            if name in data
        }
    )


def _required(field: dataclasses.Field[Any]) -> bool:
    absent = dataclasses.MISSING
    return field.default is absent and field.default_factory is absent


@lru_cache(maxsize=64)
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(cast(Any, kind))


def _decode(hint: object, value: object, path: str) -> object:
    origin = cast(Any, get_origin(hint))
    if origin is Literal:
        if value not in get_args(hint) or isinstance(value, bool):
            raise _mismatch(path, value, "one of " + ", ".join(map(str, get_args(hint))))
        return value
    if origin is Union or origin is types.UnionType:
        return _decode_union(get_args(hint), value, path)
    if origin is tuple:
        return _decode_tuple(get_args(hint), value, path)
    if origin is not None and issubclass(origin, Mapping):
        return _decode_mapping(get_args(hint)[1], value, path)
    if dataclasses.is_dataclass(hint):
        return from_data(cast(type[object], hint), value, path=path)
    return _decode_scalar(hint, value, path)


MAX_INTEGER: Final = 2**63 - 1
"""What readers in other languages hold; larger sizes would fail far from here."""

_LARGEST: Final = sys.float_info.max


def _decode_scalar(hint: object, value: object, path: str) -> object:
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= _LARGEST:  # an integer may be beyond any float
            raise _mismatch(path, value, "a finite number")
        return float(value)
    if hint is int and type(value) is int and abs(value) > MAX_INTEGER:
        raise _mismatch(path, value, f"an integer of at most {MAX_INTEGER}")
    if type(value) is not hint and not (hint is types.NoneType and value is None):
        raise _mismatch(path, value, _NAMES[hint])
    if isinstance(value, str) and not value.isprintable():
        raise _mismatch(path, value, "one line of printable text")
    return value


_NAMES: dict[object, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    types.NoneType: "null",
}


def _decode_union(hints: tuple[Any, ...], value: object, path: str) -> object:
    for hint in hints:
        try:
            return _decode(hint, value, path)
        except ManifestError as error:
            if error.field != path:  # the right kind of value, wrong further inside
                raise
    accepted = " or ".join(_NAMES.get(hint, getattr(hint, "__name__", str(hint))) for hint in hints)
    raise _mismatch(path, value, accepted)


def _decode_tuple(hints: tuple[Any, ...], value: object, path: str) -> tuple[object, ...]:
    if not isinstance(value, list):
        raise _mismatch(path, value, "a list")
    kinds = [hints[0]] * len(value) if hints[-1] is Ellipsis else list(hints)
    if len(kinds) != len(value):
        raise _mismatch(path, value, f"a list of {len(kinds)}")
    return tuple(
        _decode(kind, item, f"{path}[{index}]")
        for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    )


def _decode_mapping(hint: object, value: object, path: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _mismatch(path, value, "an object")
    for key in value:
        if not isinstance(key, str) or not key.isprintable():
            raise _mismatch(path, key, "names of printable text")
    return types.MappingProxyType(
        {key: _decode(hint, item, _join(path, key)) for key, item in value.items()}
    )


def _mismatch(path: str, value: object, accepted: str) -> ManifestError:
    shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    where = path or "the document"
    return ManifestError(f"Field '{where}' is {shown}; accepted is {accepted}.", field=path)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ManifestError(f"The key '{twice}' appears twice in one object.", field=twice)
    return found


def _refuse_constant(name: str) -> object:
    raise ManifestError(f"The number {name} is not JSON.")
