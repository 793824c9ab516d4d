"""A graph for ONNX Runtime alone: its own operator in place of each attention.

A product, a softmax and a second product write all scores to memory. ``MultiHeadAttention`` of
ONNX Runtime's processor kernels goes over them in tiles that stay in the cache where nothing is
added to them, and holds them once where something is. Seen in ONNX Runtime 1.31; measured in
``bench/results/tiled-attention.json``.

What is rewritten: ``softmax(scale * q k^T [+ bias]) v`` with heads as the second of four axes, the
scale anywhere before the bias, one bias that broadcasts to the scores, and the exporter's guard
that turns a softmax over nothing into zeros. A bias on a picture's cells that is a sum over rows
and columns, as SAM's, is made band by band, so that neither it nor the scores exist as a whole.
What is not of this form stays as it is: the result is exact up to rounding either way.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rt_ris_export import onnx_graph
from rt_ris_export.attention_operator import DOMAIN, OPERATOR, VERSION

MOST_SCORES: Final = 64 << 20
"""Bytes of scores with a bias on cells that are made at once. For a global attention of SAM ViT-B,
805 MB of scores, bands of twice the size were 5 % faster, and of a quarter a third slower."""

_EXPRESSIONS: Final = 997
"""N for shapes: not 1, which broadcasts, and a prime that shows where an axis depends on it."""

_SWAPPED: Final = (0, 2, 1, 3)


@dataclass(frozen=True, kw_only=True)
class _Scores:
    """What a softmax is taken of: ``scale * query key^T + bias``.

    Attributes:
        query, key: names of [B, H, L, D].
        scale: of the product.
        bias: name of what is added, broadcast to the scores; None where nothing is.
    """

    query: str
    key: str
    scale: float
    bias: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Attention:
    """One attention of a graph.

    Attributes:
        scores: what its softmax is taken of.
        value: name of [B, H, L, D].
        product: the node that makes its result.
        guarded: whether zeros stand for a softmax over nothing.
    """

    scores: _Scores
    value: str
    product: NodeProto
    guarded: bool


def tiled(model: ModelProto) -> ModelProto:
    """A copy in which ONNX Runtime's operator stands for each attention that it fits.

    Raises:
        PlanError: the result is not valid ONNX.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    rewriter = _Rewriter(copy)
    if rewriter.rewrite():
        copy.opset_import.append(helper.make_opsetid(DOMAIN, VERSION))
        onnx_graph.check(copy)
    return copy


class _Reader:
    """Finds attentions in a graph."""

    def __init__(self, model: ModelProto) -> None:
        self.graph = model.graph
        self.shapes = onnx_graph.shapes_of(model, expressions=_EXPRESSIONS)
        self.made = {name: node for node in self.graph.node for name in node.output}
        self.outputs = {value.name for value in self.graph.output}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in self.graph.node:
            for name in set(node.input):
                self.readers[name].append(node)
        self.numbers = dict(_numbers(model))

    def attentions(self) -> Iterator[_Attention]:
        """Those that the operator fits."""
        for node in self.graph.node:
            found = self._attention(node) if node.op_type == "Softmax" else None
            if found is not None and self._fits(found):
                yield found

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor, for N = 997; (0,) where it is not known."""
        return self.shapes.get(name, (0,))

    def sole_reader(self, name: str, op_type: str) -> NodeProto | None:
        """The one node that reads a tensor, if it is of a kind and the graph gives it to no one."""
        readers = self.readers[name]
        if name in self.outputs or len(readers) != 1 or readers[0].op_type != op_type:
            return None
        return readers[0]

    def maker(self, name: str, op_type: str) -> NodeProto | None:
        """The node that makes a tensor, if it is of a kind."""
        node = self.made.get(name)
        return node if node is not None and node.op_type == op_type else None

    def _attention(self, softmax: NodeProto) -> _Attention | None:
        rank = len(self.shape(softmax.output[0]))
        if rank != 4 or onnx_graph.attribute_values(softmax).get("axis", -1) not in (-1, 3):
            return None
        weights = softmax.output[0]
        guarded = self._guarded(weights)
        product = self.sole_reader(guarded or weights, "MatMul")
        if product is None or product.input[0] != (guarded or weights):
            return None
        scores = self._scores(softmax.input[0])
        if scores is None:
            return None
        return _Attention(
            scores=scores,
            value=product.input[1],
            product=product,
            guarded=guarded is not None,
        )

    def _guarded(self, weights: str) -> str | None:
        """What ``where(isnan(weights), 0, weights)`` is called, if that is all that reads them."""
        tests = [node for node in self.readers[weights] if node.op_type == "IsNaN"]
        if len(tests) != 1 or len(self.readers[weights]) != 2 or weights in self.outputs:
            return None
        choice = self.sole_reader(tests[0].output[0], "Where")
        if choice is None or choice.input[2] != weights:
            return None
        return choice.output[0] if self.numbers.get(choice.input[1]) == 0.0 else None

    def _scores(self, name: str) -> _Scores | None:
        """Scores by the tensor that holds them."""
        node = self.made.get(name)
        if node is None:
            return None
        if node.op_type == "MatMul":
            return self._product(node)
        if node.op_type == "Add":
            for inner, bias in (node.input, tuple(reversed(node.input))):
                scores = self._scores(inner)
                if scores is not None and scores.bias is None:
                    return replace(scores, bias=bias)
            return None
        inner, factor = self._unscaled(name)
        scores = None if inner == name else self._scores(inner)
        if scores is None or scores.bias is not None:  # a bias would be scaled as well
            return None
        return replace(scores, scale=scores.scale * factor)

    def _product(self, node: NodeProto) -> _Scores | None:
        query, first = self._unscaled(node.input[0])
        transposed, second = self._unscaled(node.input[1])
        key = self._untransposed(transposed)
        if key is None:
            return None
        key, third = self._unscaled(key)
        return _Scores(query=query, key=key, scale=first * second * third)

    def _unscaled(self, name: str) -> tuple[str, float]:
        """What a tensor is a multiple of, and the factor."""
        node = self.made.get(name)
        if node is None or node.op_type not in ("Mul", "Div"):
            return name, 1.0
        first, second = node.input
        if second in self.numbers:
            number = self.numbers[second]
            return first, number if node.op_type == "Mul" else 1.0 / number
        if node.op_type == "Mul" and first in self.numbers:
            return second, self.numbers[first]
        return name, 1.0

    def _untransposed(self, name: str) -> str | None:
        """The tensor whose last two of four axes are swapped here.

        The exporter writes this with three axes, between two reshapes, where a size is free.
        """
        node = self.made.get(name)
        if node is None:
            return None
        if node.op_type == "Transpose":
            return node.input[0] if _permutation(node) == (0, 1, 3, 2) else None
        inner = self.maker(node.input[0], "Transpose") if node.op_type == "Reshape" else None
        if inner is None or _permutation(inner) != (0, 2, 1):
            return None
        outer = self.maker(inner.input[0], "Reshape")
        if outer is None:
            return None
        before, between, after = map(self.shape, (outer.input[0], inner.input[0], name))
        swapped = (*before[:2], *before[:1:-1])
        fits = len(before) == 4 and between[1:] == before[2:] and after == swapped
        return outer.input[0] if fits else None

    def _fits(self, found: _Attention) -> bool:
        """Whether sizes are as the operator wants them, and those behind B do not depend on N."""
        scores = found.scores
        query, key, value = map(self.shape, (scores.query, scores.key, found.value))
        if not len(query) == len(key) == len(value) == 4:
            return False
        if scores.scale == 0:  # which the operator takes for no scale
            return False
        same = query[:2] == key[:2] == value[:2] and query[3] == key[3] and key[2] == value[2]
        fixed = all(size % _EXPRESSIONS for size in (*query[1:], *key[1:], *value[1:]))
        whole = (*query[:3], key[2])
        return (
            same and fixed and (scores.bias is None or _broadcasts(self.shape(scores.bias), whole))
        )


@dataclass(frozen=True, kw_only=True)
class _Bands:
    """A bias on cells that is made of sums over rows and columns, cut along the queries' rows.

    Attributes:
        summands: names of two tensors [B, H, h, w, ...], whose sum is the bias.
        rows: of each band.
        columns: w.
        keys: number of keys.
    """

    summands: tuple[str, str]
    rows: tuple[int, ...]
    columns: int
    keys: int


class _Rewriter(_Reader):
    """Puts the operator in place of what was found."""

    def __init__(self, model: ModelProto) -> None:
        super().__init__(model)
        self._instead: dict[str, list[NodeProto]] = {}
        self._gone: set[str] = set()
        self._known: set[str] = set()
        self._nodes: list[NodeProto] = []

    def rewrite(self) -> bool:
        """Do it, and drop what nothing needs any more; false where nothing fits."""
        places = {node.output[0]: place for place, node in enumerate(self.graph.node)}
        for found in sorted(self.attentions(), key=lambda one: places[one.product.output[0]]):
            self._nodes = self._instead[found.product.output[0]] = []
            self._replace(found)
        if not self._instead:
            return False
        nodes: list[NodeProto] = []
        for node in self.graph.node:
            if node.output[0] in self._instead:
                nodes += self._instead[node.output[0]]
            elif node.output[0] not in self._gone:
                nodes.append(node)
        self._keep(nodes)
        return True

    def _replace(self, found: _Attention) -> None:
        scores, name = found.scores, found.product.output[0]
        query, key, value = map(self._packed, (scores.query, scores.key, found.value))
        packed = self._packed_later(name)
        result = packed or f"{name}.result"
        made = f"{name}.unguarded" if found.guarded else result
        sizes = {"num_heads": self.shape(scores.query)[1], "scale": scores.scale}
        bands = self._bands(scores)
        if bands is not None:
            self._in_bands((query, key, value), bands, made, sizes)
        else:
            bias = [] if scores.bias is None else ["", "", self._bias(scores)]
            self._attend([query, key, value, *bias], made, sizes)
        if found.guarded:
            zero = self._stored("tiled.zero", np.zeros((), np.float32))
            self._add("IsNaN", [made], f"{name}.nothing")
            self._add("Where", [f"{name}.nothing", zero, made], result)
        if packed is None:
            _, heads, _, width = self.shape(name)
            shape = self._stored(f"tiled.split.{heads}.{width}", np.array([0, 0, heads, width]))
            self._add("Reshape", [result, shape], f"{name}.split")
            self._add("Transpose", [f"{name}.split"], name, perm=_SWAPPED)

    def _packed(self, name: str) -> str:
        """[B, H, L, D] as [B, L, H * D], without a detour where it was made of that."""
        batch, heads, length, width = self.shape(name)
        node = self.maker(name, "Transpose")
        if node is not None and _permutation(node) == _SWAPPED:
            source = node.input[0]
            reshape = self.maker(source, "Reshape")
            if reshape and self.shape(reshape.input[0]) == (batch, length, heads * width):
                packed: str = reshape.input[0]
                return packed
        else:
            source = self._add("Transpose", [name], f"{name}.swapped", perm=_SWAPPED)
        shape = self._stored("tiled.packed", np.array([0, 0, -1]))
        return self._add("Reshape", [source, shape], f"{name}.packed")

    def _packed_later(self, name: str) -> str | None:
        """What the graph calls the packed form of a result, if that is all it wants of it."""
        batch, heads, length, width = self.shape(name)
        transpose = self.sole_reader(name, "Transpose")
        if transpose is None or _permutation(transpose) != _SWAPPED:
            return None
        reshape = self.sole_reader(transpose.output[0], "Reshape")
        if reshape is None or self.shape(reshape.output[0]) != (batch, length, heads * width):
            return None
        packed: str = reshape.output[0]
        self._gone |= {transpose.output[0], packed}
        return packed

    def _bias(self, scores: _Scores) -> str:
        """A bias with as many queries and keys as the scores; the operator broadcasts B and H."""
        assert scores.bias is not None
        queries, keys = self.shape(scores.query)[2], self.shape(scores.key)[2]
        shape = self.shape(scores.bias)
        if len(shape) == 4 and shape[2:] == (queries, keys):
            return scores.bias
        name = f"{scores.bias}.{queries}.{keys}"
        wanted = self._stored(f"tiled.scores.{queries}.{keys}", np.array([1, 1, queries, keys]))
        return self._add("Expand", [scores.bias, wanted], name)

    def _bands(self, scores: _Scores) -> _Bands | None:
        """How to cut a bias on cells, if it is large."""
        reshape = None if scores.bias is None else self.maker(scores.bias, "Reshape")
        total = None if reshape is None else self.maker(reshape.input[0], "Add")
        if total is None:
            return None
        batch, heads, queries, _ = self.shape(scores.query)
        keys = self.shape(scores.key)[2]
        shape = self.shape(total.output[0])
        if shape[:2] != (batch, heads) or len(shape) < 4 or shape[2] * shape[3] != queries:
            return None
        rows, columns = shape[2:4]
        if any(self.shape(name)[:4] != shape[:4] for name in total.input):
            return None
        most = max(1, MOST_SCORES // (4 * batch * heads * columns * keys))
        if most >= rows:
            return None
        first, second = total.input
        cut = tuple(min(most, rows - start) for start in range(0, rows, most))
        return _Bands(summands=(first, second), rows=cut, columns=columns, keys=keys)

    def _in_bands(
        self, packed: Sequence[str], bands: _Bands, made: str, sizes: Mapping[str, object]
    ) -> None:
        query, key, value = packed
        cells = tuple(rows * bands.columns for rows in bands.rows)
        queries = self._split(query, cells, f"{made}.query", axis=1)
        first, second = (
            self._split(name, bands.rows, f"{made}.bias{index}", axis=2)
            for index, name in enumerate(bands.summands)
        )
        results = []
        for index, count in enumerate(cells):
            total = self._add("Add", [first[index], second[index]], f"{made}.sum.{index}")
            shape = self._stored(
                f"tiled.band.{count}.{bands.keys}", np.array([0, 0, count, bands.keys])
            )
            bias = self._add("Reshape", [total, shape], f"{made}.band.{index}")
            part = f"{made}.{index}"
            self._attend([queries[index], key, value, "", "", bias], part, sizes)
            results.append(part)
        self._add("Concat", results, made, axis=1)

    def _split(self, name: str, sizes: Sequence[int], prefix: str, *, axis: int) -> list[str]:
        lengths = self._stored(f"{prefix}.sizes", np.array(sizes))
        parts = [f"{prefix}.{index}" for index in range(len(sizes))]
        self._add("Split", [name, lengths], *parts, axis=axis)
        return parts

    def _attend(self, inputs: Sequence[str], made: str, sizes: Mapping[str, object]) -> None:
        self._add(OPERATOR, inputs, made, domain=DOMAIN, **sizes)

    def _add(self, op_type: str, inputs: Sequence[str], *outputs: str, **attributes: Any) -> str:  # noqa: ANN401 # onnx's
        """A node, unless an earlier attention has made the same."""
        if outputs[0] not in self._known:
            self._known.add(outputs[0])
            self._nodes.append(
                helper.make_node(op_type, inputs, outputs, name=f"tiled.{outputs[0]}", **attributes)
            )
        return outputs[0]

    def _stored(self, name: str, values: np.ndarray[Any, Any]) -> str:
        if name not in self._known:
            self._known.add(name)
            self.graph.initializer.append(numpy_helper.from_array(values, name))
        return name

    def _keep(self, nodes: Sequence[NodeProto]) -> None:
        """Of nodes and stored tensors those from which an output is made."""
        needed, kept = set(self.outputs), []
        for node in reversed(nodes):
            if needed.intersection(node.output):
                needed.update(node.input)
                kept.append(node)
        del self.graph.node[:]
        self.graph.node.extend(reversed(kept))
        stored = [entry for entry in self.graph.initializer if entry.name in needed]
        del self.graph.initializer[:]
        self.graph.initializer.extend(stored)


def _numbers(model: ModelProto) -> Iterator[tuple[str, float]]:
    """Stored single numbers."""
    for entry in model.graph.initializer:
        if entry.data_type == TensorProto.FLOAT and set(entry.dims) <= {1} and len(entry.dims) <= 4:
            yield entry.name, float(numpy_helper.to_array(entry).reshape(()))


def _permutation(node: NodeProto) -> tuple[int, ...]:
    if "perm" not in onnx_graph.attribute_names(node):
        return ()
    return tuple(helper.get_node_attr_value(node, "perm"))


def _broadcasts(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether a tensor of one shape may be added to one of another without enlarging it."""
    pairs = zip(reversed(shape), reversed(whole), strict=False)
    return len(shape) <= len(whole) and all(size in (1, most) for size, most in pairs)
