"""Masked mutual attention on a GPU: checks, then two launches on the caller's stream."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from rt_ris.errors import ShapeError, TargetMismatchError
from rt_ris_kernels.arguments import fill
from rt_ris_kernels.arrays import DeviceArray, device_array
from rt_ris_kernels.binary import Binary, load_binary
from rt_ris_kernels.driver import CudaDriver, Driver
from rt_ris_kernels.geometry import Geometry, Launch, geometry, workspace_bound
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION

LEAST_CAPABILITY = 80
"""m16n8k16 products of half precision begin here."""
PROGRAMMATIC_LAUNCH = 90
"""Kernels that start while the one before them on the stream ends begin here."""
_ALIGNMENT = 16


class MaskedMutualAttentionLauncher:
    """The compiled kernels on one GPU; may be shared by threads that use different streams.

    Args:
        device: ordinal of the GPU; None is that of the calling thread's CUDA context.
        driver: the CUDA driver, or a stand-in.
        binary: the compiled kernels; those of the package by default.

    Raises:
        TargetMismatchError: the GPU is older than compute capability 8.0, its driver than the
            code for it, or the binary is of another version.
        IntegrityError: the binary's bytes are not those recorded.
        MissingExtraError: cuda-bindings is not installed.
        BackendError: CUDA refused something.
    """

    def __init__(
        self,
        device: int | None = None,
        *,
        driver: Driver | None = None,
        binary: Binary | None = None,
    ) -> None:
        self._driver = driver or CudaDriver()
        self.device = device = self._driver.current_device() if device is None else device
        self.capability = self._driver.compute_capability(device)
        if self.capability < LEAST_CAPABILITY:
            raise TargetMismatchError(
                f"GPU {device} has compute capability {self.capability / 10}; the kernels need "
                f"{LEAST_CAPABILITY / 10} or later. Use the operator's standard-operator function "
                "there.",
                expected=f">= {LEAST_CAPABILITY / 10}",
                found=str(self.capability / 10),
            )
        self.multiprocessors = self._driver.multiprocessors(device)
        self.binary = binary or load_binary()
        code = self.binary.code_for(capability=self.capability, cuda=self._driver.cuda_version())
        self._library = self._driver.load(code, device=device)
        self._kernels: dict[str, tuple[object, int]] = {}

    def geometry(
        self, *, expressions: int, pixels: int, words: int, channels: int, dtype: str
    ) -> Geometry:
        """How a call of these sizes is launched here, workspace included.

        Raises:
            ShapeError: no kernel is compiled for these sizes.
        """
        return geometry(
            expressions=expressions,
            pixels=pixels,
            words=words,
            channels=channels,
            dtype=dtype,
            multiprocessors=self.multiprocessors,
        )

    def launch(
        self,
        inputs: Sequence[object],
        outputs: Sequence[object],
        *,
        workspace: object,
        stream: int,
        attributes: Mapping[str, float | int] | None = None,
    ) -> None:
        """Puts the operator on a stream and returns; allocates nothing, so it can be captured.

        Args:
            inputs: GPU arrays in the operator's order, all float16 or all float32, contiguous and
                aligned to 16 bytes. ``z_v`` may have N = 1 for expressions of one image.
            outputs: f_lav and f_val, of the same type; overwritten.
            workspace: float32 GPU memory of at least ``geometry(...).workspace_bytes``; not to be
                used by another stream before this call has ended.
            stream: CUDA stream handle of this launcher's GPU; 0 is the default stream of the
                current context. Inputs must be ready on it: nothing here waits for their makers.
            attributes: threshold, scale, epsilon, normalize; the operator's defaults otherwise.

        Raises:
            ShapeError: a wrong type, shape, layout, alignment or memory; nothing was launched.
            BackendError: CUDA refused a launch.
        """
        arrays = self._arrays(inputs, outputs)
        sizes = _sizes(arrays)
        plan = self.geometry(dtype=arrays[0].dtype, **sizes)
        room = device_array(workspace, name="workspace", writable=True)
        self._check_memory([*arrays, room], plan)
        self._check_stream(stream)
        self.launch_unchecked(
            [array.pointer for array in arrays],
            workspace=room.pointer,
            plan=plan,
            sizes=sizes,
            shared=arrays[0].shape[0] == 1,
            stream=stream,
            attributes=attributes,
        )

    def launch_unchecked(
        self,
        pointers: Sequence[int],
        *,
        workspace: int,
        plan: Geometry,
        sizes: Mapping[str, int],
        shared: bool,
        stream: int,
        attributes: Mapping[str, float | int] | None = None,
    ) -> None:
        """``launch`` for callers that have checked: a plugin whose engine owns the tensors."""
        arguments = fill(
            pointers,
            workspace=workspace,
            plan=plan,
            shared=shared,
            pixels=sizes["pixels"],
            words=sizes["words"],
            attributes={**MASKED_MUTUAL_ATTENTION.attributes, **(attributes or {})},
        )
        for launch, dependent in ((plan.forward, False), (plan.reduce, True)):
            self.put(
                launch, arguments=ctypes.addressof(arguments), stream=stream, dependent=dependent
            )

    def put(self, launch: Launch, *, arguments: int, stream: int, dependent: bool) -> None:
        """One kernel on a stream; ``arguments`` is the address of its ``Arguments``."""
        self._driver.launch(
            self._kernel(launch),
            launch,
            arguments=arguments,
            stream=stream,
            dependent=dependent and self.capability >= PROGRAMMATIC_LAUNCH,
        )

    def _kernel(self, launch: Launch) -> object:
        known = self._kernels.get(launch.kernel)
        if known is None or known[1] < launch.shared_bytes:
            kernel = self._driver.kernel(
                self._library, launch.kernel, device=self.device, shared_bytes=launch.shared_bytes
            )
            known = self._kernels[launch.kernel] = (kernel, launch.shared_bytes)
        return known[0]

    def _arrays(self, inputs: Sequence[object], outputs: Sequence[object]) -> list[DeviceArray]:
        operands = (*MASKED_MUTUAL_ATTENTION.inputs, *MASKED_MUTUAL_ATTENTION.outputs)
        given = [*inputs, *outputs]
        if len(given) != len(operands):
            raise ShapeError(
                f"The kernels got {len(inputs)} inputs and {len(outputs)} outputs; they take "
                f"{len(MASKED_MUTUAL_ATTENTION.inputs)} and "
                f"{len(MASKED_MUTUAL_ATTENTION.outputs)}."
            )
        written = {operand.name for operand in MASKED_MUTUAL_ATTENTION.outputs}
        arrays = [
            device_array(source, name=operand.name, writable=operand.name in written)
            for source, operand in zip(given, operands, strict=True)
        ]
        MASKED_MUTUAL_ATTENTION.check_shapes([array.shape for array in arrays])
        for array, operand in zip(arrays, operands, strict=True):
            if array.dtype != arrays[0].dtype:
                raise ShapeError(
                    f"'{operand.name}' is {array.dtype} and 'z_v' is {arrays[0].dtype}; all "
                    "tensors of a call have one type."
                )
        return arrays

    def _check_memory(self, arrays: Sequence[DeviceArray], plan: Geometry) -> None:
        operands = (*MASKED_MUTUAL_ATTENTION.inputs, *MASKED_MUTUAL_ATTENTION.outputs)
        names = [*(operand.name for operand in operands), "workspace"]
        for array, name in zip(arrays, names, strict=True):
            if array.pointer % _ALIGNMENT:
                raise ShapeError(
                    f"'{name}' begins at {array.pointer:#x}; the kernels need addresses that are "
                    f"multiples of {_ALIGNMENT}."
                )
            place = self._driver.device_of_pointer(array.pointer, name=name)
            if place != self.device:
                raise ShapeError(f"'{name}' is on GPU {place}; this launcher is of {self.device}.")
        if arrays[-1].dtype != "float32" or arrays[-1].nbytes < plan.workspace_bytes:
            raise ShapeError(
                f"'workspace' is {arrays[-1].dtype} of {arrays[-1].nbytes} bytes; float32 of "
                f"{plan.workspace_bytes} bytes is needed."
            )

    def _check_stream(self, stream: int) -> None:
        place = self._driver.device_of_stream(stream)
        if place != self.device:
            raise ShapeError(
                f"Stream {stream:#x} belongs to GPU {place}; this launcher is of {self.device}."
            )


def _sizes(arrays: Sequence[DeviceArray]) -> dict[str, int]:
    expressions, words, channels = arrays[1].shape
    return {
        "expressions": expressions,
        "pixels": arrays[0].shape[1],
        "words": words,
        "channels": channels,
    }


__all__ = ["LEAST_CAPABILITY", "MaskedMutualAttentionLauncher", "workspace_bound"]
