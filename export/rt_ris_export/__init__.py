"""From a checkpoint to a gated bundle; needs the extra ``export``.

``export_bundle(ExportRecipe(arch="maris"))`` writes ``./maris-lite.bundle``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rt_ris_export.export import export_bundle as export_bundle
    from rt_ris_export.recipe import ExportRecipe as ExportRecipe

__all__ = ["ExportRecipe", "export_bundle"]


def __getattr__(name: str) -> object:
    """Import torch and onnx only when something is asked for."""
    if name == "ExportRecipe":
        from rt_ris_export.recipe import ExportRecipe

        return ExportRecipe
    if name == "export_bundle":
        from rt_ris_export.export import export_bundle

        return export_bundle
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
