"""What a kernel promises: its operator, its tensors, its attributes, and the readable truth.

A kernel exists three times: as a numpy reference that anyone can read, as an ONNX function that
every runtime can execute, and (later) as CUDA that a plugin launches. The ``KernelSpec`` ties
them to one name, so that tests can compare them and exporters can attach the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from rt_ris.errors import ShapeError

if TYPE_CHECKING:
    from onnx import FunctionProto

Array = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One tensor of an operator.

    Attributes:
        name: as in the ONNX function and in the reference's parameters.
        axes: letters of ``rt_ris.spec``; equal letters mean equal sizes within one call.
        broadcast: those of ``axes`` that may also be 1.
    """

    name: str
    axes: tuple[str, ...]
    broadcast: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KernelSpec:
    """One custom operator.

    All tensors of a call have the same floating-point type.

    Attributes:
        op_type: unique over all domains, because TensorRT's parser keys functions by bare name.
        domain: ONNX domain; also the namespace under which a plugin registers.
        version: opset version of the domain; also, as text, the version of the plugin.
        inputs: in operator order.
        outputs: in operator order.
        attributes: numbers that change the result, with their defaults; the type of a default is
            the type of the attribute.
        reference: numpy; takes the inputs by name and the attributes by name, returns the
            outputs in the inputs' type. Float64 inputs give the truth that others are judged by.
        body: builds the ONNX function for a version of the default opset.
        closeness: for a kernel with a hard decision; takes the inputs and attributes like
            ``reference`` and says for each entry of the first output's first axis how close its
            closest score is to the decision, in rms of its scores. Closer than rounding errors
            means that two right implementations may decide differently.
    """

    op_type: str
    domain: str
    version: int
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    attributes: Mapping[str, float | int]
    reference: Callable[..., tuple[Array, ...]]
    body: Callable[[int], FunctionProto]
    closeness: Callable[..., Array] | None = None

    @property
    def node_attributes(self) -> dict[str, float | int | str]:
        """All attributes a node must carry, with defaults.

        The two strings tell TensorRT which plugin may replace the function; other runtimes ignore
        them.
        """
        plugin = {"plugin_namespace": self.domain, "plugin_version": str(self.version)}
        return {**self.attributes, **plugin}

    def sizes(self, arrays: Sequence[npt.NDArray[Any]]) -> dict[str, int]:
        """The size of each axis letter in a call with these inputs.

        Raises:
            ShapeError: a wrong number of inputs or axes, or sizes that contradict each other.
        """
        if len(arrays) != len(self.inputs):
            raise ShapeError(
                f"{self.op_type} got {len(arrays)} inputs; it takes {len(self.inputs)}: "
                f"{', '.join(operand.name for operand in self.inputs)}."
            )
        return self.check_shapes([array.shape for array in arrays])

    def check_shapes(self, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
        """The size of each axis letter, from shapes of the inputs and, if given, the outputs.

        Raises:
            ShapeError: a wrong number of axes, or sizes that contradict each other.
        """
        known: dict[str, int] = {}
        operands = (*self.inputs, *self.outputs)[: len(shapes)]
        for operand, shape in sorted(
            zip(operands, shapes, strict=True), key=lambda pair: len(pair[0].broadcast)
        ):
            self._bind(operand, shape, known)
        return known

    def run(
        self, arrays: Sequence[Array], attributes: Mapping[str, float] | None = None
    ) -> tuple[Array, ...]:
        """The reference's outputs for inputs in operator order; checks shapes first.

        Raises:
            ShapeError: the inputs do not fit the operator.
        """
        return self.reference(**self._named(arrays, attributes))

    def distance_to_ties(
        self, arrays: Sequence[Array], attributes: Mapping[str, float] | None = None
    ) -> Array:
        """``closeness`` for inputs in operator order; infinite where nothing is decided.

        Raises:
            ShapeError: the inputs do not fit the operator.
        """
        if self.closeness is None:
            return np.full(self.sizes(arrays)[self.outputs[0].axes[0]], np.inf)
        return self.closeness(**self._named(arrays, attributes))

    def _named(
        self, arrays: Sequence[Array], attributes: Mapping[str, float] | None
    ) -> dict[str, Any]:
        self.sizes(arrays)
        named = {operand.name: array for operand, array in zip(self.inputs, arrays, strict=True)}
        given = {key: value for key, value in (attributes or {}).items() if key in self.attributes}
        return {**named, **self.attributes, **given}

    def _bind(self, operand: Operand, shape: tuple[int, ...], known: dict[str, int]) -> None:
        fits = len(shape) == len(operand.axes) and all(
            size == known.setdefault(axis, size) or (size == 1 and axis in operand.broadcast)
            for axis, size in zip(operand.axes, shape, strict=True)
        )
        if not fits:
            axes = ", ".join(f"{axis}={known.get(axis, '?')}" for axis in operand.axes)
            raise ShapeError(
                f"{self.op_type} got '{operand.name}' as {list(shape)}; it takes [{axes}]."
            )
