"""Attach to each graph the functions of the custom operators it uses.

Afterwards any runtime of standard ONNX computes the graph, and one that has the plugin may put it
in the function's place.
"""

from __future__ import annotations

from onnx import ModelProto, NodeProto

from rt_ris.errors import PluginError
from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import GRAPHS
from rt_ris_export.step import Context, Step
from rt_ris_kernels.kernel import KernelSpec
from rt_ris_kernels.ops import find


def complete(model: ModelProto) -> tuple[str, ...]:
    """Attach the missing functions to a graph, in place, and check the result.

    Returns:
        ``domain::op_type`` of each custom operator, once.

    Raises:
        PluginError: an operator that no kernel defines, or a node that leaves attributes out.
        PlanError: the graph is not valid ONNX.
    """
    nodes = onnx_graph.custom_nodes(model)
    kernels = {kernel.op_type: kernel for kernel in (kernel_of(node) for node in nodes)}
    version = onnx_graph.opset(model)
    onnx_graph.attach(model, [kernel.body(version) for kernel in kernels.values()])
    onnx_graph.check(model)
    return tuple(f"{kernel.domain}::{kernel.op_type}" for kernel in kernels.values())


def kernel_of(node: NodeProto) -> KernelSpec:
    """The kernel that a node of another than the standard domain stands for.

    Raises:
        PluginError: there is none, or the node leaves out attributes.
    """
    kernel = find(node.domain, node.op_type)
    if kernel is None:
        raise PluginError(
            f"Node '{node.name}' uses {node.domain}::{node.op_type}, which no kernel defines. "
            "Write it with standard operators, or add a kernel to rt_ris_kernels."
        )
    missing = set(kernel.node_attributes) - onnx_graph.attribute_names(node)
    if missing:
        raise PluginError(
            f"Node '{node.name}' ({kernel.op_type}) does not state {', '.join(sorted(missing))}; "
            "a node must state every attribute of its kernel."
        )
    return kernel


def _run(context: Context) -> None:
    graphs = context.artefacts.get(GRAPHS)
    for stage_id, path in graphs.items():
        model = onnx_graph.load(path)
        used = complete(model)
        context.workspace.write_graph(stage_id, model)
        context.say(f"checked {stage_id}" + (f" with {', '.join(used)}" if used else ""))
    context.artefacts.put(GRAPHS, graphs)


FUNCTION = Step(name="function", needs=(GRAPHS,), makes=(GRAPHS,), run=_run)
