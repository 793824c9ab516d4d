"""Times of one call on a GPU, launched and in a CUDA graph, beside what PyTorch takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from cases import Case, draw
from torch import Tensor
from torch.nn import functional

from rt_ris_kernels import torch_op
from rt_ris_kernels.launch import MaskedMutualAttentionLauncher

ROTATED_BYTES = 150 * 2**20
"""Buffers take turns until this much has passed: more than twice the L2 of an H200."""
LOAD_BYTES = 4 * 2**30

TIMED = (
    Case(padded=False),
    Case(words=77, padded=False),
    Case(channels=128, padded=False),
    Case(expressions=4, padded=False),
    Case(expressions=16, padded=False),
    Case(expressions=16, shared=False, padded=False),
    Case(expressions=16, shared=False, words=77, padded=False),
    Case(dtype="float32", padded=False),
)

Call = Callable[[], object]


@dataclass(frozen=True)
class Spread:
    """Microseconds of one call over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, times: list[float]) -> Spread:
        """Median, and the tenth and ninetieth percentile."""
        ordered = sorted(times)
        edge = len(ordered) // 10
        return cls(round(median(ordered), 3), round(ordered[edge], 3), round(ordered[-1 - edge], 3))


def copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy on the device."""
    source = torch.randn(LOAD_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    times = [_elapsed_us(lambda: target.copy_(source)) for _ in range(12)]
    return 2 * LOAD_BYTES / (median(times[2:]) * 1e-6)


def least_bytes(case: Case) -> int:
    """Every input read once, every output written once."""
    images = 1 if case.shared else case.expressions
    pixels = case.pixels * case.channels
    words = case.expressions * case.words * case.channels
    return (images * pixels + case.expressions * pixels + 2 * words) * (
        2 if case.dtype == "float16" else 4
    )


def kernel_calls(case: Case, launcher: MaskedMutualAttentionLauncher) -> list[Call]:
    """One call for each set of buffers; they use PyTorch's current stream."""
    calls: list[Call] = []
    plan = launcher.geometry(**case.sizes)
    for inputs in buffers(case):
        f_lav = torch.empty_like(inputs[0].expand(case.expressions, -1, -1).contiguous())
        f_val = torch.empty_like(inputs[1])
        room = torch.empty(plan.workspace_bytes // 4, device="cuda")

        def call(
            inputs: list[Tensor] = inputs,
            out: tuple[Tensor, Tensor] = (f_lav, f_val),
            room: Tensor = room,
        ) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            launcher.launch(inputs, out, workspace=room, stream=stream, attributes=case.attributes)

        calls.append(call)
    return calls


def torch_calls(case: Case, body: Callable[..., object]) -> list[Call]:
    """The same for a function of the operator's inputs."""
    return [
        (lambda inputs=inputs: body(*inputs, *case.attributes.values()))  # type: ignore[misc]
        for inputs in buffers(case)
    ]


def sdpa(
    z_v: Tensor, z_l: Tensor, word_mask: Tensor, *rest: Tensor | float
) -> tuple[Tensor, Tensor]:
    """The pixels' half by scaled_dot_product_attention; the words' half needs the weights."""
    gamma_v, beta_v, gamma_l, beta_l, _, scale, epsilon, _ = rest
    scores = z_v @ z_l.transpose(1, 2) * scale
    keep = (scores >= 0) & (word_mask[:, None] > 0)
    weights = torch.where(keep, scores, -1e4).softmax(-1) * keep
    query = z_v.expand(z_l.shape[0], -1, -1)
    mixed = functional.scaled_dot_product_attention(query, z_l, z_l, attn_mask=keep, scale=scale)
    width = (z_v.shape[-1],)
    pixels = functional.layer_norm(mixed + z_v, width, gamma_v, beta_v, epsilon)
    words = weights.transpose(1, 2) @ z_v + z_l
    return pixels, functional.layer_norm(words, width, gamma_l, beta_l, epsilon)


def launched(calls: list[Call]) -> Spread:
    """Microseconds per call, one launch after the other from Python."""
    for call in calls:
        call()
    return Spread.of(
        [_elapsed_us(lambda: [call() for call in calls]) / len(calls) for _ in range(20)]
    )


def in_graph(calls: list[Call]) -> Spread:
    """Microseconds per call when all calls are one CUDA graph that is replayed."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(5):
        graph.replay()
    return Spread.of([_elapsed_us(graph.replay) / len(calls) for _ in range(50)])


def time_case(
    case: Case, launcher: MaskedMutualAttentionLauncher, *, bandwidth: float
) -> dict[str, object]:
    """All times of one case, and the least time that the bytes take."""
    floor = least_bytes(case) / bandwidth * 1e6
    ours = kernel_calls(case, launcher)
    compiled = torch.compile(torch_op.eager, dynamic=False)
    bodies: dict[str, Callable[..., object]] = {
        "eager": torch_op.eager,
        "compiled": compiled,
        "sdpa": sdpa,
    }
    row: dict[str, object] = {
        "case": case.name,
        "least_bytes": least_bytes(case),
        "floor_us": round(floor, 3),
        "buffers": len(ours),
        "kernel": {
            "graph_us": vars(in_graph(ours)),
            "graph_one_buffer_us": vars(in_graph(ours[:1] * len(ours))),
            "launched_us": vars(launched(ours)),
            "operator_launched_us": vars(
                launched(torch_calls(case, torch.ops.rt_ris.masked_mutual_attention))
            ),
        },
    }
    for name, body in bodies.items():
        with torch.no_grad():
            calls = torch_calls(case, body)
            row[name] = {
                "graph_us": vars(in_graph(calls)),
                "launched_us": vars(launched(calls)),
            }
    return row


def buffers(case: Case) -> list[list[Tensor]]:
    """Sets of inputs that take turns, so that none is in the cache when its turn comes."""
    arrays, _ = draw(case)
    first = [torch.from_numpy(array).cuda() for array in arrays]
    per_set = least_bytes(case)
    count = max(2, -(-ROTATED_BYTES // per_set))
    return [first] + [[tensor.clone() for tensor in first] for _ in range(count - 1)]


def _elapsed_us(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3
