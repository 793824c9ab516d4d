"""Reading of Python-2 pickles that may come from anywhere.

RefCOCO's annotations are published as pickles, and a pickle is a program: loading one with
`pickle.load` runs whatever its author wrote. The files that the field really uses hold lists,
dicts, strings and numbers only, so this unpickler knows nothing else.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

from rt_ris.errors import DataError

# Protocol 2 writes these two by name; every other builtin container or scalar has its own opcode.
_ALLOWED: dict[tuple[str, str], type] = {
    ("__builtin__", "set"): set,
    ("__builtin__", "frozenset"): frozenset,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
}


class _PlainUnpickler(pickle.Unpickler):
    """An unpickler that resolves no name except those of the builtin sets."""

    def find_class(self, module: str, name: str) -> type:
        try:
            return _ALLOWED[module, name]
        except KeyError:
            message = (
                f"it asks for {module}.{name}, which is neither a builtin container nor a number "
                "or string"
            )
            raise pickle.UnpicklingError(message) from None

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError(f"it refers to an object outside the file ({pid!r})")


def load_plain_pickle(path: Path) -> object:
    """Load a pickle made of builtin containers, strings and numbers, and nothing else.

    Strings of Python 2 are decoded as latin-1, which never fails and keeps ASCII as it is.

    Raises:
        DataError: if the file cannot be read, is damaged, or asks for any class or function.
    """
    try:
        stream = io.BytesIO(path.read_bytes())
        return _PlainUnpickler(stream, encoding="latin1").load()
    except OSError as error:
        raise DataError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(
            f"Refused to load the pickle '{path}': {error}. Accepted are pickles of lists, dicts, "
            "tuples, sets, strings, numbers, booleans and None, as RefCOCO publishes them. If the "
            "file is damaged, fetch it again; if you trust it, convert it to JSON and name it "
            f"'{path.with_suffix('.json').name}'."
        ) from error
