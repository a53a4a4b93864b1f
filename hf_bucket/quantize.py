"""int8: products of matrices in eight bits, made by onnxruntime's quantiser and calibrated on the user's own texts.

``int8`` fixes the scale of every activation once, from texts of every length of the ladder, so that a text's answer
does not depend on its neighbours. ``int8-dynamic`` takes a scale from whatever shares the batch: its answers do depend
on them. Weights get one scale per column and seven bits: a product of eight bits by eight overflows sixteen on
processors without VNNI, and a model shall answer alike on all of them (onnxruntime's documentation, "Quantize ONNX
models", on when to reduce the range).
"""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact
from hf_bucket.assign import Assignment
from hf_bucket.batch import Features, pad
from hf_bucket.costs import compare, spread
from hf_bucket.encode import Encoder, Text, Truncation, check_texts
from hf_bucket.errors import DataError, ExportError, missing_part
from hf_bucket.graph import load_graph, save_graph, tidy
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.manifest import Quantization, Try
from hf_bucket.probes import sampler
from hf_bucket.session import Session
from hf_bucket.session_ort import EngineOptions, OrtSession, open_graph, open_unpacked

Scheme = Literal["int8", "int8-dynamic"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)

CALIBRATED = 16  # texts of every length of the ladder that scales are taken from, at most
NEEDED = 4  # ... at least
HELD_OUT = 16  # other texts of every length that the choice of layers is judged by, at most
_TRIED = (0, 1, 2, 4)  # layers left in float, the most sensitive first; a further one costs more than it gains
_RANKED_ON = 8  # texts that the layers' errors are measured on
FLIPS = 200  # one label in so many may change
_COMPARED_S = 3.0  # for comparing the speed with float's

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Texts as tokens, and which of them are for what.

    Attributes:
        chosen: rows that scales are taken from.
        held_out: other rows, that the choice of layers is made by, and the result told.
    """

    features: Features
    chosen: tuple[int, ...]
    held_out: tuple[int, ...]


def calibrate(
    given: Iterable[object], encoder: Encoder, ladder: Ladder, scheme: Scheme, *, planned: bool, report: Report
) -> Calibration | None:
    """Return the user's texts as calibration; None where ``"int8-dynamic"``, which needs none, has token counts.

    Texts longer than the ladder are cut to it.

    Args:
        planned: nobody chose the lengths of the ladder: joined texts may stand in for those that have too few.
        report: is told of that.

    Raises:
        DataError: token counts, or a length of the ladder with too few texts.
    """
    dynamic = scheme == "int8-dynamic"  # takes nothing from texts, and is judged by those there are
    items = [given] if isinstance(given, (str, bytes, dict)) else list(given)
    if any(isinstance(item, (int, np.integer)) for item in items):
        if dynamic:
            return None
        raise DataError(f"quantize={scheme!r} needs texts, calibration_dataset has token counts; give texts")
    texts = check_texts(items)
    features = encoder(texts, truncation=Truncation(max_length=ladder.max_length))
    dealt = calibration(features, ladder, needed=0 if dynamic or planned else NEEDED)
    return _filled(dealt, texts, encoder, ladder, report) if planned and not dynamic else dealt


def _filled(dealt: Calibration, texts: Sequence[Text], encoder: Encoder, ladder: Ladder, report: Report) -> Calibration:
    """Add joined texts to calibrate on, of lengths that a plan has and too few texts, such as the model's maximum.

    They are made of texts that are calibrated on anyway, and none of them is held out: nobody has such texts.
    """
    features, used = dealt.features, [texts[row] for row in dealt.chosen]
    holders = [ladder.choose(length).length for length in features.lengths]
    few = [length for length in ladder.lengths if holders.count(length) < NEEDED]
    if few:
        report(f"too few calibration texts for length {', '.join(map(str, few))}: joined ones stand in for them")
    shortest = min(features.lengths[row] for row in dealt.chosen)
    for length in few:
        n = -(-length // max(1, shortest - encoder.min_length))  # texts that reach it in any case
        more = encoder(_joined(used, n), truncation=Truncation(max_length=length))
        columns = {name: [*column, *more.columns[name]] for name, column in features.columns.items()}
        features = replace(features, lengths=(*features.lengths, *more.lengths), columns=columns)
    joined = range(len(dealt.features), len(features))
    return replace(dealt, features=features, chosen=(*dealt.chosen, *joined))


def _joined(texts: Sequence[Text], n: int) -> list[Text]:
    """Return some texts, each of ``n`` of the given ones."""
    pairs = [(text, "") if isinstance(text, str) else text for text in texts]
    found: list[Text] = []
    for number in range(NEEDED):
        parts = [pairs[(number * 7 + place) % len(pairs)] for place in range(n)]
        first, second = (" ".join(part[side] for part in parts) for side in (0, 1))
        found.append((first, second) if second.strip() else first)
    return found


def calibration(features: Features, ladder: Ladder, *, needed: int = NEEDED) -> Calibration:
    """Deal the rows of a request: of every length of the ladder some to calibrate on, others to judge by.

    Raises:
        DataError: a length of the ladder has fewer than ``needed`` texts; the message names it.
    """
    classes: dict[int, list[int]] = {length: [] for length in ladder.lengths}
    for row, length in enumerate(features.lengths):
        if length <= ladder.max_length:
            classes[ladder.choose(length).length].append(row)
    shortest = 1
    for length, rows in classes.items():
        if len(rows) < needed:
            raise DataError(
                f"calibration has {len(rows)} texts of {shortest} to {length} tokens, int8 needs at least {needed} "
                f"for every length of the ladder; add such texts, or drop length {length}"
            )
        shortest = length + 1
    generator = np.random.default_rng(0)
    chosen: list[int] = []
    held_out: list[int] = []
    for rows in classes.values():
        dealt = [int(row) for row in generator.permutation(rows)]
        half = min(CALIBRATED, -(-len(dealt) // 2))
        chosen += dealt[:half]
        held_out += dealt[half : half + HELD_OUT]
    return Calibration(features=features, chosen=tuple(sorted(chosen)), held_out=tuple(sorted(held_out)))


def quantize(artifact: Artifact, scheme: Scheme, texts: Calibration | None, folder: Path) -> Quantization:
    """Write an artifact's graph in int8, and its weights, into ``folder``; return how it was made and what it changed.

    Args:
        artifact: in float; its graph is only read.
        texts: needed by ``"int8"``; of ``"int8-dynamic"`` they judge the result, where there are any.

    Raises:
        DataError: ``"int8"`` without texts.
        ExportError: the graph has no product that could be quantised.
        DependencyError: onnx is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="hf_bucket-") as name:
        work = _Work(artifact=artifact, place=Path(name), texts=texts)
        work.copy_graph()
        layers = work.layers()
        if not layers:
            raise ExportError("the graph has no product of a matrix with fixed weights, so int8 would change nothing")
        if scheme == "int8":
            if texts is None:
                raise DataError('"int8" takes its scales from texts, got none; give some, or take "int8-dynamic"')
            ranked = work.by_error(layers)
            tries = list(_until_good(work.static(ranked, kept) for kept in _TRIED if kept < len(ranked)))
        else:
            tries = [work.dynamic(layers)]
        best = _best(tries)
        model = load_graph(work.made(best) / GRAPH)
        tidy(model)
        save_graph(model, folder / GRAPH)
        return Quantization(
            scheme=scheme,
            calibrated=len(texts.chosen) if texts is not None and scheme == "int8" else 0,
            held_out=len(texts.held_out) if texts is not None else 0,
            layers=len(layers),
            kept=best.kept,
            tries=tuple(tries),
            weights_bytes=(folder / WEIGHTS).stat().st_size,
            float_weights_bytes=artifact.manifest.files[WEIGHTS].size,
        )


def _best(tries: Sequence[Try]) -> Try:
    """Return the last try if it was good; else the first, unless leaving layers in float halved what it changed."""
    least = min(tries, key=lambda one: (one.label_flips, len(one.kept)))
    return tries[-1] if tries[-1].good else least if 2 * least.label_flips <= tries[0].label_flips else tries[0]


def _until_good(tries: Iterator[Try]) -> Iterator[Try]:
    """Yield tries up to the first that changes few enough labels."""
    for one in tries:
        yield one
        if one.good:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A graph being quantised in a folder of its own; onnx refuses to read weights that have a hard link."""

    artifact: Artifact
    place: Path
    texts: Calibration | None

    @property
    def source(self) -> Path:
        """The graph in float."""
        return self.place / GRAPH

    def made(self, one: Try) -> Path:
        """Return the folder of a try."""
        return self.place / f"kept-{len(one.kept)}"

    def copy_graph(self) -> None:
        for name in (GRAPH, WEIGHTS):
            shutil.copyfile(self.artifact.path(name), self.place / name)

    def layers(self) -> list[str]:
        """Return the nodes that multiply with fixed weights. A head's own, which is a Gemm, is not among them."""
        onnx, _ = _libraries()
        graph = onnx.load(self.source, load_external_data=False).graph
        fixed = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 2}
        return [node.name for node in graph.node if node.op_type == "MatMul" and node.input[1] in fixed]

    def by_error(self, layers: Sequence[str]) -> list[str]:
        """Return the layers with the largest relative error of their own, in eight bits, first.

        The error is that of the product on some of the texts, over how much the product differs between tokens.
        """
        onnx, _ = _libraries()
        model = onnx.load(self.source)
        weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        nodes = {node.name: node for node in model.graph.node if node.name in set(layers)}
        probed = self.place / "probed.onnx"
        given = onnx.load(self.source, load_external_data=False)
        names = sorted({node.input[0] for node in nodes.values()})
        kept = [output.name for output in given.graph.output]
        given.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in kept)
        onnx.save(given, probed)
        found: dict[str, list[NDArray[np.float32]]] = defaultdict(list)
        engine = open_graph(probed, EngineOptions(threads=1))
        for arrays in self.feeds(self._rows("chosen")[:: max(1, len(self._rows("chosen")) // _RANKED_ON)]):
            for name, value in zip(names, engine.run(names, arrays), strict=True):
                found[name].append(value.reshape(-1, value.shape[-1]))
        errors = {
            name: _relative_error(np.concatenate(found[node.input[0]]), weights[node.input[1]])
            for name, node in nodes.items()
        }
        return sorted(layers, key=lambda name: -errors[name])

    def static(self, ranked: Sequence[str], kept: int) -> Try:
        """Quantise all but the first ``kept`` layers, with scales from the texts."""
        _, quantization = _libraries()
        target = self._folder(kept)
        feeds = self.feeds(self._rows("chosen"))

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]  # no types
            def get_next(self) -> Any:
                return next(feeds, None)

        quantization.quantize_static(
            self.source,
            target / GRAPH,
            Reader(),
            nodes_to_quantize=list(ranked[kept:]),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            extra_options={
                "ActivationSymmetric": False,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["MatMul"],  # what follows is computed in float anyway
            },
            **_common(quantization),
        )
        return self.judge(target, tuple(ranked[:kept]))

    def dynamic(self, layers: Sequence[str]) -> Try:
        """Quantise all layers, with scales from each batch."""
        onnx, quantization = _libraries()
        model = onnx.load(self.source)
        model.graph.ClearField("value_info")  # the quantiser transposes a head's weights, not the shapes noted of them
        target = self._folder(0)
        quantization.quantize_dynamic(model, target / GRAPH, nodes_to_quantize=list(layers), **_common(quantization))
        return self.judge(target, (), dynamic=True)

    def judge(self, target: Path, kept: tuple[str, ...], *, dynamic: bool = False) -> Try:
        """Compare a quantised graph with the one in float on the texts that were held out.

        Args:
            dynamic: what is beside a text changes its answer: they share batches, as in use.
        """
        rows = self._rows("held_out")
        exact = self._logits(self.source, rows)
        got = self._logits_together(target / GRAPH, rows) if dynamic else self._logits(target / GRAPH, rows)
        flips = changed(exact, got, self.artifact.manifest.problem_type) if rows else 0
        delta = float(np.abs(exact - got).max()) if rows else 0.0
        return Try(kept=kept, label_flips=flips, max_abs_delta=delta, good=flips * FLIPS <= max(len(rows), FLIPS - 1))

    def feeds(self, rows: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Yield the inputs of rows, one at a time and without padding."""
        if self.texts is None:  # there are no rows then
            return
        features = self.texts.features
        for row in rows:
            bucket = Bucket(batch_size=1, extent=(features.lengths[row],))
            yield dict(pad(features, Assignment(bucket=bucket, rows=(row,)), self.artifact.manifest.signature).arrays)

    def _rows(self, which: Literal["chosen", "held_out"]) -> tuple[int, ...]:
        return () if self.texts is None else self.texts.chosen if which == "chosen" else self.texts.held_out

    def _logits(self, graph: Path, rows: Sequence[int]) -> NDArray[np.float32]:
        engine = open_graph(graph, EngineOptions())
        found = [engine.run(["logits"], arrays)[0] for arrays in self.feeds(rows)]
        return np.concatenate(found) if found else np.zeros((0, 1), dtype=np.float32)

    def _logits_together(self, graph: Path, rows: Sequence[int]) -> NDArray[np.float32]:
        """Return the logits of rows in the largest batches of their buckets, padding and all. Shape: (row, label)."""
        if self.texts is None or not rows:
            return np.zeros((0, 1), dtype=np.float32)
        features, ladder = self.texts.features, self.artifact.manifest.ladder
        engine = open_graph(graph, EngineOptions())
        found: dict[int, NDArray[np.float32]] = {}
        for bucket in ladder.largest_batches():
            mine = [row for row in rows if ladder.choose(features.lengths[row]).length == bucket.length]
            for start in range(0, len(mine), bucket.batch_size):
                some = tuple(mine[start : start + bucket.batch_size])
                batch = pad(features, Assignment(bucket=bucket, rows=some), self.artifact.manifest.signature)
                logits = engine.run(["logits"], dict(batch.arrays))[0]
                found.update(zip(some, logits[: len(some)], strict=True))
        return np.stack([found[row] for row in rows])

    def _folder(self, kept: int) -> Path:
        folder = self.place / f"kept-{kept}"
        folder.mkdir()
        return folder


def changed(exact: NDArray[np.float32], got: NDArray[np.float32], problem_type: str | None) -> int:
    """Return how many rows are answered otherwise. Shape of both: (row, label).

    A row is, if another label has the largest logit; of several labels at a time, if one crosses zero; of a single
    logit, if it moves by more than a tenth of the standard deviation over all rows, which must not be all alike.
    """
    if exact.shape[1] == 1:
        otherwise = np.abs(got - exact) > (_MOVED * exact.std() or np.inf)
    elif problem_type == "multi_label_classification":
        otherwise = (got > 0) != (exact > 0)
    else:
        otherwise = (got.argmax(axis=1) != exact.argmax(axis=1))[:, None]
    return int(otherwise.any(axis=1).sum())


_MOVED = 0.1


def speed(artifact: Artifact, folder: Path, encoder: Encoder) -> dict[str, float]:
    """Return, for some buckets, seconds of a run in float over those of one with the graph in ``folder``.

    Both run on one thread; float as it runs in use, with the fusions that were chosen.
    """
    manifest = artifact.manifest
    names = tuple(spec.name for spec in manifest.signature.outputs)
    options = EngineOptions(threads=1)
    engines = {"float": open_unpacked(artifact, options), "int8": open_graph(folder / GRAPH, options)}
    systems: dict[str, dict[Bucket, Session]] = {
        name: {bucket: OrtSession(bucket, engine, names) for bucket in spread(manifest.ladder)}
        for name, engine in engines.items()
    }
    found = compare(systems, sampler(encoder, manifest.signature, manifest.vocab_size), budget_s=_COMPARED_S)
    return {bucket.name: seconds / found["int8"][bucket] for bucket, seconds in found["float"].items()}


def _relative_error(inputs: NDArray[np.float32], weights: NDArray[np.float32]) -> float:
    """Return how far a product in eight bits is from the exact one, over how much that differs between rows."""
    low, high = min(float(inputs.min()), 0.0), max(float(inputs.max()), 0.0)
    scale = (high - low) / 255 or 1.0
    zero = round(-low / scale)
    rounded = (np.clip(np.round(inputs / scale) + zero, 0, 255) - zero) * scale
    column = np.maximum(np.abs(weights).max(axis=0), np.finfo(np.float32).tiny) / 63
    exact = inputs @ weights
    spread = float(np.linalg.norm(exact - exact.mean(axis=0))) or 1.0
    return float(np.linalg.norm(rounded @ (np.round(weights / column) * column) - exact)) / spread


def _common(quantization: Any) -> dict[str, Any]:
    return {
        "per_channel": True,
        "reduce_range": True,
        "op_types_to_quantize": ["MatMul"],
        "weight_type": quantization.QuantType.QInt8,
        "use_external_data_format": True,
    }


def _libraries() -> tuple[Any, Any]:
    """Return onnx and onnxruntime's quantisation.

    Raises:
        DependencyError: onnx is not installed.
    """
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise missing_part(error.name or "onnx", "onnx", "quantising a graph") from error
    return onnx, quantization
