"""Masked mutual attention between pixels and words (MARIS, arXiv 2311.15727, section 3.2).

    S     = scale * z_v z_l^T                              [N, P, L]
    keep  = (S >= logit(threshold)) and the word is real   [N, P, L]
    A     = softmax over L of where(keep, S, -1e4), times keep
    f_lav = LN(A z_l + z_v)                                [N, P, C]
    f_val = LN(A^T z_v + z_l)                              [N, L, C]

With ``normalize`` 1 the sum A^T z_v is divided by the word's total weight (the column sum of A,
plus 1e-6), so that it is a mean over the word's pixels; the paper prints the plain sum.

Equation (4) of the paper prints the mask the wrong way round; its text says that irrelevant pairs
are suppressed, which is what stands here. A pixel for which no word is relevant attends to
nothing: its row of A is zero. The same holds for the column of a padded word. -1e4 instead of
-inf keeps such rows finite, in half precision too.

``threshold`` is a probability, since sigmoid(S) >= threshold is the paper's test. 0 keeps every
real word (logit is -inf), 1 keeps none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rt_ris_kernels.kernel import Array, KernelSpec, Operand

if TYPE_CHECKING:
    from onnx import FunctionProto, NodeProto

_DOMAIN = "rt_ris"
_OP_TYPE = "MaskedMutualAttention"
_SUPPRESSED = -1.0e4
_MASS_FLOOR = 1.0e-6
_FLOAT = 1  # onnx.TensorProto.FLOAT; onnx is imported where a function is built
_ATTRIBUTES: dict[str, float | int] = {
    "threshold": 0.5,
    "scale": 1.0,
    "epsilon": 1.0e-5,
    "normalize": 0,
}
_INPUTS = (
    Operand(name="z_v", axes=("N", "P", "C"), broadcast=("N",)),
    Operand(name="z_l", axes=("N", "L", "C")),
    Operand(name="word_mask", axes=("N", "L")),
    Operand(name="gamma_v", axes=("C",)),
    Operand(name="beta_v", axes=("C",)),
    Operand(name="gamma_l", axes=("C",)),
    Operand(name="beta_l", axes=("C",)),
)
_OUTPUTS = (
    Operand(name="f_lav", axes=("N", "P", "C")),
    Operand(name="f_val", axes=("N", "L", "C")),
)


def masked_mutual_attention(
    z_v: Array,
    z_l: Array,
    *,
    word_mask: Array,
    gamma_v: Array,
    beta_v: Array,
    gamma_l: Array,
    beta_l: Array,
    threshold: float = 0.5,
    scale: float = 1.0,
    epsilon: float = 1.0e-5,
    normalize: int = 0,
) -> tuple[Array, Array]:
    """The operator in numpy, computed in the type of its inputs.

    Args:
        z_v: projected pixels [N or 1, P, C].
        z_l: projected words [N, L, C].
        word_mask: [N, L], above 0 where a word is real.
        gamma_v: [C], weight of the pixels' layer norm.
        beta_v: [C], bias of the pixels' layer norm.
        gamma_l: [C], weight of the words' layer norm.
        beta_l: [C], bias of the words' layer norm.
        threshold: probability from which a pixel and a word count as related.
        scale: factor on S.
        epsilon: added to the variance in both layer norms.
        normalize: 1 divides what a word collects by the total weight of its pixels.

    Returns:
        f_lav [N, P, C] and f_val [N, L, C].
    """
    scores = relevance(z_v, z_l, scale=scale)
    keep = (scores >= logit(threshold)) & (word_mask > 0)[:, None, :]
    attention = _softmax(np.where(keep, scores, scores.dtype.type(_SUPPRESSED))) * keep
    f_lav = _layer_norm(attention @ z_l + z_v, gamma_v, beta=beta_v, epsilon=epsilon)
    collected = attention.swapaxes(1, 2) @ z_v
    if normalize:
        collected = collected / (attention.sum(axis=1)[..., None] + z_l.dtype.type(_MASS_FLOOR))
    return f_lav, _layer_norm(collected + z_l, gamma_l, beta=beta_l, epsilon=epsilon)


def relevance(z_v: Array, z_l: Array, *, scale: float = 1.0) -> Array:
    """S [N, P, L]; values near ``logit(threshold)`` are the ones that rounding can flip."""
    scores: Array = (z_v @ z_l.swapaxes(1, 2)) * z_l.dtype.type(scale)
    return scores


def _closeness(
    z_v: Array,
    z_l: Array,
    *,
    word_mask: Array,
    threshold: float = 0.5,
    scale: float = 1.0,
    **_: object,
) -> Array:
    """How close the closest score of each sentence is to the threshold, float64 [N].

    In rms of the sentence's scores over its real words; infinite without any.
    """
    scores = relevance(z_v.astype(np.float64), z_l.astype(np.float64), scale=scale)
    real = np.broadcast_to((word_mask > 0)[:, None, :], scores.shape)
    count = np.maximum(real.sum(axis=(1, 2)), 1)
    rms = np.sqrt((np.square(scores) * real).sum(axis=(1, 2)) / count)
    distances = np.where(real, np.abs(scores - logit(threshold)), np.inf).min(axis=(1, 2))
    result: Array = distances / np.maximum(rms, np.finfo(np.float64).tiny)
    return result


def logit(probability: float) -> float:
    """The inverse of the sigmoid in float64, with infinities at 0 and 1."""
    with np.errstate(divide="ignore"):
        return float(np.log(np.float64(probability)) - np.log1p(-np.float64(probability)))


def _softmax(scores: Array) -> Array:
    raised = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: Array = raised / raised.sum(axis=-1, keepdims=True)
    return result


def _layer_norm(values: Array, gamma: Array, *, beta: Array, epsilon: float) -> Array:
    centred = values - values.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    result: Array = centred / np.sqrt(variance + values.dtype.type(epsilon)) * gamma + beta
    return result


def function_body(opset: int) -> FunctionProto:
    """The operator as an ONNX function of standard operators.

    Args:
        opset: version of the default domain; the same as that of the model it joins, because
            checkers refuse a function whose operators have another schema than the model's.

    Returns:
        A function that refers to the node's attributes, so one copy serves nodes with different
        thresholds. Nodes must state every attribute: defaults inside a function are not read by
        all parsers.
    """
    from onnx import helper

    nodes = [*_scores(), *_mask(), *_attention(), *_pixels(), *_words()]
    return helper.make_function(
        _DOMAIN,
        _OP_TYPE,
        [operand.name for operand in _INPUTS],
        [operand.name for operand in _OUTPUTS],
        nodes,
        [helper.make_opsetid("", opset)],
        attributes=list(_ATTRIBUTES),
    )


def _node(op_type: str, inputs: str, output: str, **attributes: float | list[int]) -> NodeProto:
    from onnx import helper

    node = helper.make_node(op_type, inputs.split(), [output])
    node.attribute.extend(helper.make_attribute(*pair) for pair in attributes.items())
    return node


def _linked(op_type: str, inputs: str, output: str, *, local: str, outer: str) -> NodeProto:
    """A node whose attribute ``local`` is the calling node's attribute ``outer``."""
    from onnx import AttributeProto

    whole = isinstance(_ATTRIBUTES[outer], int)
    kind = AttributeProto.INT if whole else AttributeProto.FLOAT
    node = _node(op_type, inputs, output)
    node.attribute.append(AttributeProto(name=local, ref_attr_name=outer, type=kind))
    return node


def _scores() -> list[NodeProto]:
    return [
        _linked("Constant", "", "scale_32", local="value_float", outer="scale"),
        _node("CastLike", "scale_32 z_l", "scale_t"),
        _node("Transpose", "z_l", "z_l_t", perm=[0, 2, 1]),
        _node("MatMul", "z_v z_l_t", "s_raw"),
        _node("Mul", "s_raw scale_t", "s"),
    ]


def _mask() -> list[NodeProto]:
    """``keep``; the logit is taken of constants, so it is folded when a model is loaded."""
    return [
        _linked("Constant", "", "tau", local="value_float", outer="threshold"),
        _node("Constant", "", "one", value_float=1.0),
        _node("Sub", "one tau", "tau_rest"),
        _node("Div", "tau tau_rest", "odds"),
        _node("Log", "odds", "logit_32"),
        _node("CastLike", "logit_32 s", "logit_t"),
        _node("GreaterOrEqual", "s logit_t", "relevant"),
        _node("Constant", "", "zero", value_float=0.0),
        _node("CastLike", "zero word_mask", "zero_t"),
        _node("Greater", "word_mask zero_t", "real"),
        _node("Constant", "", "pixel_axis", value_ints=[1]),
        _node("Unsqueeze", "real pixel_axis", "real_3d"),
        _node("And", "relevant real_3d", "keep"),
    ]


def _attention() -> list[NodeProto]:
    return [
        _node("Constant", "", "suppressed_32", value_float=_SUPPRESSED),
        _node("CastLike", "suppressed_32 s", "suppressed"),
        _node("Where", "keep s suppressed", "s_kept"),
        _node("Softmax", "s_kept", "a_any", axis=-1),
        _node("CastLike", "keep s", "keep_t"),
        _node("Mul", "a_any keep_t", "a"),
    ]


def _pixels() -> list[NodeProto]:
    return [
        _node("MatMul", "a z_l", "from_words"),
        _node("Add", "from_words z_v", "pixels"),
        _norm("pixels gamma_v beta_v", "f_lav"),
    ]


def _words() -> list[NodeProto]:
    """What words collect: a sum over thousands of pixels, which would leave the range of halves.

    The product is taken of pixels scaled by 2^-6, exactly undone in float32, where the sum and its
    norm stay; so any runtime of typed graphs keeps the range without a product in float32.
    """
    return [
        _node("Transpose", "a", "a_t", perm=[0, 2, 1]),
        _node("Constant", "", "smaller_32", value_float=2.0**-6),
        _node("CastLike", "smaller_32 z_v", "smaller"),
        _node("Mul", "z_v smaller", "z_v_small"),
        _node("MatMul", "a_t z_v_small", "sum_small"),
        _node("Cast", "sum_small", "sum_small_32", to=_FLOAT),
        _node("Constant", "", "larger_32", value_float=2.0**6),
        _node("Mul", "sum_small_32 larger_32", "sum_over_pixels"),
        *_divisor(),
        _node("Div", "sum_over_pixels divisor", "from_pixels"),
        _node("Cast", "z_l", "z_l_32", to=_FLOAT),
        _node("Add", "from_pixels z_l_32", "words"),
        _node("Cast", "gamma_l", "gamma_l_32", to=_FLOAT),
        _node("Cast", "beta_l", "beta_l_32", to=_FLOAT),
        _norm("words gamma_l_32 beta_l_32", "f_val_32"),
        _node("CastLike", "f_val_32 z_l", "f_val"),
    ]


def _divisor() -> list[NodeProto]:
    """[N, L, 1]: a word's total weight where the node asks for it, else 1."""
    return [
        _linked("Constant", "", "normalize_int", local="value_int", outer="normalize"),
        _node("Constant", "", "zero_int", value_int=0),
        _node("Greater", "normalize_int zero_int", "normalize_bool"),
        _node("Constant", "", "last_axis", value_ints=[-1]),
        _node("Cast", "a_t", "a_t_32", to=_FLOAT),
        _node("ReduceSum", "a_t_32 last_axis", "mass", keepdims=1),
        _node("Constant", "", "mass_floor", value_float=_MASS_FLOOR),
        _node("Add", "mass mass_floor", "mass_positive"),
        _node("Where", "normalize_bool mass_positive one", "divisor"),
    ]


def _norm(inputs: str, output: str) -> NodeProto:
    return _linked("LayerNormalization", inputs, output, local="epsilon", outer="epsilon")


MASKED_MUTUAL_ATTENTION = KernelSpec(
    op_type=_OP_TYPE,
    domain=_DOMAIN,
    version=1,
    inputs=_INPUTS,
    outputs=_OUTPUTS,
    attributes=_ATTRIBUTES,
    reference=masked_mutual_attention,
    body=function_body,
    closeness=_closeness,
)
