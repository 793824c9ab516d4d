"""Weight files that others publish, read without running anything that they name.

Taken are safetensors, what ``torch.save`` writes in both of its forms, and TorchScript archives,
which OpenAI's CLIP files are. A pickle is a program that may call anything; the reader here calls
nothing: tensors and plain containers are built, and whatever else a file names (arguments of a
training run, optimisers, NumPy scores) becomes an inert stand-in.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rt_ris.errors import CheckpointError

CONTAINERS: Final = ("state_dict", "model", "module")
"""Keys under which a file may hold its one state dict."""

WRAPPER: Final = "module."
OLD_NAMES: Final = {
    ".LayerNorm.gamma": ".LayerNorm.weight",
    ".LayerNorm.beta": ".LayerNorm.bias",
}
"""Endings of BERT's first files, and what they are called since."""

_LEGACY_MAGIC: Final = 0x1950A86A20F9469CFC6C
_DTYPES: Final[Mapping[str, torch.dtype]] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_ACCEPTED: Final = (
    "Accepted are safetensors files, torch.save files of a state dict and CLIP's TorchScript "
    "archives; nothing in a file is run."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Storage:
    """The bytes that tensors share, read when they are asked for.

    Attributes:
        dtype: of its elements.
        source: what holds the bytes, by its keys.
        key: which of them.
    """

    dtype: torch.dtype
    source: Mapping[str, bytes]
    key: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Pending:
    """A tensor whose bytes have not been read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """Read it.

        Raises:
            CheckpointError: the bytes are not there, or too few.
        """
        try:
            raw = bytearray(self.storage.source[self.storage.key])
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"The bytes of a tensor of shape {list(self.shape)} cannot be read ({error}); "
                "download the file again."
            ) from error
        dtype = self.storage.dtype
        whole = len(raw) // dtype.itemsize
        flat = torch.frombuffer(raw, dtype=dtype, count=whole) if whole else torch.empty(0)
        needed = (
            1
            + self.offset
            + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        )
        if 0 not in self.shape and needed > flat.numel():
            raise CheckpointError(
                f"A tensor of shape {list(self.shape)} is cut off in the file; download it again."
            )
        return torch.as_strided(flat, self.shape, self.stride, self.offset)


class StandIn:
    """What a file names and nobody builds: takes everything, does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[str, Any] = {}

    def __call__(self, *_: object) -> StandIn:
        """Stand for the result of a call as well."""
        return StandIn(self.name)

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        self.state[str(key)] = value

    def append(self, value: object) -> None:
        """Take an element."""

    def extend(self, values: object) -> None:
        """Take elements."""


def read_tree(path: Path) -> object:
    """Everything plain in a file: containers, numbers, texts, tensors (perhaps ``Pending``).

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no weight file '{path}'.")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        if zipfile.is_zipfile(path):
            return _read_zip(path)
        if _first_bytes(path, 4) == b"PK\x03\x04":
            raise ValueError("an archive whose end is missing: half a download?")
        return _read_legacy(path)
    except CheckpointError:
        raise
    except (SafetensorError, Exception) as error:  # a damaged file fails in any way it likes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"'{path}' cannot be read as plain tensors ({reason}).{_looks_like(path)} {_ACCEPTED}"
        ) from error


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def tensors_of(tree: object, path: Path, containers: Sequence[str] = ()) -> dict[str, Any]:
    """The named tensors in what ``read_tree`` gave.

    Args:
        tree: what it gave.
        path: for messages.
        containers: keys that each hold a state dict, whose names they precede; empty for a file
            with one state dict.

    Raises:
        CheckpointError: there is no state dict, or one that holds more than tensors.
    """
    if isinstance(tree, StandIn):  # a scripted module: its attributes are its state
        tree = dict(_attributes(tree))
    if not isinstance(tree, dict):
        raise CheckpointError(f"'{path}' holds no state dict of tensors. {_ACCEPTED}")
    if containers:
        found: dict[str, Any] = {}
        for container in containers:
            inner = tree.get(container)
            if isinstance(inner, dict):
                found |= {f"{container}.{name}": value for name, value in _named(inner)}
        return _checked(found, path)
    for container in CONTAINERS:
        if isinstance(tree.get(container), dict):
            tree = tree[container]
            assert isinstance(tree, dict)
    return _checked(dict(_named(tree)), path)


def loaded(value: Tensor | Pending, name: str, *, weights: bool = True) -> Tensor:
    """A tensor that can be copied into a network.

    Args:
        value: what the file holds.
        name: its name there, for messages.
        weights: weights are expected, not a table of indices or a count.

    Raises:
        CheckpointError: it is sparse, not finite, or of another kind of number.
    """
    tensor = value.load() if isinstance(value, Pending) else value
    if tensor.layout != torch.strided:
        raise CheckpointError(f"Tensor '{name}' is sparse; dense ones are accepted.")
    if weights and not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"Tensor '{name}' is of {kind}; real numbers are expected (is the file quantised?)."
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"Tensor '{name}' holds NaN or infinity; the file is damaged.")
    return tensor


def shape_of(value: Tensor | Pending) -> tuple[int, ...]:
    """Its shape, without reading it."""
    return tuple(value.shape)


def _named(state: Mapping[object, object]) -> Iterator[tuple[str, object]]:
    for key, value in state.items():
        name = str(key).removeprefix(WRAPPER)
        for old, new in OLD_NAMES.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        yield name, value


def _checked(found: dict[str, Any], path: Path) -> dict[str, Any]:
    for name, value in found.items():
        if not isinstance(value, Tensor | Pending):
            what = value.name if isinstance(value, StandIn) else type(value).__name__
            raise CheckpointError(
                f"'{path}' cannot be read as plain tensors (among the weights, '{name}' asks for "
                f"{what}). {_ACCEPTED}"
            )
    if not found:
        raise CheckpointError(f"'{path}' holds no state dict of tensors. {_ACCEPTED}")
    return found


def _attributes(module: StandIn, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Tensors of a scripted module and of those inside it, under their dotted names."""
    for name, value in module.state.items():
        if isinstance(value, StandIn):
            yield from _attributes(value, f"{prefix}{name}.")
        elif isinstance(value, Tensor | Pending):
            yield f"{prefix}{name}", value


class _Reader(pickle.Unpickler):
    """Builds tensors and plain containers; everything else becomes a stand-in."""

    def __init__(self, file: IO[bytes], source: Mapping[str, bytes]) -> None:
        super().__init__(file, encoding="latin1")
        self.source = source

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 # pickle's own face
        if (module, name) in _BUILT:
            return _BUILT[module, name]
        if module in ("torch", "torch.storage") and name in _DTYPES:
            return _DTYPES[name]
        return _Named(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage:  # noqa: ANN401 # pickle's own face
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise CheckpointError(f"The file refers to something outside it ({pid!r}).")
        dtype = pid[1] if isinstance(pid[1], torch.dtype) else torch.uint8
        return Storage(dtype=dtype, source=self.source, key=str(pid[2]))


class _Named(type):
    """A class of stand-ins, since pickle insists on classes where it makes objects."""

    def __new__(cls, name: str) -> _Named:
        return super().__new__(cls, "Named", (StandIn,), {"__new__": _inert, "full_name": name})

    def __init__(cls, name: str) -> None:
        super().__init__("Named", (StandIn,), {})

    def __call__(cls, *_: object, **__: object) -> StandIn:
        return StandIn(str(cls.__dict__["full_name"]))


def _inert(cls: type, *_: object) -> StandIn:
    return StandIn(str(cls.__dict__["full_name"]))


def _rebuild(storage: Storage, offset: int, shape: Any, stride: Any, *_: object) -> Pending:  # noqa: ANN401
    return Pending(storage=storage, offset=offset, shape=tuple(shape), stride=tuple(stride))


def _rebuild_old(storage: Storage, offset: int, shape: Any, stride: Any) -> Pending:  # noqa: ANN401
    return _rebuild(storage, offset, shape, stride)


def _first(value: object, *_: object) -> object:
    return value


class _Ordered(dict[Any, Any]):
    """In the place of an OrderedDict, whose notes about versions are its attributes."""


_BUILT: Final[Mapping[tuple[str, str], Any]] = {
    ("collections", "OrderedDict"): _Ordered,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor"): _rebuild_old,
    ("torch._utils", "_rebuild_parameter"): _first,
    ("torch.jit._pickle", "build_intlist"): list,
    ("torch.jit._pickle", "build_doublelist"): list,
    ("torch.jit._pickle", "build_boollist"): list,
    ("torch.jit._pickle", "build_tensorlist"): list,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
}


class _Archive(Mapping[str, bytes]):
    """The storages of a zip file, by their keys."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self.archive, self.folder = archive, folder

    def __getitem__(self, key: str) -> bytes:
        return self.archive.read(f"{self.folder}{key}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.archive.namelist())

    def __len__(self) -> int:
        return len(self.archive.namelist())


def _read_zip(path: Path) -> object:
    archive = zipfile.ZipFile(path)
    name = next((n for n in archive.namelist() if n.endswith("/data.pkl")), None)
    if name is None:
        raise CheckpointError(f"'{path}' is a zip file without weights. {_ACCEPTED}")
    source = _Archive(archive, name.removesuffix("data.pkl") + "data/")
    return _Reader(io.BytesIO(archive.read(name)), source).load()


def _read_legacy(path: Path) -> object:
    """What ``torch.save`` wrote before version 1.6: pickles in a row, then the storages."""
    storages: dict[str, bytes] = {}
    with path.open("rb") as file:
        if _Reader(file, {}).load() != _LEGACY_MAGIC:
            raise CheckpointError(f"'{path}' is no weight file.{_looks_like(path)} {_ACCEPTED}")
        for _ in range(2):  # the protocol's version, and facts about the machine
            _Reader(file, {}).load()
        reader = _LegacyReader(file, storages)
        tree = reader.load()
        for key in _Reader(file, {}).load():
            count = int.from_bytes(file.read(8), "little")
            storages[str(key)] = file.read(count * reader.dtypes[str(key)].itemsize)
    return tree


class _LegacyReader(_Reader):
    """Remembers each storage's dtype, which the storages themselves do not say."""

    def __init__(self, file: IO[bytes], source: Mapping[str, bytes]) -> None:
        super().__init__(file, source)
        self.dtypes: dict[str, torch.dtype] = {}

    def persistent_load(self, pid: Any) -> Storage:  # noqa: ANN401 # pickle's own face
        storage = super().persistent_load(pid)
        self.dtypes[storage.key] = storage.dtype
        return storage


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _looks_like(path: Path) -> str:
    """A guess from the first bytes."""
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return " It is a web page: the download went to a page instead of the file."
    if start.startswith(b"version https://git-lfs"):
        return " It is a pointer of git-lfs: fetch the file itself (git lfs pull)."
    return " Is it complete? Compare its size with the published one."
