"""Graphs from ONNX's text form, and what they answer; shared by the tests of graph surgery."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime


def parsed(text: str) -> onnx.ModelProto:
    """The model of a text, its weights random, and no shape but theirs and those of inputs and outputs."""
    model = onnx.parser.parse_model(text)
    generator = np.random.default_rng(0)
    for value in model.graph.value_info:
        content = generator.normal(size=[dim.dim_value for dim in value.type.tensor_type.shape.dim])
        model.graph.initializer.append(onnx.numpy_helper.from_array(content.astype(np.float32), value.name))
    model.graph.ClearField("value_info")
    return model


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)[0]


def shapes_at(model: onnx.ModelProto, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's values for one size of its inputs."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    sizes = {"batch": rows, "length": tokens}
    for value in [*fixed.graph.input, *fixed.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = sizes[dim.dim_param]
    found = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    shapes = {
        value.name: value.type.tensor_type.shape.dim for value in [*found.input, *found.value_info, *found.output]
    }
    return {
        name: tuple(dim.dim_value for dim in dims)
        for name, dims in shapes.items()
        if all(dim.HasField("dim_value") for dim in dims)
    }
