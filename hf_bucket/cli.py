"""``hf-bucket``: a thin door onto the rooms; every command does what one function elsewhere does."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from hf_bucket.arguments import make_parser
from hf_bucket.errors import ArtifactError, BucketError

if TYPE_CHECKING:
    from hf_bucket.advise import Advice
    from hf_bucket.artifact import Artifact
    from hf_bucket.evidence import TextFile
    from hf_bucket.manifest import Certificate
    from hf_bucket.source import Source

T = TypeVar("T")

ARRIVAL_BATCH = 32  # rows; what "waste today" assumes: padded to the longest row of each batch, as texts come


def run() -> None:
    """Entry point of the ``hf-bucket`` script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.typed = shlex.join(["hf-bucket", *arguments])
    options.usage_error = parser.error
    try:
        status = COMMANDS[options.command](options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        say("interrupted")
    except BrokenPipeError:
        # the reader of our output went away: leave nothing for Python to flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (BucketError, OSError) as error:
        say(f"error: {error}")
    return 1


def _plan(options: argparse.Namespace) -> int:
    from hf_bucket.encode import count_tokens
    from hf_bucket.metrics import padded_waste
    from hf_bucket.planner import lint, plan
    from hf_bucket.report import draw_plan, plan_chart_text
    from hf_bucket.source import Source

    _check_plan(options)
    values, advice = _planned_values(options), None
    texts = bool(values) and not isinstance(values[0], int)
    if texts and options.tokenizer is None and options.model is None:
        options.usage_error("texts need a --tokenizer MODEL that counts their tokens")
    if options.model is not None:
        values, advice = _advice(values, texts, options)
        made, findings = advice.plan, list(advice.findings)
    else:
        values = count_tokens(values, Source(name=options.tokenizer)) if texts else values
        made = plan(values, n_buckets=options.n_buckets, batch_sizes=options.batch_sizes, max_length=options.max_length)
        findings = lint(made.ladder, min_length=1, max_length=None, histogram=made.histogram)
    today = padded_waste(values, ARRIVAL_BATCH)
    if options.chart is not None:
        draw_plan(made, options.chart, arrival_waste=today)
        say(f"drew {options.chart}")
    if options.json:
        found = {"waste_arrival": today, "findings": [finding.message for finding in findings]}
        print(json.dumps({**(advice or made).to_json(), **found}, indent=2))
        return 0
    chart = plan_chart_text(made, arrival_waste=today, ascii_only=not _can_draw(sys.stdout))
    print(chart, made, advice or f"buckets={list(made.lengths)}", sep="\n\n")
    for finding in findings:
        print(f"note: {finding.message}")
    return 0


def _check_plan(options: argparse.Namespace) -> None:
    """End with status 2 if options of ``plan`` do not go together."""
    if sum(value is not None for value in (options.file, options.lengths, options.dataset)) != 1:
        options.usage_error("plan needs one of FILE, --lengths and --dataset")
    if options.model is not None and options.tokenizer is not None:
        options.usage_error("--tokenizer and --model do not go together: the model's tokenizer counts")
    for name in ("window", "memory", "compile_seconds", "seconds"):
        if options.model is None and getattr(options, name) is not None:
            options.usage_error(f"--{name.replace('_', '-')} needs --model: it is about runs on this machine")
    _check_new(options, options.chart)


def _planned_values(options: argparse.Namespace) -> Sequence[Any]:
    """Return the texts or token counts that a plan is for."""
    from hf_bucket.data import read_column, read_dataset_column

    columns = {"column": options.column, "pair_column": options.pair_column}
    if options.lengths is not None:
        return list(options.lengths)
    if options.dataset is not None:
        return list(read_dataset_column(options.dataset, config=options.config, split=options.split, **columns))
    return list(read_column(options.file, kind=options.kind, **columns))


def _advice(values: Sequence[Any], texts: bool, options: argparse.Namespace) -> tuple[Sequence[int], Advice]:
    """Return the tokens of every row, and the joint plan for them on this machine."""
    from hf_bucket.advise import advise, limits_for
    from hf_bucket.compile import compile_model, measured_costs
    from hf_bucket.encode import Encoder, check_texts
    from hf_bucket.joint import WINDOW
    from hf_bucket.runner import MEASURE_S
    from hf_bucket.session_ort import EngineOptions
    from hf_bucket.source import Source

    artifact = compile_model(Source(name=options.model))
    encoder = Encoder(artifact.tokenizer_json(), inputs=artifact.manifest.signature.input_names)
    lengths = encoder.lengths(check_texts(values)) if texts else values
    limits = limits_for(
        artifact, n_buckets=options.n_buckets, memory_bytes=options.memory, compile_s=options.compile_seconds
    )
    costs = measured_costs(artifact, EngineOptions(), MEASURE_S if options.seconds is None else options.seconds)
    chosen = {"batch_sizes": options.batch_sizes, "max_length": options.max_length}
    return lengths, advise(lengths, artifact, costs, limits, window=options.window or WINDOW, **chosen)


def _compile(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import copy_artifact, is_artifact
    from hf_bucket.cache import cache_root
    from hf_bucket.compile import CompileOptions, compile_model, from_recipe
    from hf_bucket.data import read_column
    from hf_bucket.recipe import read_recipe

    if (options.model is None) == (options.recipe is None):
        options.usage_error("compile needs a MODEL or a --recipe")
    output = options.output
    if options.recipe is not None:
        if options.quantize is not None:
            options.usage_error("--quantize goes with a MODEL, not with a --recipe")
        recipe = read_recipe(options.recipe)
        source, compiling = from_recipe(recipe)
        output = output or recipe.output
    else:
        columns = {"column": options.column, "pair_column": options.pair_column}
        source = _source(options)
        compiling = CompileOptions(
            buckets=options.buckets,
            batch_sizes=options.batch_sizes,
            n_buckets=options.n_buckets,
            calibration=None if options.calibration is None else read_column(options.calibration, **columns),
            verbose=options.verbose,
            allow_padding_leak=options.allow_padding_leak,
            quantize=options.quantize,
        )
    _check_new(options, output)
    artifact = compile_model(source, compiling)
    if output is not None:
        artifact = copy_artifact(artifact, output)
    elif not artifact.folder.is_relative_to(cache_root().absolute()) and not is_artifact(Path(source.name)):
        raise ArtifactError(f"{source.name} was compiled, but there is no cache to keep it in; give --output FOLDER")
    _print_artifact(artifact, options)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import open_artifact

    _print_artifact(open_artifact(options.artifact), options)
    return 0


def _print_artifact(artifact: Artifact, options: argparse.Namespace) -> None:
    from hf_bucket.describe import describe_artifact, memory_figures
    from hf_bucket.session_ort import EngineOptions

    at_once = EngineOptions().for_many_batches().workers
    if not options.json:
        print(describe_artifact(artifact, at_once=at_once))
        return
    manifest = json.loads(artifact.manifest.to_json())
    running = memory_figures(artifact.manifest, at_once=at_once)
    print(json.dumps({"folder": str(artifact.folder), **manifest, "running": running}, indent=2))


def _validate(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import open_artifact
    from hf_bucket.certificate import certify, shared_graph, variants
    from hf_bucket.describe import describe_certificates, describe_failure
    from hf_bucket.evidence import probe_evidence, text_evidence

    texts = _validated_texts(options)
    artifact = open_artifact(options.artifact)
    opens = {"its variant": variants(artifact), "the shared graph": shared_graph(artifact)}  # for others, and run here
    if texts is None:
        evidence = probe_evidence(artifact)
        found = certify(artifact.manifest, evidence, opens, atol=options.atol)
    else:
        evidence = text_evidence(artifact, texts, checkpoint=options.checkpoint, report=say, watch=_watch)
        found = certify(artifact.manifest, evidence, opens, atol=options.atol, watch=_watch)
    stored = _store(artifact, found)
    failed = [certificate for certificate in found if not certificate.passed]
    skipped = {"too_long": evidence.too_long, "empty": evidence.empty}
    if options.json:
        rows = [{**asdict(certificate), "passed": certificate.passed} for certificate in found]
        summary = {"passed": not failed, "stored": stored, "rows": len(evidence.expected), **skipped}
        print(json.dumps({"folder": str(artifact.folder), **summary, "certificates": rows}, indent=2))
    else:
        print(describe_certificates(found))
    if any(skipped.values()):
        longest = artifact.manifest.ladder.max_length
        say(
            f"skipped {evidence.too_long} rows longer than the largest bucket, {longest} tokens, and {evidence.empty} "
            f"without a token"
        )
    for certificate in failed:
        say(f"FAILED: {describe_failure(certificate)}")
    return 1 if failed else 0


def _validated_texts(options: argparse.Namespace) -> TextFile | None:
    """Return the texts of ``--data``, and None where there is none."""
    from hf_bucket.evidence import open_texts

    if options.data is not None:
        columns = {name: getattr(options, name) for name in ("column", "pair_column", "label_column")}
        return open_texts(options.data, kind=options.kind, limit=options.limit, **columns)
    for name in ("kind", "column", "pair_column", "label_column", "limit", "checkpoint"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            options.usage_error(f"{option} needs --data; without it the artifact's probes run, answers included")
    return None


def _store(artifact: Artifact, certificates: Sequence[Certificate]) -> bool:
    """Write certificates into the artifact's manifest; where that cannot be done, say so and return False."""
    from hf_bucket.certificate import store

    try:
        store(artifact, certificates)
    except OSError as error:
        say(f"the certificates are not stored, {artifact.folder} keeps its old manifest: {error}")
        return False
    return True


def _watch(rows: Iterable[T], what: str, total: int) -> Iterable[T]:
    """Show rows going by: a bar with the time left on a terminal, one line elsewhere."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        bar: Iterable[T] = tqdm(rows, desc=what, total=total, unit=" rows", file=sys.stderr)
        return bar
    say(f"{what}: {total} rows")
    return rows


def _tune(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import open_artifact
    from hf_bucket.describe import describe_choice, describe_costs, describe_providers
    from hf_bucket.preflight import Trial, room
    from hf_bucket.runner import Runner, RunOptions
    from hf_bucket.session_ort import EngineOptions
    from hf_bucket.settle import settle

    artifact = open_artifact(options.artifact)
    asked = EngineOptions(mode=options.mode, provider=options.provider)
    share = options.seconds / 2 if "auto" in (asked.mode, asked.provider) else options.seconds
    settled = settle(artifact, asked, Trial(budget_s=share, available=room(None), again=True))
    runner = Runner(artifact, RunOptions(engine=settled.engine))
    costs, choice = runner.measure(share), settled.mode
    if options.json:
        chosen: dict[str, object] = {} if choice is None else {"choice": choice.to_json()}
        engine, found = settled.engine, settled.provider
        providers = {"provider": engine.provider, "provider_of_many": engine.for_many_batches().provider}
        compared = None if found is None else asdict(found)
        print(json.dumps({**costs.to_json(), **chosen, **providers, "compared": compared}, indent=2))
    else:
        modes = [] if choice is None else [describe_choice(choice)]
        print(describe_providers(settled), *modes, describe_costs(costs, runner.ladder), sep="\n\n")
    runner.close()
    return 0


def _predict(options: argparse.Namespace) -> int:
    from hf_bucket.compile import CompileOptions, compile_model, from_recipe
    from hf_bucket.data import check_columns, read_records
    from hf_bucket.pipelines import CallOptions, TextClassificationPipeline
    from hf_bucket.predict import LineWriter, predict
    from hf_bucket.recipe import read_recipe
    from hf_bucket.runner import MEASURE_S, Runner, RunOptions
    from hf_bucket.session_ort import EngineOptions

    if (options.model is None) == (options.recipe is None):
        options.usage_error("predict needs a MODEL or a --recipe")
    if options.input is None and options.kind is None:
        options.usage_error("standard input needs --kind")
    if options.json and options.output is None:
        options.usage_error("--json prints a summary, and the rows would be on standard output too; give --output")
    _check_new(options, options.output)
    if options.input is not None and options.output is not None and options.input.resolve() == options.output.resolve():
        options.usage_error(f"{options.output} is also the input; write to another file")
    if options.input is not None:
        check_columns(options.input, kind=options.kind, column=options.column, pair_column=options.pair_column)
    recipe = None if options.recipe is None else read_recipe(options.recipe)
    if recipe is None:
        source = _source(options)
        compiling = CompileOptions(buckets=options.buckets, batch_sizes=options.batch_sizes)
    else:
        source, compiling = from_recipe(recipe)
    engine = EngineOptions(
        mode=options.mode or (recipe.mode if recipe else "shared"),
        provider=options.provider or (recipe.provider if recipe else "auto"),
    )
    runner = Runner(compile_model(source, compiling), RunOptions(engine=engine, measure_s=MEASURE_S))
    overflow = options.overflow or (recipe.overflow if recipe else "truncate")
    classify = TextClassificationPipeline(runner, CallOptions(), overflow=overflow, window=options.window)
    with LineWriter(options.output) as lines, _progress(options.input) as advance:
        outcome = predict(
            classify,
            advance(read_records(options.input, kind=options.kind)),
            lines.write,
            column=options.column,
            pair_column=options.pair_column,
            top_k=options.top_k,
            window=options.window,
            as_csv=options.csv,
        )
    say(f"{outcome.rows} rows, {outcome.failed} of them with an error")
    if options.json:
        summary = {"rows": outcome.rows, "failed": outcome.failed, **runner.stats()}
        print(json.dumps(summary, indent=2))
    return 1 if outcome.failed else 0


def _eval(options: argparse.Namespace) -> int:
    from hf_bucket import glue
    from hf_bucket.evaluate import EvalRequest
    from hf_bucket.recipe import read_recipe
    from hf_bucket.report import draw_evaluation

    fields: dict[str, Any] = {} if options.recipe is None else glue.request_of(read_recipe(options.recipe))
    typed = {name: value for name, value in vars(options).items() if name in EvalRequest.__dataclass_fields__}
    fields = {**fields, **{name: value for name, value in typed.items() if value is not None}}
    if options.data is not None:
        fields.pop("task", None)
    if ("task" in fields) == ("data" in fields):
        options.usage_error("eval needs --task, --data, or a --recipe with an evaluate section")
    for name in ("model", "buckets"):
        if name not in fields:
            options.usage_error(f"eval needs --{name} or a --recipe")
    for path in (options.output, options.chart):
        _check_new(options, path)
    report = glue.evaluate(EvalRequest(**{"task": "", **fields, "command": options.typed}), say=say)
    text = json.dumps(report.to_json(), indent=2, allow_nan=False)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.chart is not None:
        draw_evaluation(report.to_json(), options.chart)
        say(f"drew {options.chart}")
    print(text if options.json else report.table())
    if report.failed:
        say(report.complaint())
    return 1 if report.failed else 0


def _cache(options: argparse.Namespace) -> int:
    from hf_bucket.cache import cache_root, clear, entries

    if options.clear:
        say(f"removed {clear()} compiled models from {cache_root()}")
        return 0
    found = entries()
    if options.json:
        print(json.dumps([{**asdict(entry), "folder": str(entry.folder)} for entry in found], indent=2))
        return 0
    print(f"{len(found)} compiled models in {cache_root()}")
    for entry in found:
        print(f"{entry.size / 1e6:9.1f} MB  {entry.problem or f'{entry.model}  {entry.ladder}'}")
    return 0


def _source(options: argparse.Namespace) -> Source:
    from hf_bucket.source import Source

    return Source(
        name=options.model,
        revision=options.revision,
        subfolder=options.subfolder,
        local_files_only=options.local_files_only,
        trust_remote_code=options.trust_remote_code,
    )


def _check_new(options: argparse.Namespace, path: Path | None) -> None:
    """End with status 2 if a file or folder to be written exists, unless ``--force``, or has nowhere to be."""
    if path is None:
        return
    if path.exists() and not options.force:
        options.usage_error(f"{path} exists; give another one, or --force to replace it")
    if not path.absolute().parent.is_dir():
        options.usage_error(f"{path.parent} is not a folder; make it first")


@contextmanager
def _progress(path: Path | None) -> Iterator[Callable[[Iterable[T]], Iterable[T]]]:
    """Give a function that shows rows going by: a bar with the time left on a terminal, plain lines elsewhere."""
    from tqdm import tqdm

    terminal = sys.stderr.isatty()
    with tqdm(total=_rows(path), unit=" rows", disable=not terminal, file=sys.stderr) as bar:

        def advance(items: Iterable[T]) -> Iterator[T]:
            for number, item in enumerate(items, 1):
                yield item
                bar.update()
                if not terminal and number % 10_000 == 0:
                    say(f"{number} rows read")

        yield advance


def _rows(path: Path | None) -> int | None:
    """Return about how many rows a file has, for the time left; None where nobody knows."""
    if path is None or path.suffix == ".parquet" or not path.is_file():
        return None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _can_draw(stream: TextIO) -> bool:
    """Return whether a stream's encoding has the characters that charts are drawn with."""
    try:
        "\u2588\u25c4".encode(stream.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "plan": _plan,
    "compile": _compile,
    "inspect": _inspect,
    "validate": _validate,
    "tune": _tune,
    "predict": _predict,
    "eval": _eval,
    "cache": _cache,
}


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)
