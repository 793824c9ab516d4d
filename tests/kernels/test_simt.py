"""The CUDA source, run thread by thread on the host, against float64; and planted faults in it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rt_ris.errors import BackendError, BuildError, ShapeError
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION
from rt_ris_kernels.simt import CSRC, SOURCE, Emulator

GPU_BENCH = Path(__file__).parents[2] / "bench" / "gpu"


@pytest.fixture(scope="module", autouse=True)
def _bench_on_path() -> Iterator[None]:
    sys.path.insert(0, str(GPU_BENCH))
    yield
    sys.path.remove(str(GPU_BENCH))


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator()


def test_every_case_of_the_gpu_script(emulator: Emulator) -> None:
    from cases import CHECKS
    from check import check

    for case in CHECKS:
        small = replace(
            case, pixels=min(case.pixels, 257), expressions=min(case.expressions, 3), seed=7
        )
        row = check(
            small, lambda arrays, case: emulator.run(arrays, **case.attributes, multiprocessors=3)
        )
        assert row["passed"], row


@pytest.mark.parametrize("mean", [0.0, 16.0, 64.0])
def test_all_pixels_of_a_published_size(emulator: Emulator, mean: float) -> None:
    from cases import Case
    from check import check

    row = check(
        Case(mean=mean, seed=11), lambda arrays, case: emulator.run(arrays, **case.attributes)
    )
    assert row["passed"], row
    if mean == 64.0:
        assert row["plain_is_scaled"], "the plain float16 graph should overflow here"


@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 132])
def test_any_split_of_the_pixels_gives_the_operator(
    emulator: Emulator, multiprocessors: int
) -> None:
    from cases import Case, draw
    from check import relative

    case = Case(pixels=333, words=19, channels=128, expressions=2, normalize=1)
    arrays, _ = draw(case)
    true = MASKED_MUTUAL_ATTENTION.run([a.astype(np.float64) for a in arrays], case.attributes)
    runs = [
        emulator.run(arrays, **case.attributes, multiprocessors=multiprocessors) for _ in range(2)
    ]
    for found, again, wanted in zip(*runs, true, strict=True):
        assert found.tobytes() == again.tobytes()
        assert relative(found, wanted) < 5e-4


def test_a_pixel_that_no_word_concerns_keeps_its_own_features(emulator: Emulator) -> None:
    from cases import Case, draw

    case = Case(pixels=64, words=9, channels=128, threshold=1.0)
    arrays, _ = draw(case)
    f_lav, f_val = emulator.run(arrays, **case.attributes)
    alone = [a.astype(np.float64) for a in arrays]
    alone[1] = np.zeros_like(alone[1])
    np.testing.assert_allclose(
        f_lav, MASKED_MUTUAL_ATTENTION.run(alone, case.attributes)[0], atol=2e-2
    )
    assert np.isfinite(f_val).all()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"channels": 64}, "C=64 channels; they are compiled for 128 and 256"),
        ({"words": 81}, "L=81 words; they take 1 to 80"),
        ({"dtype": "float64"}, "got float64; they take float16 and float32"),
    ],
)
def test_sizes_without_a_kernel_are_refused(
    emulator: Emulator, change: dict[str, int | str], sentence: str
) -> None:
    from cases import Case, draw

    case = replace(Case(pixels=8, words=4, channels=128), **change)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match=sentence):
        emulator.run(draw(case)[0])


FAULTS = {
    "no barrier after the tile has come": (
        "      rr_wait_for_copies();\n      rr_barrier();\n      if (tile + 1",
        "      rr_wait_for_copies();\n      if (tile + 1",
    ),
    "no wait for the tile": (
        "      rr_wait_for_copies();\n      rr_barrier();\n      if (tile + 1",
        "      rr_barrier();\n      if (tile + 1",
    ),
    "no barrier between scores and softmax": (
        "      score(pixels);\n      rr_barrier();",
        "      score(pixels);",
    ),
    "no barrier between softmax and its readers": (
        "      attend(tile * PIXELS);\n      rr_barrier();",
        "      attend(tile * PIXELS);",
    ),
    "no barrier before the moments are joined": (
        "      mix(out, pixels);\n      rr_barrier();",
        "      mix(out, pixels);",
    ),
    "no barrier of the warp before rows leave": ("    rr_warp_barrier();\n", ""),
    "the next tile lands in the buffer in use": (
        "memory.z_v[(tile + 1 - tiles.first) % 2]",
        "memory.z_v[(tile - tiles.first) % 2]",
    ),
    "rows beyond the last pixel are read": (
        "const bool present = first_pixel + pixel < a.pixels;",
        "const bool present = true;",
    ),
    "rows beyond the last pixel are written": (
        "      if (first_pixel + pixel < a.pixels)\n        rr_store(",
        "        rr_store(",
    ),
    "pixels beyond the last one weigh": (
        "first_pixel + pixel < a.pixels ? real : 0u",
        "real",
    ),
    "a padded word counts": ("if (rr_to_float(mask[i]) > 0.0f) real", "real"),
    "the threshold is ignored": ("&& s[i] >= a.threshold)) s[i] = none", ")) s[i] = none"),
    "the transposed product is not transposed": (
        "rr_load_matrices_transposed(weights, left + k * A_ROW + m * 16)",
        "rr_load_matrices(weights, left + k * A_ROW + m * 16)",
    ),
    "one word step of A^T is left out": (
        "for (int m = 0; m < WORD_STEPS; m++) {\n        u32 weights",
        "for (int m = 0; m < WORD_STEPS - 1; m++) {\n        u32 weights",
    ),
    "two halves of a fragment are swapped": ("row + 8 * half", "row + 8 * (1 - half)"),
    "the last partial sum is dropped": ("if (split < a.splits)", "if (split < a.splits - 1)"),
    "moments of the groups are averaged without their distances": (
        "squares += group[i].y + size * apart * apart;",
        "squares += group[i].y;",
    ),
}


OTHER_KERNELS = (
    "HALF_FORWARD(256",
    "HALF_FORWARD(128, 80",
    "SINGLE_FORWARD(",
    "REDUCE(f32",
    "REDUCE(f16, f16, 256",
)
"""Entry points that the planted faults are not run through: a mutant compiles without them."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    from cases import Case, draw
    from check import LIMITS, relative

    right, wrong = FAULTS[fault]
    text = SOURCE.read_text()
    assert right in text, "the fault no longer fits the source; plant it anew"
    planted = text.replace(right, wrong, 1)
    planted = "\n".join(line for line in planted.split("\n") if not line.startswith(OTHER_KERNELS))
    source = tmp_path / "planted.cu"
    source.write_text(planted)
    mutant = Emulator(source)
    case = Case(pixels=173, words=21, channels=128, expressions=2, normalize=1, mean=1.0)
    arrays, _ = draw(case)
    true = MASKED_MUTUAL_ATTENTION.run([a.astype(np.float64) for a in arrays], case.attributes)
    try:
        found = mutant.run(arrays, **case.attributes, multiprocessors=2)
    except BackendError:
        return  # raced, read what nothing wrote, or left its buffers
    errors = [relative(f, t) for f, t in zip(found, true, strict=True)]
    assert max(errors) > LIMITS["float16"], errors


def test_a_source_that_does_not_compile_is_named(tmp_path: Path) -> None:
    source = tmp_path / "broken.cu"
    source.write_text('#include "machine.cuh"\nthis is no C++\n')
    with pytest.raises(BuildError, match="refused the kernel source"):
        Emulator(source)


def test_kernels_include_nothing_but_their_machine() -> None:
    for path in (SOURCE, CSRC / "machine.cuh"):
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert includes == [f'#include "{"machine.cuh" if path == SOURCE else "machine_simt.h"}"']
