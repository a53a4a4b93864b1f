"""ONNX graphs with free dimensions ``batch`` and ``length``, and their variants. Needs onnx and onnxscript only."""

from __future__ import annotations

import logging
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_bucket.artifact import WEIGHTS
from hf_bucket.attention import straighten
from hf_bucket.batch import Array
from hf_bucket.errors import ExportError, missing_part
from hf_bucket.ladder import Bucket
from hf_bucket.liveness import activation_bytes
from hf_bucket.narrow import narrow
from hf_bucket.surgery import SIZES, Shapes, constant
from hf_bucket.tasks import InputSpec, OutputSpec, PaddingSide, Signature, Task
from hf_bucket.weights import check_external_data

if TYPE_CHECKING:
    import onnx_ir as ir

BATCH, LENGTH = "batch", "length"

# Tensors up to this many elements are computed when a variant is made: shapes and masks, never weights.
_FOLDED_ELEMENTS = 8192


def _libraries() -> tuple[types.ModuleType, types.ModuleType]:
    """Return onnx_ir and onnxscript's optimizer.

    Raises:
        DependencyError: they are not installed.
    """
    try:
        import onnx_ir
        from onnxscript import optimizer
    except ImportError as error:
        raise missing_part(error.name or "onnxscript", "onnx", "making a graph") from error
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    return onnx_ir, optimizer


def load_graph(path: Path) -> ir.Model:
    """Return the graph in a file; weights beside it stay on disk until they are needed.

    Raises:
        ExportError: not an ONNX file.
        ArtifactError: it takes weights from outside its folder.
    """
    onnx_ir, _ = _libraries()
    try:
        model: ir.Model = onnx_ir.load(path)
    except Exception as error:  # protobuf, onnx_ir and the file system each raise their own
        raise ExportError(f"{path} cannot be read as ONNX ({error}); export the model again") from error
    check_external_data(path)
    return model


def adopt(
    model: ir.Model,
    task: Task,
    pad_ids: Mapping[str, int],
    *,
    padding_side: PaddingSide = "right",
    counted_id: int | None = None,
    narrowed: bool = True,
) -> Signature:
    """Name the free dimensions ``batch`` and ``length``, drop what exporters leave behind, and return the signature.

    Args:
        pad_ids: value of a padding token per input.
        narrowed: leave out what the outputs do not depend on: see ``narrow``.

    Raises:
        ExportError: an input or output is not one the task knows, or has not the axes the task says.
    """
    onnx_ir, _ = _libraries()
    inputs = tuple(_input_spec(value, task, pad_ids) for value in model.graph.inputs)
    kept = [value for value in model.graph.outputs if value.name in task.output_axes]
    if len(kept) != len(task.output_axes):
        names = [value.name for value in model.graph.outputs]
        raise ExportError(
            f"the graph returns {names}, {task.name} needs {list(task.output_axes)}; export it for this task"
        )
    outputs = tuple(_output_spec(value, task) for value in kept)
    model.graph.outputs[:] = kept
    _name_squeezed_axes(model)
    if narrowed:
        narrow(model)
    tidy(model)
    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape([BATCH, LENGTH])
    for value, spec in zip(kept, outputs, strict=True):
        value.shape = onnx_ir.Shape(_output_shape(value, spec, BATCH, LENGTH))
    return Signature(inputs=inputs, outputs=outputs, padding_side=padding_side, counted_id=counted_id)


def _input_spec(value: ir.Value, task: Task, pad_ids: Mapping[str, int]) -> InputSpec:
    name = str(value.name)
    if name not in pad_ids:
        raise ExportError(f"the graph takes an input {name!r}, {task.name} can fill {list(pad_ids)}; export it without")
    dims = list(value.shape) if value.shape is not None else []
    dtype = _dtype(value)
    if (
        len(dims) != len(task.input_axes)
        or any(isinstance(dim, int) for dim in dims)
        or dtype not in ("int64", "int32")
    ):
        raise ExportError(
            f"input {name!r} has shape {[str(dim) for dim in dims]} of {dtype}; expected free dimensions "
            f"[batch, length] of int64; export it with dynamic axes"
        )
    return InputSpec(name=name, dtype=dtype, axes=task.input_axes, pad_id=pad_ids[name])


def _output_spec(value: ir.Value, task: Task) -> OutputSpec:
    axes = task.output_axes[str(value.name)]
    dims = list(value.shape) if value.shape is not None else []
    fixed = [isinstance(dim, int) for dim in dims]
    if fixed != [axis == "label" for axis in axes]:
        raise ExportError(
            f"output {value.name!r} has shape {[str(dim) for dim in dims]}; expected {list(axes)} with only label fixed"
        )
    return OutputSpec(name=str(value.name), dtype=_dtype(value), axes=axes)


def _dtype(value: ir.Value) -> str:
    return str(value.dtype.numpy()) if value.dtype is not None else "unknown"


def _output_shape(value: ir.Value, spec: OutputSpec, batch: str | int, length: str | int) -> list[str | int]:
    free = {"row": batch, "token": length}
    dims: list[str | int] = []
    for axis, dim in zip(spec.axes, value.shape or (), strict=True):
        dims.append(free[axis] if axis in free else int(str(dim)))
    return dims


def _name_squeezed_axes(model: ir.Model) -> None:
    """Make every Squeeze say which axes it removes: one that says none would, in a batch of one, remove the batch too.

    mBART's ``shift_tokens_right`` has such a one. Only axes whose size was 1 whatever the batch are meant.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Squeeze" or "axes" in node.attributes or len(node.inputs) > 1:
            continue
        dims = node.inputs[0].shape if node.inputs[0] is not None else None
        if dims is None:
            continue  # nothing says which axes are meant; a batch of one is compared with torch like all others
        places = [place for place, dim in enumerate(dims) if dim == 1]
        axes = constant(places)
        node.prepend(axes)
        node.resize_inputs(2)
        node.replace_input_with(1, axes.outputs[0])


def tidy(model: ir.Model) -> None:
    """Drop stack traces, names of modules and half-known shapes: a tenth of the size stays."""
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
            if not output.is_graph_output():
                output.shape = None


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph, and its weights into ``model.onnx.data`` beside it."""
    onnx_ir, _ = _libraries()
    _map_linked(model)
    onnx_ir.save(model, path, external_data=WEIGHTS)


def _map_linked(model: ir.Model) -> None:
    """Let weights in linked files, which onnx_ir refuses to read, be read: the Hub's cache consists of such links."""
    onnx_ir, _ = _libraries()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.ExternalTensor):
            continue
        path = Path(tensor.path)
        if not path.is_symlink() and path.stat().st_nlink == 1:
            continue
        dtype, shape, offset = tensor.dtype.numpy(), tensor.shape.numpy(), tensor.offset or 0
        content: np.ndarray[Any, Any] = np.zeros(shape, dtype=dtype)  # of no bytes nothing can be mapped
        if tensor.size:
            content = np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
        value.const_value = onnx_ir.Tensor(content, name=tensor.name)


def straighten_saved(path: Path, masks: Array | None = None) -> None:
    """Leave out of a saved graph what its attentions do not need; weights stay as they are: see ``straighten``."""
    onnx_ir, _ = _libraries()
    model = load_graph(path)
    if straighten(model, shapes_by_size(path), masks):
        tidy(model)
        aside = path.with_suffix(".part")
        try:
            onnx_ir.save(model, aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)


def save_rewritten(model: ir.Model, graph: Path, target: Path) -> None:
    """Write a graph that a tool made of ``graph``; weights that are the same are read from the same file, beside it."""
    onnx_ir, _ = _libraries()
    known = load_graph(graph).graph.initializers
    for value in model.graph.initializers.values():
        tensor, source = value.const_value, known.get(str(value.name))
        if source is None or not isinstance(source.const_value, onnx_ir.ExternalTensor) or tensor is None:
            continue
        if tensor is not source.const_value and _same(tensor, source.const_value, graph.parent):
            value.const_value = source.const_value
    tidy(model)
    onnx_ir.save(model, target)


def _same(tensor: Any, external: Any, folder: Path) -> bool:
    """Return whether a tensor has the content of one in the file of weights."""
    if tensor.dtype != external.dtype or tensor.shape != external.shape:
        return False
    if hasattr(tensor, "location"):
        return bool(tensor.location == external.location and tensor.offset == external.offset)
    kind, size, offset = external.dtype.numpy(), external.size, external.offset or 0
    return bool(np.array_equal(tensor.numpy().ravel(), np.fromfile(folder / WEIGHTS, kind, size, offset=offset)))


def specialise(graph: Path, bucket: Bucket, signature: Signature, target: Path) -> int | None:
    """Write the variant of ``graph`` in which every shape is fixed to ``bucket``, and return the bytes it computes in.

    The variant refers to the same weights as ``graph``, so it must lie in a folder with them. The bytes are None where
    the size of a tensor depends on what it is computed from: see ``liveness.activation_bytes``.

    Raises:
        ExportError: a shape is still not fixed.
    """
    onnx_ir, _ = _libraries()
    model = load_graph(graph)
    for value, spec in zip(model.graph.outputs, signature.outputs, strict=True):
        value.shape = onnx_ir.Shape(_output_shape(value, spec, bucket.batch_size, bucket.length))
    _fix_shapes(model, graph.parent, (bucket.batch_size, *bucket.extent))
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)
    free = [value.name for value in model.graph.outputs if not _is_static(value)]
    if free:
        raise ExportError(f"variant {bucket.name} has outputs {free} whose shape is not fixed; report this model")
    onnx_ir.save(model, target)
    return activation_bytes(model.graph)


def shapes_at(graph: Path, rows: int, tokens: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes that the values of ``graph`` have, by name, where its inputs have one size.

    A value whose shape depends on what it is computed from is left out.
    """
    model = load_graph(graph)
    _fix_shapes(model, graph.parent, (rows, tokens))
    values = [value for node in model.graph for value in node.outputs if _is_static(value)]
    return {str(value.name): tuple(int(str(size)) for size in value.shape or ()) for value in values}


def shapes_by_size(graph: Path) -> Shapes:
    """Return the shapes of a graph's values that tell its axes apart."""
    return {size: shapes_at(graph, *size) for size in SIZES}


def _fix_shapes(model: ir.Model, folder: Path, size: tuple[int, ...]) -> None:
    """Give the inputs their size, and every value the shape that follows."""
    onnx_ir, optimizer = _libraries()
    for value in model.graph.inputs:
        value.shape = onnx_ir.Shape(size)
    _read_indices(model, folder)
    optimizer.fold_constants(
        model,
        onnx_shape_inference=True,
        input_size_limit=_FOLDED_ELEMENTS,
        output_size_limit=_FOLDED_ELEMENTS,
        should_fold=lambda node: False if any(_is_external(value) for value in node.inputs) else None,
    )


def _read_indices(model: ir.Model, folder: Path) -> None:
    """Bring small integer tensors, from which shapes and positions follow, into the graph; weights stay outside.

    onnx_ir refuses to read weights that have a hard link, and those in the cache have one per ladder.
    """
    onnx_ir, _ = _libraries()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.ExternalTensor):
            continue
        if tensor.dtype in (onnx_ir.DataType.INT64, onnx_ir.DataType.INT32) and tensor.size <= _FOLDED_ELEMENTS:
            flat = np.fromfile(
                folder / WEIGHTS, dtype=tensor.dtype.numpy(), count=tensor.size, offset=tensor.offset or 0
            )
            value.const_value = onnx_ir.Tensor(flat.reshape(tensor.shape.numpy()), name=tensor.name)


def _is_external(value: ir.Value | None) -> bool:
    onnx_ir, _ = _libraries()
    return value is not None and isinstance(value.const_value, onnx_ir.ExternalTensor)


def _is_static(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(dim, int) for dim in value.shape)
