"""Write ``docs/architectures.md`` and ``bench/results/architectures.json`` from the registry.

Every size is built without memory for its weights, so this takes seconds; ``--check`` only compares
what is there with what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rt_ris.spec import StageGraph
from rt_ris_train import architecture
from rt_ris_train.architecture import Architecture, Figure, ReferringNetwork, Stage, Variant
from rt_ris_train.counting import parameters, stage_multiply_adds

ROOT = Path(__file__).parent.parent
JSON = ROOT / "bench" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
TOY = "tiny"
"""The variant for tests, of which nothing is published and nothing is interesting."""


def survey() -> dict[str, Any]:
    """What the registry says about itself, as plain data."""
    return {"architectures": [_architecture(architecture.load(n)) for n in architecture.names()]}


def _architecture(found: Architecture) -> dict[str, Any]:
    sizes = {name: variant for name, variant in found.variants.items() if name != TOY}
    return {
        "name": found.name,
        "title": found.title,
        "source": found.source,
        "default": found.default,
        "variants": [_variant(name, variant) for name, variant in sizes.items()],
    }


def _variant(name: str, variant: Variant) -> dict[str, Any]:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch notes that packaged weights have nowhere to go
        network = variant.build().eval()
    graph = network.graph()
    frozen = sum(value.numel() for value in network.parameters() if not value.requires_grad)
    return {
        "name": name,
        "summary": variant.summary,
        "published": variant.published,
        "weights_licence": variant.weights_licence,
        "parameters": parameters(network),
        "frozen_parameters": frozen,
        "input": f"{network.image.size} x {network.image.size}, {network.text.length} tokens",
        "stages": [_stage(stage, graph) for stage in network.stages()],
        "figures": [_figure(figure, network) for figure in variant.figures],
    }


def _stage(stage: Stage, graph: StageGraph) -> dict[str, Any]:
    return {
        "id": stage.spec.id,
        "depends_on": graph.dependency(stage.spec.id).value,
        "multiply_adds": stage_multiply_adds(stage),
        "handed_on_bytes": sum(spec.nbytes() for spec in stage.spec.outputs),
    }


def _figure(figure: Figure, network: ReferringNetwork) -> dict[str, Any]:
    ours = figure.count(network) + figure.added
    published = figure.published
    return {
        "quantity": figure.quantity,
        "part": figure.part,
        "at": figure.at,
        "published": published,
        "source": figure.source,
        "ours": ours,
        "added": figure.added,
        "difference_percent": None if published is None else round(100 * (ours / published - 1), 2),
        "note": figure.note,
    }


def page(found: dict[str, Any]) -> str:
    """The guide, in Markdown."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield "# The architectures"
    yield ""
    yield "Written by `python tools/architectures.py` from the registry; do not edit. Counts are of"
    yield "one picture and one sentence. A multiply-add is one product and one sum of a matrix"
    yield "product, a convolution or an attention. `tiny`, a toy size for tests, is left out."
    yield ""
    yield from _guide(found)
    yield ""
    yield "## What can be kept, and for how long"
    yield ""
    yield from _stages(found)
    yield ""
    yield "## Published figures beside ours"
    yield ""
    yield "*Ours* counts what the source counts, dead weights included where it has them; how much"
    yield "of it an exactly equal form does without stands in brackets."
    yield ""
    yield from _figures(found)


def _guide(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "| architecture | size | input | parameters | of them frozen | multiply-adds | licence of "
        "the weights |"
    )
    yield "|---|---|---|---|---|---|---|"
    for entry in found["architectures"]:
        for size in entry["variants"]:
            cost = sum(stage["multiply_adds"] for stage in size["stages"])
            name = f"`{size['name']}`" + (" (default)" if size["name"] == entry["default"] else "")
            yield (
                f"| {entry['title']} | {name} | {size['input']} | {_short(size['parameters'])} | "
                f"{_short(size['frozen_parameters'])} | {_short(cost)} | "
                f"{size['weights_licence']} |"
            )
    yield ""
    yield from (f"- {entry['title']}: {entry['source']}." for entry in found["architectures"])


def _stages(found: dict[str, Any]) -> Iterator[str]:
    yield (
        "| size | multiply-adds once per picture | once per sentence | for each pair | share that "
        "a cache saves on a further sentence | kept of a picture |"
    )
    yield "|---|---|---|---|---|---|"
    for entry in found["architectures"]:
        for size in entry["variants"]:
            costs = dict.fromkeys(("image", "text", "both"), 0)
            kept = 0
            for stage in size["stages"]:
                costs[stage["depends_on"]] += stage["multiply_adds"]
                kept += stage["handed_on_bytes"] if stage["depends_on"] == "image" else 0
            saved = 100 * costs["image"] / sum(costs.values())
            yield (
                f"| {entry['name']} `{size['name']}` | {_short(costs['image'])} | "
                f"{_short(costs['text'])} | {_short(costs['both'])} | {saved:.1f} % | "
                f"{kept / 1e6:.1f} MB |"
            )


def _figures(found: dict[str, Any]) -> Iterator[str]:
    yield "| size | what | at | published | source | ours | difference | note |"
    yield "|---|---|---|---|---|---|---|---|"
    for entry in found["architectures"]:
        for size in entry["variants"]:
            for figure in size["figures"]:
                yield _figure_row(f"{entry['name']} `{size['name']}`", figure)


def _figure_row(name: str, figure: dict[str, Any]) -> str:
    known = figure["published"] is not None
    published = _short(figure["published"]) if known else "none published"
    difference = f"{figure['difference_percent']:+.1f} %" if known else "-"
    ours = _short(figure["ours"])
    if figure["added"]:
        ours += f" ({_short(figure['added'])} of it left out)"
    what = f"{figure['quantity'].replace('_', '-')}, {figure['part']}"
    return (
        f"| {name} | {what} | {figure['at']} | {published} | {figure['source']} | {ours} | "
        f"{difference} | {figure['note']} |"
    )


def _short(number: float) -> str:
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.4g} {letter}"
    return f"{number:g}"


def main() -> int:
    """Write both files, or with --check return 1 where one differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    args = parser.parse_args()
    found = survey()
    wanted = {JSON: json.dumps(found, indent=1) + "\n", PAGE: page(found)}
    if args.check:
        stale = [path for path, text in wanted.items() if path.read_text("utf-8") != text]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the registry says", file=sys.stderr)
        return int(bool(stale))
    for path, text in wanted.items():
        path.write_text(text, encoding="utf-8")
    print(page(found).split("## Published figures beside ours")[1].split("stands in brackets.")[1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
