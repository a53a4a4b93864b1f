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
