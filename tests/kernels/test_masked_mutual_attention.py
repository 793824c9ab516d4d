"""The operator's reference against first principles, its ONNX function against the reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from rt_ris.errors import ShapeError
from rt_ris_kernels.kernel import Array, KernelSpec
from rt_ris_kernels.ops import KERNELS, find
from rt_ris_kernels.ops.masked_mutual_attention import (
    MASKED_MUTUAL_ATTENTION,
    logit,
    masked_mutual_attention,
    relevance,
)

Run = Callable[[list[Array]], "tuple[Array, ...] | list[Array]"]
OPSETS = (18, 20, 23)
TIE_BAND = 1e-4
"""Scores closer to the threshold than this may be kept on one side and dropped on the other."""


def _inputs(seed: int, *, n: int, p: int, length: int, c: int, shared: bool) -> list[Array]:
    """Random inputs in float64, in operator order; the last word of each sentence is a pad."""
    rng = np.random.default_rng(seed)
    mask = np.ones((n, length))
    mask[:, length - 1 :] = 0.0 if length > 1 else 1.0
    return [
        rng.standard_normal((1 if shared else n, p, c)),
        rng.standard_normal((n, length, c)) / np.sqrt(c),
        mask,
        *(rng.uniform(0.5, 1.5, c) if k % 2 == 0 else rng.standard_normal(c) for k in range(4)),
    ]


def _model(opset: int, attributes: dict[str, float], *, broadcast: bool) -> onnx.ModelProto:
    spec = MASKED_MUTUAL_ATTENTION
    sizes = {"C": 16}
    inputs = []
    for operand in spec.inputs:
        axes = [sizes.get(axis, axis) for axis in operand.axes]
        if broadcast and "N" in operand.broadcast:
            axes[0] = 1
        inputs.append(helper.make_tensor_value_info(operand.name, TensorProto.FLOAT, axes))
    outputs = [
        helper.make_tensor_value_info(
            operand.name, TensorProto.FLOAT, [sizes.get(axis, axis) for axis in operand.axes]
        )
        for operand in spec.outputs
    ]
    node = helper.make_node(
        spec.op_type,
        [operand.name for operand in spec.inputs],
        [operand.name for operand in spec.outputs],
        domain=spec.domain,
        **{**spec.node_attributes, **attributes},
    )
    model = helper.make_model(
        helper.make_graph([node], "test", inputs, outputs),
        opset_imports=[
            helper.make_opsetid("", opset),
            helper.make_opsetid(spec.domain, spec.version),
        ],
        functions=[spec.body(opset)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return model


@lru_cache
def _session(
    opset: int, threshold: float, scale: float, normalize: int, broadcast: bool
) -> onnxruntime.InferenceSession:
    attributes = {"threshold": threshold, "scale": scale, "normalize": normalize}
    model = _model(opset, attributes, broadcast=broadcast)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def _run_onnx(
    arrays: list[Array],
    *,
    opset: int = 18,
    threshold: float = 0.5,
    scale: float = 1.0,
    normalize: int = 0,
) -> list[Array]:
    session = _session(opset, threshold, scale, normalize, arrays[0].shape[0] == 1)
    names = [operand.name for operand in MASKED_MUTUAL_ATTENTION.inputs]
    feed = {name: array.astype(np.float32) for name, array in zip(names, arrays, strict=True)}
    return list(session.run(None, feed))


def _far_from_ties(arrays: list[Array], *, threshold: float, scale: float = 1.0) -> bool:
    scores = relevance(arrays[0], arrays[1], scale=scale)
    return bool((np.abs(scores - logit(threshold)) > TIE_BAND).all())


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("normalize", [0, 1])
def test_function_equals_the_reference(
    opset: int, threshold: float, shared: bool, normalize: int
) -> None:
    arrays = _inputs(3, n=3, p=12, length=5, c=16, shared=shared)
    assert _far_from_ties(arrays, threshold=threshold, scale=0.5)
    attributes = {"threshold": threshold, "scale": 0.5, "normalize": normalize}
    got = _run_onnx(arrays, opset=opset, threshold=threshold, scale=0.5, normalize=normalize)
    wanted = MASKED_MUTUAL_ATTENTION.run(arrays, attributes)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 4),
    p=st.integers(1, 20),
    length=st.integers(1, 9),
    shared=st.booleans(),
)
def test_function_is_dynamic_in_sentences_pixels_and_words(
    seed: int, n: int, p: int, length: int, shared: bool
) -> None:
    arrays = _inputs(seed, n=n, p=p, length=length, c=16, shared=shared)
    if not _far_from_ties(arrays, threshold=0.5):
        return
    wanted = MASKED_MUTUAL_ATTENTION.run(arrays)
    for a, b in zip(_run_onnx(arrays), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_reference_equals_a_loop_over_pixels() -> None:
    z_v, z_l, mask, gamma_v, beta_v, gamma_l, beta_l = _inputs(
        5, n=2, p=7, length=4, c=8, shared=False
    )
    f_lav, f_val = MASKED_MUTUAL_ATTENTION.run(
        [z_v, z_l, mask, gamma_v, beta_v, gamma_l, beta_l], {"threshold": 0.6}
    )
    for n in range(2):
        words = z_l[n].copy()
        for p in range(7):
            relevance_ = 1 / (1 + np.exp(-z_l[n] @ z_v[n, p]))
            kept = [i for i in range(4) if relevance_[i] >= 0.6 and mask[n, i]]
            weights = np.exp(z_l[n, kept] @ z_v[n, p])
            weights = weights / weights.sum() if kept else weights
            words[kept] += weights[:, None] * z_v[n, p]
            np.testing.assert_allclose(
                f_lav[n, p], _norm(weights @ z_l[n, kept] + z_v[n, p], gamma_v, beta_v)
            )
        for i in range(4):
            np.testing.assert_allclose(f_val[n, i], _norm(words[i], gamma_l, beta_l))


def _norm(values: Array, gamma: Array, beta: Array) -> Array:
    result: Array = (values - values.mean()) / np.sqrt(values.var() + 1e-5) * gamma + beta
    return result


@pytest.mark.parametrize("run", [MASKED_MUTUAL_ATTENTION.run, _run_onnx])
def test_a_pixel_without_a_relevant_word_attends_to_nothing(run: Run) -> None:
    arrays = _inputs(7, n=1, p=6, length=3, c=16, shared=False)
    arrays[1] = -np.abs(arrays[1])
    arrays[0][0, 2] = np.abs(arrays[0][0, 2])  # all of this pixel's scores are negative
    f_lav, _ = run(arrays)
    np.testing.assert_allclose(
        f_lav[0, 2], _norm(arrays[0][0, 2], arrays[3], arrays[4]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("run", [MASKED_MUTUAL_ATTENTION.run, _run_onnx])
def test_a_padded_word_changes_nothing_and_learns_nothing(run: Run) -> None:
    arrays = _inputs(8, n=2, p=6, length=4, c=16, shared=False)
    before = run(arrays)
    changed = [array.copy() for array in arrays]
    changed[1][:, 3] = 5.0
    after = run(changed)
    np.testing.assert_array_equal(before[0], after[0])
    np.testing.assert_array_equal(before[1][:, :3], after[1][:, :3])
    np.testing.assert_allclose(
        before[1][0, 3], _norm(arrays[1][0, 3], arrays[5], arrays[6]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("run", [MASKED_MUTUAL_ATTENTION.run, _run_onnx])
def test_a_sentence_of_pads_only_is_finite(run: Run) -> None:
    arrays = _inputs(9, n=1, p=6, length=4, c=16, shared=False)
    arrays[2][:] = 0.0
    f_lav, f_val = run(arrays)
    assert np.isfinite(f_lav).all()
    np.testing.assert_allclose(
        f_val[0, 0], _norm(arrays[1][0, 0], arrays[5], arrays[6]), rtol=1e-4, atol=1e-5
    )


def test_normalized_words_collect_the_mean_of_their_pixels() -> None:
    arrays = _inputs(6, n=1, p=9, length=3, c=8, shared=False)
    arrays[0][:] = arrays[0][:, :1]  # every pixel is the same, so every mean is that pixel
    arrays[1] = np.abs(arrays[1]) * np.sign(arrays[0][:, 0])  # and every word concerns it
    _, f_val = MASKED_MUTUAL_ATTENTION.run(arrays, {"normalize": 1})
    wanted = _norm(arrays[0][0, 0] + arrays[1][0, 0], arrays[5], arrays[6])
    np.testing.assert_allclose(f_val[0, 0], wanted, rtol=1e-5)


def test_reference_keeps_the_type_of_its_inputs() -> None:
    arrays = _inputs(1, n=1, p=3, length=2, c=4, shared=False)
    for dtype in (np.float16, np.float32, np.float64):
        outputs = MASKED_MUTUAL_ATTENTION.run([array.astype(dtype) for array in arrays])
        assert [output.dtype for output in outputs] == [dtype, dtype]


def test_large_scores_do_not_overflow() -> None:
    arrays = _inputs(2, n=1, p=3, length=2, c=4, shared=False)
    arrays[0] *= 1e4
    assert all(np.isfinite(output).all() for output in MASKED_MUTUAL_ATTENTION.run(arrays))


def test_defaults_of_spec_and_reference_agree() -> None:
    arrays = _inputs(4, n=2, p=5, length=3, c=4, shared=True)
    names = [operand.name for operand in MASKED_MUTUAL_ATTENTION.inputs]
    z_v, z_l, *rest = arrays
    direct = masked_mutual_attention(z_v, z_l, **dict(zip(names[2:], rest, strict=True)))
    for a, b in zip(direct, MASKED_MUTUAL_ATTENTION.run(arrays), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("index", "shape", "sentence"),
    [
        (1, (2, 4, 5), r"'z_l' as \[2, 4, 5\]"),
        (2, (2, 3), r"'word_mask' as \[2, 3\]"),
        (0, (3, 6, 8), r"'z_v' as \[3, 6, 8\]"),
        (3, (8, 1), r"'gamma_v' as \[8, 1\]; it takes \[C="),
    ],
)
def test_wrong_shapes_are_named(index: int, shape: tuple[int, ...], sentence: str) -> None:
    arrays = _inputs(4, n=2, p=6, length=4, c=8, shared=False)
    arrays[index] = np.zeros(shape)
    with pytest.raises(ShapeError, match="MaskedMutualAttention got"):
        MASKED_MUTUAL_ATTENTION.run(arrays)
    if index in (0, 2, 3):
        with pytest.raises(ShapeError, match=sentence):
            MASKED_MUTUAL_ATTENTION.run(arrays)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ShapeError, match="got 2 inputs; it takes 7: z_v, z_l, word_mask"):
        MASKED_MUTUAL_ATTENTION.run([np.zeros((1, 1, 1)), np.zeros((1, 1, 1))])


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.op_type)
def test_table_of_kernels(kernel: KernelSpec) -> None:
    assert find(kernel.domain, kernel.op_type) is kernel
    function = kernel.body(18)
    assert (function.domain, function.name) == (kernel.domain, kernel.op_type)
    assert list(function.input) == [operand.name for operand in kernel.inputs]
    assert list(function.output) == [operand.name for operand in kernel.outputs]
    assert list(function.attribute) == list(kernel.attributes)
    assert not onnx.defs.has(kernel.op_type)
    assert kernel.node_attributes["plugin_namespace"] == kernel.domain
    assert find("", kernel.op_type) is None


def test_distance_to_ties_is_that_of_the_closest_real_word() -> None:
    arrays = _inputs(11, n=2, p=6, length=4, c=16, shared=True)
    arrays[1][1, 3] = 0.0  # a pad: its scores are exactly at the threshold and do not count
    far = MASKED_MUTUAL_ATTENTION.distance_to_ties(arrays)
    scores = relevance(arrays[0], arrays[1])[:, :, :3]
    rms = np.sqrt(np.square(scores).mean(axis=(1, 2)))
    np.testing.assert_allclose(far, np.abs(scores).min(axis=(1, 2)) / rms)
    arrays[1][1, 0] = 0.0
    assert MASKED_MUTUAL_ATTENTION.distance_to_ties(arrays).tolist() == [far[0], 0.0]


def test_nothing_is_tied_without_a_real_word_or_a_decision() -> None:
    arrays = _inputs(12, n=2, p=6, length=4, c=16, shared=False)
    arrays[2][0] = 0.0
    assert MASKED_MUTUAL_ATTENTION.distance_to_ties(arrays)[0] == np.inf
    without = replace(MASKED_MUTUAL_ATTENTION, closeness=None)
    assert without.distance_to_ties(arrays).tolist() == [np.inf, np.inf]
