from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import rt_ris.manifest
from rt_ris.errors import ManifestError
from rt_ris.manifest import Manifest, check_member_name, parse_manifest
from rt_ris.records import from_data, parse_json, to_data

TINY = Path(__file__).parents[1] / "fixtures" / "tiny" / "manifest.json"
RAW = TINY.read_bytes()
DOCUMENT: dict[str, Any] = json.loads(RAW)
SCHEMA = json.loads(Path(rt_ris.manifest.__file__).with_name("manifest.schema.json").read_text())


def changed(path: str, value: object) -> bytes:
    """The tiny manifest with one value replaced; ``stages.0.file`` addresses it."""
    document = copy.deepcopy(DOCUMENT)
    *parents, last = (int(word) if word.isdigit() else word for word in path.split("."))
    at: Any = document
    for word in parents:
        at = at[word]
    at[last] = value
    return json.dumps(document).encode()


def places(value: object, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of all values in a document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from places(item, (*path, key))


PLACES = sorted(places(DOCUMENT), key=str)


def test_what_is_written_is_read_back() -> None:
    manifest = parse_manifest(RAW)
    assert parse_manifest(manifest.to_json()) == manifest
    assert manifest.to_json() == RAW


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("schema_version", 2, "schema_version"),
        ("schema_version", True, "schema_version"),
        ("schema_version", "1", "schema_version"),
        ("surprise", 1, "surprise"),
        ("image.size", "32", "image.size"),
        ("image.size", 32.0, "image.size"),
        ("image.size", True, "image.size"),
        ("image.size", 0, "image.size"),
        ("image.fit", "crop", "image.fit"),
        ("image.mean", [1, 2], "image.mean"),
        ("image.std", [1, 0, 1], "image.std"),
        ("text.padded_tokens", 4, "text.padded_tokens"),
        ("text.pad_id", -1, "text.pad_id"),
        ("mask.threshold", 1, "mask.threshold"),
        ("mask.existence_threshold", None, "mask.existence_threshold"),
        ("mask.size", 9, "stages"),
        ("stages", [], "stages"),
        ("stages", {}, "stages"),
        ("stages.0.spec.id", "a/b", "stages[0].spec.id"),
        ("stages.0.spec.id", "text", "stages"),
        ("stages.0.spec.role", "eye", "stages[0].spec.role"),
        ("stages.0.spec.inputs.0.name", "pixel", "stages"),
        ("stages.0.spec.inputs.0.dtype", "float32", "stages[0].spec.inputs[0]"),
        ("stages.0.spec.outputs.0.shape", ["N", 3, 64], "stages[0].spec.outputs[0].shape"),
        ("stages.0.spec.outputs.0.shape", [1, "N", 64], "stages[0].spec.outputs[0].shape"),
        ("stages.0.file", "else.onnx", "members"),
        ("stages.0.target.format", "tflite", "stages[0].target.format"),
        ("stages.0.parameters", -1, "stages[0]"),
        ("stages.0.operators", {"a::b": [0]}, "stages[0].operators"),
        ("stages.0.operators", {"a::b": 128}, "stages[0].operators.a::b"),
        ("stages.0.operators", ["a::b"], "stages[0].operators"),
        ("tokenizer", "words.json", "members"),
        ("provenance.checkpoint_sha256", "0", "provenance.checkpoint_sha256"),
        ("provenance.source", "two\nlines", "provenance.source"),
        ("provenance.licences", {"a": 1}, "provenance.licences.a"),
        ("parity.mask_iou", 1.5, "parity.mask_iou"),
        ("members", {}, "members"),
        ("members", {"image.onnx": {"sha256": "A" * 64, "bytes": 1}}, "members"),
        ("members", {"image.onnx": {"sha256": "a" * 64, "bytes": -1}}, "members"),
    ],
)
def test_a_wrong_value_is_refused_by_name(path: str, value: object, field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(changed(path, value))
    assert caught.value.field.startswith(field)


@pytest.mark.parametrize("value", [None, {}, {"rt_ris::MaskedMutualAttention": [128, 256]}])
def test_operators_may_be_unsaid(value: object) -> None:
    raw = changed("stages.0.operators", value)
    assert json.loads(parse_manifest(raw).to_json())["stages"][0]["operators"] == value
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(raw))


def test_seeded_weights_have_no_checkpoint() -> None:
    raw = changed("provenance.checkpoint_sha256", None)
    assert parse_manifest(raw).provenance.checkpoint_sha256 is None
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(json.loads(raw))


@pytest.mark.parametrize("path", [place for place in PLACES if isinstance(place[-1], str)], ids=str)
def test_only_defaults_may_be_missing(path: tuple[str | int, ...]) -> None:
    document = copy.deepcopy(DOCUMENT)
    at: Any = document
    for word in path[:-1]:
        at = at[word]
    del at[path[-1]]
    # a manifest may be refused for its meaning, which a schema does not know
    assert jsonschema.Draft202012Validator(SCHEMA).is_valid(document) or fault(document) is not None


@pytest.mark.parametrize(
    "name", ["../x", "/x", "a/b", "a\\b", "..", ".x", "", "manifest.json", "ü"]
)
def test_member_names_lead_nowhere(name: str) -> None:
    with pytest.raises(ManifestError, match="refused"):
        check_member_name(name)
    with pytest.raises(ManifestError):
        parse_manifest(
            changed("members", {**DOCUMENT["members"], name: {"sha256": "", "bytes": 0}})
        )


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": {"b": 1, "b": 1}}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"\xff\xfe",
        b"{",
        b"",
        b"[" * 100_000,
    ],
)
def test_json_is_strict(raw: bytes) -> None:
    with pytest.raises(ManifestError):
        parse_json(raw)


def test_an_overflowing_number_is_not_finite() -> None:
    raw = RAW.replace(b'"relative_error": 0.0', b'"relative_error": 1e999')
    with pytest.raises(ManifestError, match="finite"):
        parse_manifest(raw)


EDGES: tuple[object, ...] = (
    *(-1, 0, 1, 2, 255, 256, 65_536, 65_537, 2**63 - 1, 2**63, -(2**63), 10**400),
    *(-0.5, 0.25, 0.5, 1.5, 1e300),
    *(None, True, False, "", "x", "sent", "warp", "letterbox", "bilinear", "bicubic_corners"),
    *([], {}, [1], [0, 0, 0], [0, 0, 256], [0, 0, -1], [1, 2, 3], [0.5, 0.5, 0.5], ["N"], {"x": 1}),
)
"""A whole number written as 1.0 is not among them: JSON Schema takes it for one, the reader not."""


def every_field(document: dict[str, Any]) -> dict[str, Any]:
    """A document that states its defaults too, so that each field is one of its places."""
    raw = json.dumps(document).encode()
    stated: dict[str, Any] = json.loads(parse_manifest(raw).to_json())
    return stated


WARPED = every_field(json.loads(changed("image.fit", "warp").replace(b"bilinear", b"bicubic", 1)))


@pytest.mark.parametrize(
    ("document", "part"), [(every_field(DOCUMENT), ""), (WARPED, "image")], ids=["all", "warp"]
)
def test_the_json_schema_and_the_reader_agree_on_every_field(
    document: dict[str, Any], part: str
) -> None:
    validator = jsonschema.Draft202012Validator(SCHEMA)
    # types and ranges of scalars are the schema's matter, wiring is not
    meaning = ("stages", "members", "text.padded_tokens", "mask.existence_threshold", "tokenizer")
    differing = []
    for path in (place for place in places(document) if str(place[0]).startswith(part)):
        for edge in EDGES:
            one = copy.deepcopy(document)
            at: Any = one
            for word in path[:-1]:
                at = at[word]
            at[path[-1]] = edge
            error, by_schema = fault(one), validator.is_valid(one)
            agreed = by_schema if error is None else not by_schema or error.startswith(meaning)
            if not agreed:
                differing.append((path, edge, error))
    assert not differing


def fault(document: object) -> str | None:
    """The field for which a manifest is refused, or None."""
    try:
        manifest = parse_manifest(json.dumps(document).encode())
    except ManifestError as error:
        return error.field
    assert from_data(Manifest, to_data(manifest)) == manifest
    return None
