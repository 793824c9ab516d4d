"""Every body against float64: the CUDA kernels on a GPU, or the emulator where there is none."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from cases import Case, draw

from rt_ris_kernels.kernel import Array
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION

Run = Callable[[list[Array], Case], tuple[Array, Array]]

LIMITS = {"float16": 2e-3, "float32": 1e-5}
"""Relative error against float64 on the same rounded inputs."""
TIMES_PLAIN = 2.0
"""A kernel may err this many times as much as the unfused graph of its own type."""
SCALE = 2.0**-6
"""Of A^T and z_l in the plain graph where it overflows; exact, epsilon follows as its square."""
MOVED_SHARE = 0.01


def relative(found: Array, true: Array) -> float:
    """||a - b|| / ||b||; infinite where something is not finite."""
    found = found.astype(np.float64)
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.linalg.norm(found - true) / max(np.linalg.norm(true), 1e-300))


def unfused(arrays: list[Array], case: Case, plain: Run) -> tuple[tuple[Array, Array], bool]:
    """The plain graph, every step rounded to the inputs' type; and whether it had to be scaled."""
    with np.errstate(over="ignore", invalid="ignore"):
        outputs = plain(arrays, case)
        if all(np.isfinite(output).all() for output in outputs):
            return outputs, False
        return _scaled(arrays, case), True


def _numpy(arrays: list[Array], case: Case) -> tuple[Array, Array]:
    f_lav, f_val = MASKED_MUTUAL_ATTENTION.run(arrays, case.attributes)
    return f_lav, f_val


def _scaled(arrays: list[Array], case: Case) -> tuple[Array, Array]:
    """LN(y + z; e) = LN(sy + sz; s^2 e), for the sums over pixels.

    Layer norms take their moments in float32, as every runtime does, or none would be finite.
    """
    z_v, z_l, mask, *norms = arrays
    scores = z_v @ z_l.swapaxes(1, 2)
    keep = (scores >= _logit(case)) & (mask > 0)[:, None, :]
    shifted = np.where(keep, scores, scores.dtype.type(-1e4)).astype(np.float32)
    weights = np.exp(shifted - shifted.max(-1, keepdims=True))
    weights = ((weights / weights.sum(-1, keepdims=True)) * keep).astype(z_v.dtype)
    small = z_v.dtype.type(SCALE)
    collected = (weights * small).swapaxes(1, 2) @ z_v
    if case.normalize:
        mass = weights.sum(1, dtype=np.float32)[..., None] + np.float32(1e-6)
        collected = (collected / mass).astype(z_v.dtype)
    pixels = _norm(weights @ z_l + z_v, norms[0], norms[1], 1e-5)
    return pixels, _norm(collected + small * z_l, norms[2], norms[3], 1e-5 * SCALE**2)


def _logit(case: Case) -> float:
    from rt_ris_kernels.ops.masked_mutual_attention import logit

    return logit(case.threshold)


def _norm(values: Array, gamma: Array, beta: Array, epsilon: float) -> Array:
    wide = values.astype(np.float32)
    centred = wide - wide.mean(-1, keepdims=True)
    variance = np.square(centred).mean(-1, keepdims=True)
    result: Array = (centred / np.sqrt(variance + np.float32(epsilon)) * gamma + beta).astype(
        values.dtype
    )
    return result


def check(case: Case, run: Run, *, plain: Run | None = None) -> dict[str, object]:
    """One case: errors of both outputs, of the plain graph, and whether all limits hold.

    ``plain`` computes the unfused graph; numpy does where it is not given.
    """
    arrays, moved = draw(case)
    wide = [array.astype(np.float64) for array in arrays]
    true = MASKED_MUTUAL_ATTENTION.run(wide, case.attributes)
    errors = [relative(f, t) for f, t in zip(run(arrays, case), true, strict=True)]
    reference, scaled = unfused(arrays, case, plain or _numpy)
    plain_errors = [relative(f, t) for f, t in zip(reference, true, strict=True)]
    limit = LIMITS[case.dtype]
    held = all(error <= limit for error in errors)
    if case.dtype == "float16":
        pairs = zip(errors, plain_errors, strict=True)
        held = held and all(mine <= TIMES_PLAIN * theirs for mine, theirs in pairs)
    held = held and moved <= max(2, MOVED_SHARE * arrays[0].shape[0] * case.pixels)
    return {
        "case": case.name,
        "passed": held,
        "f_lav": errors[0],
        "f_val": errors[1],
        "plain_f_lav": plain_errors[0],
        "plain_f_val": plain_errors[1],
        "plain_is_scaled": scaled,
        "limit": limit,
        "pixels_moved_from_ties": moved,
    }
