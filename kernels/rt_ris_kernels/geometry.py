"""How a call of the CUDA kernels is cut into blocks: names, grids, shared memory, workspace.

Everything here is arithmetic on sizes, so that the launcher, the TensorRT plugin and the emulator
agree. The kernels are described in ``csrc/masked_mutual_attention.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass

from rt_ris.errors import ShapeError

CHANNELS = (128, 256)
"""Feature channels C for which kernels are compiled."""
WORD_CAPACITIES = (32, 80)
"""Words L are padded to the next of these inside the kernels; a padded word costs time only."""
DTYPES = ("float16", "float32")
MAX_BLOCKS = 320
"""Most blocks at work on one call: about two on each multiprocessor of the largest GPUs so far."""
MAX_EXPRESSIONS = 65535
"""Blocks that a grid takes in y."""
MAX_ELEMENTS = 2**31 - 1
"""P * C of one expression: the kernels count its elements in 32 bits."""
TILE_PIXELS = 32
"""Pixels that a block takes at a time."""

_THREADS = 256
_WARPS = _THREADS // 32
_HALF_ROW_PAD = 8
_SINGLE_ROW_PAD = 4
_MOST_STAGED = 80 * 128
_PARTIALS_PER_THREAD = 16
_MOST_REDUCING_THREADS = 512


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: entry point.
        grid: blocks in x and y.
        threads: per block.
        shared_bytes: dynamic shared memory per block.
    """

    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """The two launches of a call and how its pixels are split among blocks.

    Attributes:
        forward: pixels against words; ``splits`` blocks per expression.
        reduce: the partial sums of each word.
        splits: partial sums per expression.
        tiles: runs of pixels, which the splits share.
        workspace_bytes: for the partial sums; float32, 16-byte aligned.
    """

    forward: Launch
    reduce: Launch
    splits: int
    tiles: int
    workspace_bytes: int


def check_sizes(*, expressions: int, pixels: int, words: int, channels: int, dtype: str) -> None:
    """Raises unless kernels for these sizes exist.

    Raises:
        ShapeError: says which size and what is accepted.
    """
    if dtype not in DTYPES:
        raise ShapeError(
            f"The kernels got {dtype}; they take {' and '.join(DTYPES)}. Convert the tensors, or "
            "use the standard-operator function."
        )
    if channels not in CHANNELS:
        raise ShapeError(
            f"The kernels got C={channels} channels; they are compiled for "
            f"{' and '.join(map(str, CHANNELS))}. Use the standard-operator function for others."
        )
    if not 1 <= words <= WORD_CAPACITIES[-1]:
        raise ShapeError(
            f"The kernels got L={words} words; they take 1 to {WORD_CAPACITIES[-1]}. Cut the "
            "sentences, or use the standard-operator function."
        )
    for name, size in (("N (expressions)", expressions), ("P (pixels)", pixels)):
        if size < 1:
            raise ShapeError(f"The kernels got {name}={size}; at least 1 is needed.")
    if pixels * channels > MAX_ELEMENTS:
        raise ShapeError(
            f"The kernels got P={pixels} pixels of C={channels} channels; P * C may be "
            f"{MAX_ELEMENTS}."
        )
    if expressions > MAX_EXPRESSIONS:
        raise ShapeError(
            f"The kernels got N={expressions} expressions; a grid takes {MAX_EXPRESSIONS}."
        )


def geometry(
    *,
    expressions: int,
    pixels: int,
    words: int,
    channels: int,
    dtype: str,
    multiprocessors: int,
) -> Geometry:
    """How a call is launched on a GPU with so many multiprocessors.

    Results do not depend on the clock, but the number of splits decides the order in which a word's
    pixels are summed: the same sizes on the same GPU give the same bits.

    Raises:
        ShapeError: no kernel is compiled for these sizes.
    """
    check_sizes(expressions=expressions, pixels=pixels, words=words, channels=channels, dtype=dtype)
    capacity = next(size for size in WORD_CAPACITIES if words <= size)
    tiles = -(-pixels // TILE_PIXELS)
    per_multiprocessor = 2 if dtype == "float16" and capacity == WORD_CAPACITIES[0] else 1
    blocks = min(MAX_BLOCKS, multiprocessors * per_multiprocessor)
    splits = max(1, min(tiles, blocks // expressions))
    short = "f16" if dtype == "float16" else "f32"
    forward = Launch(
        kernel=f"forward_{short}_c{channels}_w{capacity}_p{TILE_PIXELS}",
        grid=(splits, expressions),
        threads=_THREADS,
        shared_bytes=_forward_bytes(channels, capacity, dtype, buffers=1 if splits == tiles else 2),
    )
    return Geometry(
        forward=forward,
        reduce=_reduction(short, words, channels, expressions=expressions, splits=splits),
        splits=splits,
        tiles=tiles,
        workspace_bytes=expressions * splits * words * (channels + 1) * 4,
    )


def workspace_bound(*, expressions: int, words: int, channels: int) -> int:
    """Bytes that suffice on any GPU for any pixel count: max(N, 320) * L * (C + 1) * 4."""
    return max(expressions, MAX_BLOCKS) * words * (channels + 1) * 4


def _forward_bytes(channels: int, capacity: int, dtype: str, *, buffers: int) -> int:
    if dtype == "float32":
        row = channels + _SINGLE_ROW_PAD
        staged = capacity * row if capacity * channels <= _MOST_STAGED else 0
        return (TILE_PIXELS * row + TILE_PIXELS * capacity + staged) * 4
    row = channels + _HALF_ROW_PAD
    groups = _WARPS // (TILE_PIXELS // 16)  # warps that share a row of pixels
    slices = groups if capacity == WORD_CAPACITIES[0] else 1
    words = capacity * row * 2
    attention = TILE_PIXELS * (capacity + 8) * (2 + 4 * slices)
    moments = TILE_PIXELS * groups * 8
    norm = 2 * channels * 2
    return words + attention + moments + norm + buffers * TILE_PIXELS * row * 2


def _reduction(short: str, words: int, channels: int, *, expressions: int, splits: int) -> Launch:
    lanes = channels // 4
    readers = 4
    while readers * _PARTIALS_PER_THREAD < splits and readers * 2 * lanes <= _MOST_REDUCING_THREADS:
        readers *= 2
    return Launch(
        kernel=f"reduce_{short}_c{channels}",
        grid=(words, expressions),
        threads=readers * lanes,
        shared_bytes=(readers * channels + 2 * (channels // 32) + readers) * 4,
    )
