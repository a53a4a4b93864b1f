"""``hf-bucket``: a thin door onto the rooms; every command does what one function elsewhere does."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from hf_bucket import __version__
from hf_bucket.errors import BucketError

if TYPE_CHECKING:
    from hf_bucket.artifact import Artifact
    from hf_bucket.source import Source

T = TypeVar("T")

KINDS = ("text", "jsonl", "csv", "parquet")

EXAMPLES = """\
examples:
  hf-bucket plan --lengths 12,15,18,40,41,120 --n-buckets 3
  hf-bucket compile MODEL --buckets 32,64,128 --output my-model
  hf-bucket inspect my-model
  echo "a dull, endless film" | hf-bucket predict my-model --kind text
  hf-bucket validate my-model
  hf-bucket eval --task sst2 --model MODEL --buckets 64,128 --data-dir GLUE
  hf-bucket cache

exit status: 0 all went well, 1 the job failed, 2 the command was wrong
"""


def run() -> None:
    """Entry point of the ``hf-bucket`` script."""
    sys.exit(main(sys.argv[1:]))


def main(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    options.typed = shlex.join(["hf-bucket", *arguments])
    options.usage_error = parser.error
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except BucketError as error:
        say(f"error: {error}")
    except KeyboardInterrupt:
        say("interrupted; every line written so far is complete")
    except BrokenPipeError:
        # the reader of our output went away: leave nothing for Python to flush into it at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="hf-bucket",
        description="Run transformers classifiers at the right shape.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"hf-bucket {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in (_add_plan, _add_compile, _add_inspect, _add_validate, _add_predict, _add_eval, _add_cache):
        add(commands)
    return parser


Commands = Any  # argparse names the type of sub-parsers only in private


def _add_plan(commands: Commands) -> None:
    parser = commands.add_parser("plan", help="find the ladder that costs least on your lengths, and draw it")
    parser.add_argument("file", type=Path, nargs="?", help="text, JSONL, CSV or parquet file: texts, or token counts")
    parser.add_argument("--lengths", type=counts, help="token counts with commas, instead of a file")
    parser.add_argument("--dataset", help="data set on the Hub, instead of a file")
    parser.add_argument("--config", help="configuration of the data set, such as mrpc of nyu-mll/glue")
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    parser.add_argument("--kind", choices=KINDS, help="of the file (default: by suffix)")
    _add_columns(parser)
    parser.add_argument("--tokenizer", metavar="MODEL", help="model whose tokenizer counts tokens; texts need one")
    parser.add_argument("--n-buckets", type=count, default=8, help="lengths the ladder may have (default: 8)")
    parser.add_argument("--batch-sizes", type=counts, help="such as 1,8 (the default)")
    parser.add_argument("--max-length", type=count, help="tokens the ladder must hold (default: the longest row)")
    parser.add_argument("--chart", type=Path, metavar="FILE.png", help="draw the plan as PNG or SVG")
    _add_output_flags(parser)
    parser.set_defaults(command=_plan)


def _add_compile(commands: Commands) -> None:
    parser = commands.add_parser("compile", help="compile a model for a ladder and check every bucket against torch")
    parser.add_argument("model", nargs="?", help="Hub id or folder")
    parser.add_argument("--recipe", type=Path, help="take everything from a recipe instead")
    parser.add_argument("--output", type=Path, help="folder to write (default: the cache only)")
    _add_source(parser)
    parser.add_argument("--buckets", type=buckets, help="such as 64,128 or 8x64,1x128 or auto or pow2")
    parser.add_argument("--batch-sizes", type=counts, help="such as 1,8 (the default)")
    parser.add_argument("--n-buckets", type=count, default=8, help="lengths that auto may use (default: 8)")
    parser.add_argument("--calibration", type=Path, help="file of texts or token counts for auto")
    _add_columns(parser)
    parser.add_argument("--verbose", action="store_true", help="let the exporters talk")
    _add_output_flags(parser)
    parser.set_defaults(command=_compile)


def _add_inspect(commands: Commands) -> None:
    parser = commands.add_parser("inspect", help="say what an artifact holds and how it compared with torch")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command=_inspect)


def _add_validate(commands: Commands) -> None:
    parser = commands.add_parser("validate", help="run an artifact's probes through every bucket again")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command=_validate)


def _add_predict(commands: Commands) -> None:
    parser = commands.add_parser("predict", help="label every row of a file, in order, losing none")
    parser.add_argument("model", help="artifact, Hub id or folder")
    parser.add_argument("--input", type=Path, help="file to read (default: standard input)")
    parser.add_argument("--kind", choices=KINDS, help="of the input (default: by suffix)")
    parser.add_argument("--output", type=Path, help="file to write (default: standard output)")
    parser.add_argument("--csv", action="store_true", help="write CSV instead of JSONL")
    _add_columns(parser)
    _add_source(parser)
    parser.add_argument("--buckets", type=buckets, help="for a model that is no artifact: as in compile")
    parser.add_argument("--top-k", type=count, help="labels per row, best first (default: the best alone)")
    parser.add_argument("--overflow", choices=("truncate", "error"), default="truncate", help="(default: truncate)")
    parser.add_argument("--mode", choices=("shared", "static"), default="shared", help="(default: shared)")
    parser.add_argument("--provider", default="auto", help="onnxruntime execution provider (default: auto)")
    parser.add_argument("--window", type=count, default=1024, help="rows read ahead (default: 1024)")
    _add_output_flags(parser)
    parser.set_defaults(command=_predict)


def _add_eval(commands: Commands) -> None:
    parser = commands.add_parser("eval", help="compare torch, transformers' pipeline and buckets on labelled data")
    _add_eval_arguments(parser)
    parser.set_defaults(command=_eval)


def _add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--task", type=glue_task, help="a task of GLUE, such as sst2")
    add("--data", type=Path, help="a labelled file of your own, instead of a task: text, JSONL, CSV or parquet")
    add("--column", default="text", help="column of the text, with --data (default: text)")
    add("--pair-column", help="column of the second text of a pair, with --data")
    add("--label-column", default="label", help="column of the model's label, with --data (default: label)")
    add("--model", required=True, help="checkpoint on the Hub or in a folder")
    add("--buckets", required=True, type=buckets, help="lengths such as 64,128, or auto, or pow2")
    add("--batch-sizes", type=counts, help="such as 1,8")
    add("--n-buckets", type=count, help="how many lengths to plan, with --buckets auto")
    add("--split", default="validation", help="one split, or several joined by +; MNLI's validation is both halves")
    add("--data-dir", type=Path, help="folder with <task>/<split>.parquet, .csv or .jsonl, instead of the Hub")
    add("--limit", type=count, help="rows of each split to use, from the first")
    add("--rounds", type=count, default=3, help="times every system runs, in turns (default 3)")
    add("--label-order", type=names, help="the task's labels in the model's order, such as neutral,entailment,...")
    add("--mode", help="how the bucketed model holds its weights, such as shared or static")
    add("--provider", help="onnxruntime execution provider")
    add("--revision", help="branch, tag or commit of the model")
    add("--pipeline-batch-size", type=count, default=32, help="of transformers' pipeline (default 32)")
    add("--output", type=Path, metavar="FILE.json", help="write the result as JSON")
    add("--chart", type=Path, metavar="FILE.png", help="draw the result as PNG or SVG")
    add("--force", action="store_true", help="replace --output and --chart if they exist")
    add("--json", action="store_true", help="print JSON instead of the table")


def _add_cache(commands: Commands) -> None:
    parser = commands.add_parser("cache", help="list the compiled models on this machine, or remove them")
    parser.add_argument("--clear", action="store_true", help="remove them all")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.set_defaults(command=_cache)


def _add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--column", help="column that holds the text")
    parser.add_argument("--pair-column", help="column that holds the second text of a pair")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")
    parser.add_argument("--subfolder", default="", help="folder inside the repository")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code from the repository")


def _add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace output files that exist")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output and nothing else there")


def _plan(options: argparse.Namespace) -> int:
    from hf_bucket.data import read_column, read_dataset_column
    from hf_bucket.encode import count_tokens
    from hf_bucket.planner import lint, plan
    from hf_bucket.report import draw_plan, plan_chart_text
    from hf_bucket.source import Source

    if sum(value is not None for value in (options.file, options.lengths, options.dataset)) != 1:
        options.usage_error("plan needs one of FILE, --lengths and --dataset")
    _check_new(options, options.chart)
    columns = {"column": options.column, "pair_column": options.pair_column}
    if options.lengths is not None:
        values: Sequence[Any] = options.lengths
    elif options.dataset is not None:
        values = read_dataset_column(options.dataset, config=options.config, split=options.split, **columns)
    else:
        values = read_column(options.file, kind=options.kind, **columns)
    if values and not isinstance(values[0], int):
        if options.tokenizer is None:
            options.usage_error("texts need a --tokenizer MODEL that counts their tokens")
        values = count_tokens(values, Source(name=options.tokenizer))
    made = plan(values, n_buckets=options.n_buckets, batch_sizes=options.batch_sizes, max_length=options.max_length)
    findings = lint(made.ladder, min_length=1, max_length=None, histogram=made.histogram)
    if options.chart is not None:
        draw_plan(made, options.chart)
        say(f"drew {options.chart}")
    if options.json:
        print(json.dumps({**made.to_json(), "findings": [finding.message for finding in findings]}, indent=2))
        return 0
    print(plan_chart_text(made), made, f"buckets={list(made.lengths)}", sep="\n\n")
    for finding in findings:
        print(f"note: {finding.message}")
    return 0


def _compile(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import copy_artifact
    from hf_bucket.compile import CompileOptions, compile_model, from_recipe
    from hf_bucket.data import read_column
    from hf_bucket.recipe import read_recipe

    if (options.model is None) == (options.recipe is None):
        options.usage_error("compile needs a MODEL or a --recipe")
    output = options.output
    if options.recipe is not None:
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
        )
    _check_new(options, output)
    artifact = compile_model(source, compiling)
    if output is not None:
        artifact = copy_artifact(artifact, output)
    _print_artifact(artifact, options)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import open_artifact

    _print_artifact(open_artifact(options.artifact), options)
    return 0


def _print_artifact(artifact: Artifact, options: argparse.Namespace) -> None:
    from hf_bucket.describe import describe_artifact

    manifest = json.loads(artifact.manifest.to_json())
    as_json = json.dumps({"folder": str(artifact.folder), **manifest}, indent=2)
    print(as_json if options.json else describe_artifact(artifact))


def _validate(options: argparse.Namespace) -> int:
    from hf_bucket.artifact import open_artifact
    from hf_bucket.compile import check_buckets
    from hf_bucket.describe import describe_checks

    checks = check_buckets(open_artifact(options.artifact))
    print(json.dumps([asdict(check) for check in checks], indent=2) if options.json else describe_checks(checks))
    return 0


def _predict(options: argparse.Namespace) -> int:
    from hf_bucket.compile import CompileOptions, compile_model
    from hf_bucket.data import read_records
    from hf_bucket.pipelines import CallOptions, TextClassificationPipeline
    from hf_bucket.predict import predict
    from hf_bucket.runner import Runner, RunOptions
    from hf_bucket.session_ort import EngineOptions

    if options.input is None and options.kind is None:
        options.usage_error("standard input needs --kind")
    _check_new(options, options.output)
    if options.input is not None and options.output is not None and options.input.resolve() == options.output.resolve():
        options.usage_error(f"{options.output} is also the input; write to another file")
    artifact = compile_model(_source(options), CompileOptions(buckets=options.buckets))
    engine = EngineOptions(mode=options.mode, provider=options.provider)
    runner = Runner(artifact, RunOptions(engine=engine))
    classify = TextClassificationPipeline(runner, CallOptions(), overflow=options.overflow)
    with _sink(options.output) as sink, _progress(options.input) as advance:
        outcome = predict(
            classify,
            advance(read_records(options.input, kind=options.kind)),
            sink.write,
            column=options.column,
            pair_column=options.pair_column,
            top_k=options.top_k,
            window=options.window,
            as_csv=options.csv,
        )
        sink.flush()
    say(f"{outcome.rows} rows, {outcome.failed} of them with an error")
    if options.json:
        print(json.dumps({"rows": outcome.rows, "failed": outcome.failed, **runner.stats()}, indent=2))
    return 1 if outcome.failed else 0


def _eval(options: argparse.Namespace) -> int:
    from hf_bucket import glue
    from hf_bucket.evaluate import EvalRequest
    from hf_bucket.report import draw_evaluation

    if (options.task is None) == (options.data is None):
        options.usage_error("eval needs --task or --data")
    for path in (options.output, options.chart):
        _check_new(options, path)
    fields = {name: value for name, value in vars(options).items() if name in EvalRequest.__dataclass_fields__}
    report = glue.evaluate(EvalRequest(**{**fields, "task": options.task or "", "command": options.typed}), say=say)
    text = json.dumps(report.to_json(), indent=2, allow_nan=False)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    if options.chart is not None:
        draw_evaluation(report.to_json(), options.chart)
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
def _sink(path: Path | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        yield file


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


def glue_task(text: str) -> str:
    """Return the name of a GLUE task."""
    from hf_bucket.glue import get_glue_task

    try:
        return get_glue_task(text).name
    except BucketError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def counts(text: str) -> list[int]:
    """Return a list of counts written with commas."""
    return [count(part) for part in text.split(",")]


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def names(text: str) -> list[str]:
    """Return a list of names written with commas."""
    return [part.strip() for part in text.split(",")]


def buckets(text: str) -> list[int] | list[tuple[int, int]] | str:
    """Return ``auto``, ``pow2``, lengths, or (batch_size, length) pairs."""
    if text in ("auto", "pow2"):
        return text
    if not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", text):
        return counts(text)
    pairs = [part.split("x") for part in text.split(",")]
    return [(count(batch), count(length)) for batch, length in pairs]


def say(line: str) -> None:
    """Print a line on stderr."""
    print(line, file=sys.stderr, flush=True)
