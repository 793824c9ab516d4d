"""The kinds of artefacts that steps pass on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rt_ris_export.parity_record import ParityRecord
from rt_ris_export.step import Kind
from rt_ris_train.checkpoint import LoadedNetwork
from rt_ris_train.official import Imported

NETWORK: Final = Kind[LoadedNetwork]("network")
"""The network to export, in evaluation mode."""

WEIGHTS: Final = Kind[tuple[Imported, ...]]("weights")
"""The published files that filled frozen encoders."""

GRAPHS: Final = Kind[Mapping[str, Path]]("graphs")
"""ONNX files by stage id, in running order."""

PARITY: Final = Kind[ParityRecord]("parity")
"""The gate's measurements; exists only if the gate was passed."""

GOLDEN: Final = Kind[bytes]("golden")
"""``golden.npz``: inputs from the gate and what PyTorch answers."""

MEASURED: Final = Kind[Mapping[str, str]]("measured")
"""SHA-256 of the files that the gate measured, by name."""

SEALED: Final = Kind[Path]("sealed bundle")
"""The bundle in the workspace, before the runtime has replayed it."""

BUNDLE: Final = Kind[Path]("bundle")
"""The bundle in its place."""
