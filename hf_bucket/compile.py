"""From a model anywhere to an artifact in the cache: fetch, export once, specialise often, check every bucket."""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np

from hf_bucket.artifact import GRAPH, WEIGHTS, Artifact, link_files, open_artifact, variant_name
from hf_bucket.cache import any_ladder, in_cache, model_key
from hf_bucket.costs import Clock, Costs, key_of, read_costs
from hf_bucket.data import read_column, read_dataset_column
from hf_bucket.describe import describe_changes
from hf_bucket.encode import Encoder, check_texts
from hf_bucket.engines import costs_path
from hf_bucket.errors import DataError, LadderError, ModelError
from hf_bucket.export import Dtype, Exported, export, quiet, read_checkpoint
from hf_bucket.facts import Facts, check_vocabulary, read_facts
from hf_bucket.finish import finish
from hf_bucket.fuse import Report, not_used
from hf_bucket.fusions import FUSIONS
from hf_bucket.graph import adopt, load_graph, save_graph, straighten_saved
from hf_bucket.histogram import Histogram
from hf_bucket.ladder import Ladder, is_auto
from hf_bucket.machine import package_version
from hf_bucket.manifest import MANIFEST, SCHEMA_VERSION, Manifest
from hf_bucket.planner import resolve_ladder
from hf_bucket.probes import ATOL, Probe, padded_masks, probe_rows, save_probes
from hf_bucket.quantize import FLIPS, SCHEMES, Scheme, calibrate, quantize, speed
from hf_bucket.recipe import Recipe
from hf_bucket.runner import MEASURE_S, Runner, RunOptions
from hf_bucket.session_ort import (
    EngineOptions,
    Mode,
    open_graph,
    resolve_provider,
)
from hf_bucket.source import Files, Hub, Source, locate
from hf_bucket.tasks import Signature, Task, get_task


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileOptions:
    """What to compile.

    Attributes:
        buckets: lengths, ``(batch_size, length)`` pairs, ``"auto"`` or ``"pow2"``; None keeps an artifact's own ladder
            and means ``"auto"`` for anything else.
        batch_sizes: combined with every length; None is ``ladder.DEFAULT_BATCH_SIZES``. ``"auto"``, with automatic
            buckets and calibration data, chooses them and the lengths jointly by what runs cost on this machine.
        n_buckets: lengths that ``"auto"`` may use; with automatic batch sizes, buckets in all.
        calibration: texts, or token counts, that ``"auto"`` fits the ladder to; None knows nothing of the lengths.
        dtype: of the exported weights.
        export: True insists on the checkpoint, False on an existing ONNX graph; None takes what is there.
        verbose: let the exporters talk.
        allow_padding_leak: compile a model even though its own answer changes when a row is padded; by how much is
            then recorded in the manifest.
        quantize: ``"int8"`` or ``"int8-dynamic"``, as in ``quantize``; the first needs texts in ``calibration``.
        engine: that automatic batch sizes are chosen for.
        measure_s: seconds for measuring what runs cost, where this machine has not done so for this model yet.
    """

    buckets: int | str | Sequence[object] | None = None
    batch_sizes: Sequence[int] | str | None = None
    n_buckets: int = 8
    calibration: Iterable[object] | None = None
    dtype: Dtype = "float32"
    export: bool | None = None
    verbose: bool = False
    allow_padding_leak: bool = False
    quantize: Scheme | None = None
    engine: EngineOptions = field(default_factory=EngineOptions)
    measure_s: float = MEASURE_S

    def __post_init__(self) -> None:
        if isinstance(self.batch_sizes, str):
            _check_joint(self.buckets, self.batch_sizes, self.calibration)
        if self.dtype not in ATOL:
            raise ModelError(f"dtype must be one of {', '.join(ATOL)}, got {self.dtype!r}")
        if self.quantize not in (None, *SCHEMES):
            raise ModelError(f"quantize must be None or one of {', '.join(SCHEMES)}, got {self.quantize!r}")
        if self.quantize is not None and self.dtype != "float32":
            raise ModelError(f"quantize={self.quantize!r} starts from float32, got dtype={self.dtype!r}; leave it out")
        if self.quantize == "int8" and self.calibration is None:
            raise DataError('quantize="int8" takes its scales from your own texts; give some as calibration_dataset')


def _check_joint(buckets: object, batch_sizes: str, calibration: object) -> None:
    """Raise a LadderError unless batch sizes can be chosen: for automatic lengths of known texts."""
    if batch_sizes != "auto":
        raise LadderError(f'batch_sizes must be a list such as [1, 8], or "auto"; got {batch_sizes!r}')
    if buckets is not None and not is_auto(buckets):
        raise LadderError(
            f'batch_sizes="auto" is for buckets="auto", got {buckets!r}; give batch sizes, or drop buckets'
        )
    if calibration is None:
        raise LadderError('batch_sizes="auto" needs to know the texts; give calibration_dataset, or batch sizes')


def from_recipe(recipe: Recipe) -> tuple[Source, CompileOptions]:
    """Return what a recipe says to compile, its calibration data read.

    Raises:
        DataError: the calibration data cannot be read.
    """
    data, texts = recipe.calibration, None
    if data is not None and data.file is not None:
        texts = read_column(data.file, column=data.column, pair_column=data.pair_column)
    elif data is not None and data.dataset is not None:
        texts = read_dataset_column(
            data.dataset, config=data.config, split=data.split, column=data.column, pair_column=data.pair_column
        )
    options = CompileOptions(
        buckets=recipe.buckets,
        batch_sizes=recipe.batch_sizes,
        n_buckets=recipe.n_buckets,
        calibration=texts,
        engine=EngineOptions(mode=recipe.mode, provider=recipe.provider),
    )
    return Source(name=recipe.model, revision=recipe.revision), options


def say(line: str) -> None:
    """Print one progress line where users of long commands look for it."""
    print(f"hf_bucket: {line}", file=sys.stderr, flush=True)


def compile_model(
    source: Source,
    options: CompileOptions | None = None,
    *,
    task: str = "text-classification",
    hub: Hub | None = None,
    report: Report = say,
) -> Artifact:
    """Return the artifact of a model, compiling it unless the cache has it.

    Args:
        source: where the model is.
        options: what to compile.
        hub: stands in for the real Hub.
        report: gets one line per stage.

    Raises:
        ModelError: there is no such model, or it does not fit the task.
        LadderError: the buckets do not fit the model.
        ExportError: the model cannot be exported, or its answer depends on padding.
        ArtifactError: the artifact found is damaged.
    """
    wanted = CompileOptions() if options is None else options
    if wanted.calibration is not None and not isinstance(wanted.calibration, (str, bytes, dict)):
        wanted = replace(wanted, calibration=list(wanted.calibration))  # read once, used twice
    files = locate(source, export=wanted.export, manifest=MANIFEST, hub=hub)
    if files.kind == "artifact":
        given = _with_ladder(open_artifact(files.folder), wanted, report)
        return _quantized(given, wanted, report, planned=is_auto(wanted.buckets))
    row = get_task(task)
    checkpoint = files.kind == "checkpoint"
    job = _checkpoint_job(files, source, row, wanted) if checkpoint else _graph_job(files, source, row)
    if wanted.batch_sizes == "auto" and wanted.calibration is not None:
        known = replace(wanted, calibration=_calibration_lengths(wanted.calibration, job.encoder))
        plain = _plain_ladder(job.encoder, job.facts.max_length)
        return _quantized(_with_ladder(_cached(job, plain, report), known, report), wanted, report, planned=True)
    ladder = _ladder(wanted, job.encoder, job.facts.max_length, report)
    planned = wanted.buckets is None or is_auto(wanted.buckets)
    return _quantized(_cached(job, ladder, report), wanted, report, planned=planned)


def plain_ladder(artifact: Artifact) -> Ladder:
    """Return a ladder of lengths that double, which tells what buckets of any shape take."""
    encoder = Encoder(artifact.tokenizer_json(), inputs=artifact.manifest.signature.input_names)
    return _plain_ladder(encoder, artifact.manifest.max_length)


def measured_costs(artifact: Artifact, engine: EngineOptions, budget_s: float, report: Report = say) -> Costs:
    """Return what buckets of the model cost on this machine: measured on a plain ladder, now or by an earlier call.

    Args:
        budget_s: seconds to spend on measuring, about.
    """
    # what "auto" means for a ladder is found out when that is loaded
    mode: Mode = "shared" if engine.mode == "auto" else engine.mode
    engine = replace(engine, mode=mode, provider=resolve_provider(engine.provider))
    plain, costs = plain_ladder(artifact), read_costs(costs_path(artifact, engine))
    if key_of(plain) not in costs.ladders:
        runner = Runner(with_buckets(artifact, plain, report), RunOptions(engine=engine))
        report(f"measuring what a run of every bucket costs on this machine, for about {budget_s:g} s")
        try:
            costs = runner.measure(budget_s, again=False)
        finally:
            runner.close()
    # of this ladder only: with those of a planned ladder, measured when it is loaded, the next plan would be another
    return replace(costs, seconds={bucket: costs.seconds[bucket] for bucket in plain if bucket in costs.seconds})


def bucket_compile_s(artifact: Artifact, clock: Clock = time.perf_counter) -> float:
    """Return the seconds that compiling and checking the artifact's largest bucket takes here; others take less."""
    with tempfile.TemporaryDirectory() as folder:
        start = clock()
        _extend(artifact, Ladder(artifact.manifest.ladder.buckets[-1:]), Path(folder), lambda line: None)
        return clock() - start


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One model to turn into an artifact.

    Attributes:
        key: of the model in the cache, whatever the ladder.
        make: writes graph, weights, config and tokenizer into a folder; returns what goes into the manifest.
    """

    key: str
    task: Task
    facts: Facts
    encoder: Encoder
    source: dict[str, str]
    make: Callable[[Path, Report], Exported]


def _checkpoint_job(files: Files, source: Source, task: Task, options: CompileOptions) -> _Job:
    with quiet(options.verbose):
        checkpoint = read_checkpoint(files.folder, task, trust_remote_code=source.trust_remote_code)

    def make(folder: Path, report: Report) -> Exported:
        report(f"exporting {source.name} (once for all buckets; about 15 s for a small model)")
        return export(
            checkpoint,
            task,
            folder,
            dtype=options.dtype,
            verbose=options.verbose,
            allow_padding_leak=options.allow_padding_leak,
        )

    made_by = {"made_by": "torch", "dtype": options.dtype}
    leaky = ["leaks allowed"] if options.allow_padding_leak else []
    return _Job(
        key=model_key(files.folder, [*made_by.values(), *leaky, task.name, str(_versions())]),
        task=task,
        facts=checkpoint.facts,
        encoder=checkpoint.encoder,
        source={"name": source.name, "revision": source.revision or "", **made_by},
        make=make,
    )


def _graph_job(files: Files, source: Source, task: Task) -> _Job:
    folder, graph = files.folder, files.graph
    if graph is None or not (folder / "tokenizer.json").is_file():
        raise ModelError(f"{folder} has a graph but no tokenizer.json beside it; save a fast tokenizer there")
    encoder = Encoder((folder / "tokenizer.json").read_text(encoding="utf-8"), inputs=list(task.pad_ids))
    facts = read_facts(folder, task, encoder)
    check_vocabulary(encoder, facts)

    def save_adopted(place: Path, *, narrowed: bool) -> Signature:
        model = load_graph(graph)
        signature = adopt(
            model,
            task,
            facts.pad_ids,
            padding_side=facts.padding_side,
            counted_id=facts.counted_id,
            narrowed=narrowed,
        )
        save_graph(model, place / GRAPH)
        return signature

    def make(target: Path, report: Report) -> Exported:
        report(f"reading {graph}")
        rows = probe_rows(encoder, facts.max_length, facts.vocab_size)
        with tempfile.TemporaryDirectory(dir=target) as name:  # the whole graph is the reference of the narrowed one
            signature = save_adopted(Path(name), narrowed=False)
            engine = open_graph(Path(name) / GRAPH, EngineOptions())
            probes = tuple(_graph_probe(engine, signature, row) for row in rows)
        save_adopted(target, narrowed=True)
        link_files([path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model")], target)
        return Exported(signature=signature, probes=probes)

    return _Job(
        key=model_key(graph.parent, [task.name, model_key(folder, []), str(_versions())]),
        task=task,
        facts=facts,
        encoder=encoder,
        source={"name": source.name, "revision": source.revision or "", "made_by": "onnx", "dtype": "float32"},
        make=make,
    )


def _graph_probe(engine: object, signature: Signature, row: tuple[int, ...]) -> Probe:
    values = {"input_ids": row, "attention_mask": [1] * len(row), "token_type_ids": [0] * len(row)}
    arrays = {spec.name: np.array([values[spec.name]], dtype=spec.dtype) for spec in signature.inputs}
    logits = engine.run(["logits"], arrays)[0][0]  # type: ignore[attr-defined]  # onnxruntime has no types
    return Probe(input_ids=row, logits=tuple(float(value) for value in logits))


def _plain_ladder(encoder: Encoder, max_length: int | None) -> Ladder:
    return resolve_ladder("pow2", min_length=encoder.min_length, max_length=max_length)


def _ladder(
    options: CompileOptions, encoder: Encoder, max_length: int | None, report: Report, costs: Costs | None = None
) -> Ladder:
    """Return the ladder that the options mean for a model; with ``costs``, batch sizes are chosen too."""
    buckets = "auto" if options.buckets is None else options.buckets
    histogram = None
    if options.calibration is not None:
        histogram = Histogram.from_lengths(_calibration_lengths(options.calibration, encoder))
    elif is_auto(buckets):
        report('no calibration_dataset for buckets="auto": taking lengths in even steps of size instead')
    return resolve_ladder(
        buckets,
        batch_sizes=None if isinstance(options.batch_sizes, str) else options.batch_sizes,
        min_length=encoder.min_length,
        max_length=max_length,
        histogram=histogram,
        n_buckets=options.n_buckets,
        cost=costs,
    )


def _calibration_lengths(calibration: Iterable[object], encoder: Encoder) -> Sequence[int]:
    if isinstance(calibration, (str, bytes, dict)):
        raise LadderError("calibration_dataset must be a list or column of texts, dicts or lengths, not a single text")
    items = list(calibration)
    if not items:
        raise LadderError("calibration_dataset is empty; give some texts or lengths, or leave it out")
    lengths = [int(item) for item in items if isinstance(item, (int, np.integer))]
    if len(lengths) == len(items):
        return lengths
    return encoder.lengths(check_texts(items))


def _with_ladder(artifact: Artifact, options: CompileOptions, report: Report) -> Artifact:
    """Return the artifact, with other buckets if they are asked for; never exports again."""
    joint = options.batch_sizes == "auto"
    if options.buckets is None and not joint:
        return artifact
    manifest = artifact.manifest
    encoder = Encoder(artifact.tokenizer_json(), inputs=manifest.signature.input_names)
    costs = measured_costs(artifact, options.engine, options.measure_s, report) if joint else None
    return with_buckets(artifact, _ladder(options, encoder, manifest.max_length, report, costs), report)


def with_buckets(artifact: Artifact, ladder: Ladder, report: Report = say) -> Artifact:
    """Return the artifact with the buckets of ``ladder``, from the cache where it has them; never exports again."""
    manifest = artifact.manifest
    if ladder == manifest.ladder:
        return artifact
    return in_cache(_model_of(artifact), ladder, lambda folder: _extend(artifact, ladder, folder, report))


def _model_of(artifact: Artifact, *options: str) -> str:
    """Return a cache key of the model in an artifact, whatever its ladder: all that another ladder of it takes over."""
    manifest = artifact.manifest
    variants = {variant_name(bucket) for bucket in manifest.ladder}
    files = sorted((name, record.sha256) for name, record in manifest.files.items() if name not in variants)
    source = sorted(manifest.source.items())
    return hashlib.sha256(repr([SCHEMA_VERSION, files, source, *options]).encode()).hexdigest()


def _cached(job: _Job, ladder: Ladder, report: Report) -> Artifact:
    """Return the artifact from the cache; else give another ladder of the same model these buckets; else export."""

    def fill(folder: Path) -> None:
        sibling = any_ladder(job.key, besides=ladder)
        if sibling is not None:
            _extend(sibling, ladder, folder, report)
            return
        made = job.make(folder, report)
        try:
            straighten_saved(folder / GRAPH, padded_masks(made.probes, made.signature))
        except Exception as error:  # noqa: BLE001 - onnxscript raises anything; as it was exported the graph runs as well
            report(not_used("a graph with less in its attentions", error))
        save_probes(made.probes, job.source["made_by"], folder)
        manifest = Manifest(
            task=job.task.name,
            ladder=ladder,
            signature=made.signature,
            padding_leak=made.padding_leak,
            max_length=job.facts.max_length,
            vocab_size=job.facts.vocab_size,
            labels=job.facts.labels,
            problem_type=job.facts.problem_type,
            source=job.source,
            versions=_versions(),
            validation=(),
            files={},
        )
        finish(folder, manifest, report)

    return in_cache(job.key, ladder, fill)


def _extend(artifact: Artifact, ladder: Ladder, folder: Path, report: Report) -> None:
    """Fill ``folder`` with the same model for another ladder."""
    variants = {variant_name(bucket) for bucket in artifact.manifest.ladder}
    link_files([artifact.path(name) for name in artifact.manifest.files if name not in variants], folder)
    finish(folder, replace(artifact.manifest, ladder=ladder), report)


def _quantized(artifact: Artifact, options: CompileOptions, report: Report, *, planned: bool) -> Artifact:
    """Return the artifact in int8, if that is asked for; what was made of the same texts before is in the cache.

    Args:
        planned: as in ``quantize.calibrate``.
    """
    scheme, manifest = options.quantize, artifact.manifest
    if scheme is None:
        return artifact
    if manifest.quantization is not None:
        raise ModelError(
            f"{artifact.folder} is {manifest.quantization.scheme} already; give the checkpoint, or leave out quantize"
        )
    encoder = Encoder(artifact.tokenizer_json(), inputs=manifest.signature.input_names)
    given = options.calibration
    texts = (
        None if given is None else calibrate(given, encoder, manifest.ladder, scheme, planned=planned, report=report)
    )
    used = "" if texts is None else repr((texts.chosen, texts.held_out, texts.features.columns["input_ids"]))

    def fill(folder: Path) -> None:
        report(f"quantising to {scheme}" + ("" if texts is None else f" with {len(texts.chosen)} texts"))
        graphs = {GRAPH, WEIGHTS, *map(variant_name, manifest.ladder), *(fusion.rewritten for fusion in FUSIONS)}
        kept = manifest.files.keys() - graphs
        link_files([artifact.path(name) for name in kept], folder)
        with quiet(options.verbose):
            made = quantize(artifact, scheme, texts, folder)
        chosen = next(one for one in made.tries if one.kept == made.kept)
        if not chosen.good:
            changes = describe_changes(chosen, made.held_out, labels=len(manifest.labels))
            report(f"{scheme}: {changes}, more than one in {FLIPS}; see hf-bucket validate --data FILE for other texts")
        made = replace(made, speed=speed(artifact, folder, encoder))
        source = {**manifest.source, "dtype": scheme}
        finish(folder, replace(manifest, source=source, quantization=made, fusion=None), report)

    return in_cache(_model_of(artifact, scheme, used, str(_versions())), manifest.ladder, fill)


def _versions() -> dict[str, str]:
    found = {}
    for package in ("hf-bucket", "torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tokenizers"):
        try:
            found[package] = package_version(package)
        except PackageNotFoundError:
            continue
    return found
