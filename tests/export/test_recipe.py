from __future__ import annotations

from pathlib import Path

import pytest

from rt_ris.cli import export as verb
from rt_ris.errors import RecipeError
from rt_ris_export.recipe import PRECISIONS, TARGETS, ExportRecipe


def test_defaults() -> None:
    recipe = ExportRecipe(arch="maris")
    assert recipe.output("lite") == Path("maris-lite.bundle")
    assert (recipe.precision, recipe.target, recipe.overwrite) == ("fp32", "onnx", False)


def test_the_verb_offers_what_the_recipe_accepts() -> None:
    assert verb.PRECISIONS == PRECISIONS
    assert verb.TARGETS == TARGETS


def test_from_mapping_turns_text_into_paths() -> None:
    recipe = ExportRecipe.from_mapping(
        {"arch": "maris", "out": "a.bundle", "weights": {"sam": "b.pth"}, "tolerance": 1e-3}
    )
    assert recipe.out == Path("a.bundle")
    assert recipe.weights == {"sam": Path("b.pth")}
    assert recipe.output("lite") == Path("a.bundle")


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        ({"arch": "maris", "architecture": "x"}, "Unknown key 'architecture'; known are arch,"),
        ({"arch": 3}, "Key 'arch' is 3; accepted is str"),
        ({"arch": "maris", "overwrite": 1}, "Key 'overwrite' is 1; accepted is bool"),
        ({"variant": "lite"}, "Key 'arch' is missing"),
        ({"arch": "maris", "precision": "int8"}, "precision is 'int8'; .* exports fp32, fp16 only"),
        ({"arch": "maris", "remedy": "pray"}, "remedy is 'pray'; .* exports none, auto only"),
        (
            {"arch": "maris", "target": "tensorrt"},
            "target is 'tensorrt'; .* exports onnx, onnxruntime only",
        ),
        ({"arch": "maris", "tolerance": 0}, "tolerance is 0; accepted is"),
    ],
)
def test_refusals(data: dict[str, object], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        ExportRecipe.from_mapping(data)


def test_half_precision_is_for_engines() -> None:
    with pytest.raises(RecipeError, match=r"for engines.* do not read .*--target onnx") as caught:
        ExportRecipe(arch="maris", target="onnxruntime", precision="fp16")
    assert caught.value.exit_code == 2
