"""Which fusions help is measured, per bucket, when a model is compiled; choice and figures go into the manifest."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import numpy as np

from hf_bucket.artifact import GRAPH, WEIGHTS
from hf_bucket.costs import SHORTEST_S, Batches, compare
from hf_bucket.errors import ExportError
from hf_bucket.flatten import flatten
from hf_bucket.fusions import FUSIONS, OWN, Fusion
from hf_bucket.graph import load_graph, save_rewritten, shapes_by_size
from hf_bucket.ladder import Bucket, Ladder
from hf_bucket.manifest import FusionChoice
from hf_bucket.session import Session
from hf_bucket.session_ort import CPU, EngineOptions, OrtSession, open_graph

if TYPE_CHECKING:
    import onnx_ir as ir

_TRIED = 4  # buckets that are timed, from the smallest to the largest
_EACH_S = 2.0  # for one way against onnxruntime's own
_LONGEST_S = 0.05  # a run that is timed takes no longer, or there are too few to tell noise from gain
_GAIN = 0.98  # of the time: less is noise, and onnxruntime's own stays
_OWN_WAY = 0.95  # of the time with what is best for all: then a bucket gets another, and weights of its own

Relative = Mapping[str, Mapping[Bucket, float]]  # by way: seconds of a run over those of onnxruntime's own


def choose_fusion(
    folder: Path, ladder: Ladder, batches: Batches, *, check: Check | None, report: Report
) -> FusionChoice | None:
    """Time what may be made of the graph in ``folder`` and return what to run; a graph that it needs is left there.

    None where a run is too short to tell ways apart: then onnxruntime does what it does by itself.

    Args:
        batches: makes what a bucket runs on.
        check: raises an ExportError if a session does not give the reference's answers. None leaves out the graphs that
            are rewritten: for int8, since whoever rewrites a graph knows float only.
        report: is told of a way that cannot be tried.
    """
    own = _Way(OWN, folder / GRAPH)
    largest = max(ladder, key=lambda bucket: bucket.cells)
    longest_s = own.seconds(largest, batches)
    if longest_s < SHORTEST_S:
        return None
    tried = _spread(ladder, most_cells=largest.cells * _LONGEST_S / longest_s)
    relative: dict[str, Mapping[Bucket, float]] = {OWN.name: dict.fromkeys(tried, 1.0)}
    for fusion in FUSIONS[1:]:
        if fusion.rewritten and check is None:
            continue
        try:
            if fusion.rewritten:
                _rewrite(fusion, folder / GRAPH)
            way = _Way(fusion, folder / (fusion.rewritten or GRAPH))
            if check and fusion.rewritten:
                for session in way.sessions([*tried, largest]).values():
                    check(session)
            relative[fusion.name] = own.compared(way, tried, batches)
        except Exception as error:  # noqa: BLE001 - tools and onnxruntime raise anything; without this way all is as it was
            report(not_used(fusion.name, error))
    choice = _choice(relative, tried)
    for fusion in FUSIONS:
        if fusion.rewritten and fusion.name not in {choice.chosen, *choice.buckets.values()}:
            (folder / fusion.rewritten).unlink(missing_ok=True)
    return choice


def not_used(what: str, error: Exception) -> str:
    """Return the line that tells of a way that failed."""
    reason = next(iter(str(error).splitlines()), "")
    return f"{what} is not used on this model: {type(error).__name__}: {reason}"


Report = Callable[[str], None]
Check = Callable[[Session], None]


def _spread(ladder: Ladder, *, most_cells: float) -> list[Bucket]:
    """Return some buckets from the smallest to the largest of so many cells."""
    every = sorted(ladder, key=lambda bucket: bucket.cells)
    ordered = [bucket for bucket in every if bucket.cells <= most_cells] or every[:1]
    places = np.linspace(0, len(ordered) - 1, min(_TRIED, len(ordered))).round().astype(int)
    return [ordered[place] for place in dict.fromkeys(places.tolist())]


def _choice(relative: Relative, tried: Sequence[Bucket]) -> FusionChoice:
    """Return the way that is best on the whole, and for buckets where another is clearly better that one."""
    total = {name: mean(ratios.values()) for name, ratios in relative.items()}
    best = min(total, key=total.__getitem__)
    chosen = best if total[best] <= _GAIN else OWN.name
    buckets = {}
    for bucket in tried:
        quickest = min(relative, key=lambda name: relative[name][bucket])
        clearly = relative[quickest][bucket] <= _OWN_WAY * relative[chosen][bucket]
        buckets[bucket.name] = quickest if clearly else chosen
    figures = {bucket.name: {name: ratios[bucket] for name, ratios in relative.items()} for bucket in tried}
    return FusionChoice(provider=CPU, chosen=chosen, buckets=buckets, relative=figures)


class _Way:
    """One way of running a graph, on one thread."""

    def __init__(self, fusion: Fusion, path: Path) -> None:
        self._engine = open_graph(path, EngineOptions(threads=1), fusion=fusion)
        self._names = tuple(output.name for output in self._engine.get_outputs())

    def sessions(self, buckets: Sequence[Bucket]) -> dict[Bucket, Session]:
        return {bucket: OrtSession(bucket, self._engine, self._names) for bucket in buckets}

    def seconds(self, bucket: Bucket, batches: Batches) -> float:
        found = compare({"own": self.sessions([bucket])}, batches, budget_s=0.1)
        return found["own"][bucket]

    def compared(self, other: _Way, buckets: Sequence[Bucket], batches: Batches) -> dict[Bucket, float]:
        """Return the seconds of the other over those of this one, per bucket."""
        ratios = {}
        for bucket in buckets:  # each by itself: none is left out for want of time
            systems = {"own": self.sessions([bucket]), "other": other.sessions([bucket])}
            found = compare(systems, batches, budget_s=_EACH_S / len(buckets))
            ratios[bucket] = found["other"][bucket] / found["own"][bucket]
        return ratios


def _rewrite(fusion: Fusion, graph: Path) -> None:
    """Write the graph as a tool rewrites it, with the same file of weights."""
    tools: dict[str, Callable[[ir.Model, Path], ir.Model]] = {
        "token-list": _by_flatten,
        "ort_fusions": _by_transformers,
        "onnxruntime.transformers": _by_onnxruntime,
    }
    save_rewritten(tools[fusion.name](load_graph(graph), graph), graph, graph.with_name(fusion.rewritten))


def _by_flatten(model: ir.Model, graph: Path) -> ir.Model:
    if not flatten(model, shapes_by_size(graph)):
        raise ExportError("none of its linear layers takes rows of tokens")
    return model


def _by_transformers(model: ir.Model, graph: Path) -> ir.Model:
    from onnx_ir.passes import common
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    model = common.ShapeInferencePass()(model).model
    fuse_for_onnxruntime(model, "cpu")
    return model


def _by_onnxruntime(model: ir.Model, graph: Path) -> ir.Model:
    import onnx_ir
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory(prefix="hf_bucket-") as name:  # it refuses weights that have a hard link
        for file in (GRAPH, WEIGHTS):
            shutil.copyfile(graph.parent / file, Path(name) / file)
        found = optimizer.optimize_model(str(Path(name) / GRAPH), opt_level=0)  # as BERT, its default
        return onnx_ir.serde.deserialize_model(found.model)
