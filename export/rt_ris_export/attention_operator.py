"""ONNX Runtime's attention operator, told to the ONNX package, which does not know it.

Then shapes are inferred through it, its multiply-adds can be counted and its attributes are checked
like those of any other operator. Only what is used here is declared: packed float32 queries, keys
and values, and a bias on the scores.
"""

from __future__ import annotations

import atexit
from typing import Final

from onnx import TypeProto, defs
from onnx.defs import OpSchema
from onnx.shape_inference import InferenceContext

DOMAIN: Final = "com.microsoft"
OPERATOR: Final = "MultiHeadAttention"
VERSION: Final = 1


def _infer(context: InferenceContext) -> None:
    """[B, L of the queries, H * width of the values]."""
    query, value = context.get_input_type(0), context.get_input_type(2)
    made = TypeProto()
    made.CopyFrom(query)
    made.tensor_type.shape.dim[2].CopyFrom(value.tensor_type.shape.dim[2])
    context.set_output_type(0, made)


def _input(name: str, kind: str, *, required: bool) -> OpSchema.FormalParameter:
    options = OpSchema.FormalParameterOption
    option = options.Single if required else options.Optional
    return OpSchema.FormalParameter(name, kind, param_option=option)


def _register() -> None:
    schema = OpSchema(
        OPERATOR,
        DOMAIN,
        VERSION,
        inputs=[
            _input("query", "T", required=True),
            _input("key", "T", required=True),
            _input("value", "T", required=True),
            _input("bias", "T", required=False),
            _input("key_padding_mask", "M", required=False),
            _input("attention_bias", "T", required=False),
        ],
        outputs=[_input("output", "T", required=True)],
        type_constraints=[("T", ["tensor(float)"], ""), ("M", ["tensor(int32)"], "")],
        attributes=[
            OpSchema.Attribute("num_heads", OpSchema.AttrType.INT, required=True),
            OpSchema.Attribute("scale", OpSchema.AttrType.FLOAT, required=True),
        ],
    )
    schema.set_type_and_shape_inference_function(_infer)
    defs.register_schema(schema)
    # ONNX (seen up to 1.23) may crash at the interpreter's end while it holds a Python function
    atexit.register(defs.deregister_schema, OPERATOR, VERSION, DOMAIN)


_register()
