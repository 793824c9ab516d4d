"""For all tests: hypothesis, and a watch over what parsers of a bundle's files are given."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import pytest
import tokenizers

import rt_ris.backends  # before anything imports ONNX Runtime: it switches telemetry off
import rt_ris.build.replay
import rt_ris.bundle
from rt_ris.errors import IntegrityError

# New examples are for those who write the code; a landing must not hang on the luck of a draw.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


class Watch:
    """Stands before every parser of a bundle's files, and notes the bytes that it is given.

    What a parser made is kept by its bytes, so that thousands of loads are quick.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        onnxruntime = pytest.importorskip("onnxruntime")
        self.seen: list[bytes] = []
        self._made: dict[bytes, Any] = {}
        patch = monkeypatch.setattr
        patch(rt_ris.bundle, "parse_manifest", self._before(rt_ris.bundle.parse_manifest))
        patch(rt_ris.build.replay, "parse_json", self._before(rt_ris.build.replay.parse_json))
        patch(np, "load", self._before(np.load, keep=False))
        patch(onnxruntime, "InferenceSession", self._before(onnxruntime.InferenceSession))
        reader = SimpleNamespace(from_buffer=self._before(tokenizers.Tokenizer.from_buffer))
        patch("rt_ris.text.tokenizers", SimpleNamespace(Tokenizer=reader))

    def _before(self, parser: Callable[..., Any], *, keep: bool = True) -> Callable[..., Any]:
        def noted(source: bytes | io.BytesIO, *args: object, **options: object) -> object:
            raw = source.getvalue() if isinstance(source, io.BytesIO) else source
            self.seen.append(raw)
            if not keep:
                return parser(source, *args, **options)
            if raw not in self._made:
                self._made[raw] = parser(source, *args, **options)
            return self._made[raw]

        return noted

    def flip(
        self, path: Path, places: Iterable[int], use: Callable[[], object], *, unparsed: bool
    ) -> int:
        """Flip a bit of each of these bytes in turn; each time ``use`` must refuse the bundle.

        ``unparsed``: no parser may be given anything; else only what is not this file. Returns how
        many bytes were flipped.
        """
        count = 0
        with path.open("r+b", buffering=0) as stream:
            for place in places:
                byte = os.pread(stream.fileno(), 1, place)
                os.pwrite(stream.fileno(), bytes([byte[0] ^ 1 << place % 8]), place)
                spoilt = path.read_bytes()
                self.seen.clear()
                with pytest.raises(IntegrityError) as caught:
                    use()
                assert caught.value.exit_code == 5
                assert not (unparsed and self.seen), (path.name, place)
                assert spoilt not in self.seen, (path.name, place)
                os.pwrite(stream.fileno(), byte, place)
                count += 1
        return count


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)
