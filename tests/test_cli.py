"""The command line as a user types it: outputs, exit status, and nothing overwritten unasked."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_bucket
from hf_bucket.arguments import size_bytes
from hf_bucket.cli import COMMANDS, main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    assert main(["compile", str(tiny_bert), "--buckets", "8,32", "--batch-sizes", "1,4", "--output", str(folder)]) == 0
    return folder


def run(capfd, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capfd.readouterr()
    return status, out, err


def wrong(capfd, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in arguments])
    return capfd.readouterr().err


def test_help_is_light_and_shows_examples() -> None:
    code = (
        "import sys\nfrom hf_bucket.cli import COMMANDS, main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('numpy', 'torch', 'onnxruntime', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "examples:\n  hf-bucket plan --lengths" in out
    assert out.endswith("[]\n")


def test_plan_draws_prints_and_speaks_json(capfd, tmp_path: Path) -> None:
    chart = tmp_path / "plan.png"
    status, out, err = run(capfd, "plan", "--lengths", "12,15,18,40,41,120", "--n-buckets", "3", "--chart", chart)
    assert (status, "buckets=[18, 41, 120]" in out, f"drew {chart}" in err) == (0, True, True)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "exists; give another one" in wrong(capfd, "plan", "--lengths", "1,2", "--chart", chart)
    status, out, _ = run(capfd, "plan", "--lengths", "12,120", "--n-buckets", "2", "--json")
    assert (status, json.loads(out)["waste"]) == (0, 0.0)


def test_plan_counts_the_tokens_of_texts(capfd, tiny_bert: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("id,text\n1,w1 w2 w3\n2,w1\n", encoding="utf-8")
    status, out, _ = run(capfd, "plan", texts, "--tokenizer", tiny_bert, "--n-buckets", "2", "--json")
    assert (status, [pair[1] for pair in json.loads(out)["ladder"]][::2]) == (0, [3, 5])
    assert "texts need a --tokenizer MODEL" in wrong(capfd, "plan", texts)
    status, _, err = run(capfd, "plan", texts, "--tokenizer", tiny_bert, "--column", "review")
    assert (status, "no column 'review'" in err, "id, text" in err) == (1, True, True)


def test_plan_for_a_model_chooses_batch_sizes_by_what_runs_cost_here(
    capfd, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts.txt"
    texts.write_text("w1\n" * 40 + "w1 w2 w3 w4 w5 w6 w7 w8\n" * 8, encoding="utf-8")
    options = ["--model", artifact, "--n-buckets", "3", "--seconds", "0.3"]
    status, out, err = run(capfd, "plan", texts, *options, "--json")
    found = json.loads(out)
    assert (status, "measuring what a run of every bucket costs" in err) == (0, True)
    assert found["buckets"] == ",".join(f"{batch}x{length}" for batch, length in found["ladder"])
    assert {length for _, length in found["ladder"]} <= {3, 10}
    assert found["own_ladder"] == [[1, 8], [4, 8], [1, 32], [4, 32]]
    seconds = found["seconds_per_1000_rows"]
    assert (seconds["plan"] > 0, seconds["plan"]) == (True, pytest.approx(1000 * found["cost"]))
    status, out, err = run(capfd, "plan", texts, *options)
    assert (status, "measuring" in err) == (0, False), "the costs are in this machine's cache"
    assert f"--buckets {found['buckets']}" in out.splitlines(), "the same costs, the same plan"
    assert "s per 1,000 rows; with the model's own ladder [b1_s8, b4_s8, b1_s32, b4_s32]" in out
    assert run(capfd, "compile", artifact, "--buckets", found["buckets"])[0] == 0
    status, out, _ = run(capfd, "plan", "--lengths", "3,10,70", *options, "--batch-sizes", "2,4", "--json")
    found = json.loads(out)
    assert (found["clipped"], found["ladder"][-1][1]) == (1, 64), "the model holds 64 tokens"
    assert {batch for batch, _ in found["ladder"]} <= {2, 4}


def test_plan_for_a_model_keeps_limits_or_says_what_is_the_least(
    capfd, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    model = ["--lengths", "3,3,3,3,3,3,3,3,60", "--model", artifact, "--seconds", "0.3"]
    status, out, _ = run(capfd, "plan", *model, "--batch-sizes", "8,32", "--json")
    assert (status, any(batch == 32 for batch, _ in json.loads(out)["ladder"])) == (0, True)
    status, _, err = run(capfd, "plan", *model, "--batch-sizes", "32", "--memory", "10kB")
    assert (status, "memory_bytes is 10,000 but b32_s60, the least that holds 60 tokens, needs" in err) == (1, True)
    least = int(re.search(r"needs ([\d,]+);", err)[1].replace(",", ""))
    assert run(capfd, "plan", *model, "--batch-sizes", "32", "--memory", str(least - 1))[0] == 1
    status, out, _ = run(capfd, "plan", *model, "--batch-sizes", "8,32", "--memory", str(least - 1), "--json")
    assert (status, {batch for batch, length in json.loads(out)["ladder"] if length == 60}) == (0, {8})
    status, _, err = run(capfd, "plan", *model, "--compile-seconds", "0.00001")
    assert (status, "compile_s is 1e-05 but one bucket, the least there can be, takes" in err) == (1, True)
    assert run(capfd, "plan", *model, "--compile-seconds", "1000")[0] == 0
    status, _, err = run(capfd, "plan", *model, "--max-length", "65")
    assert (status, "s65 is longer than this model's maximum of 64 tokens" in err) == (1, True)


@pytest.mark.parametrize(
    ("typed", "size"),
    [("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("500 MB", 5 * 10**8), ("10kB", 10**4), ("4096", 4096), ("7B", 7)],
)
def test_a_size_is_read_with_its_unit(typed: str, size: int) -> None:
    assert size_bytes(typed) == size


@pytest.mark.parametrize("typed", ["", "0", "-1GB", "GB", "2XB", "2G", "1e9", "nan"])
def test_a_size_that_is_none_is_refused(typed: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size such as 2GB"):
        size_bytes(typed)


def test_compile_chooses_batch_sizes_where_it_knows_the_texts(
    capfd, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "w1\n" * 40 + "w1 w2 w3 w4\n" * 8, encoding="utf-8")
    options = ["--buckets", "auto", "--batch-sizes", "auto", "--n-buckets", "3", "--calibration", texts, "--json"]
    status, out, _ = run(capfd, "compile", artifact, *options)
    ladder = json.loads(out)["ladder"]
    assert (status, len(ladder) <= 3) == (0, True)
    assert json.loads(run(capfd, "compile", artifact, *options)[1])["ladder"] == ladder
    status, _, err = run(capfd, "compile", artifact, "--batch-sizes", "auto")
    assert (status, 'batch_sizes="auto" needs to know the texts; give calibration_dataset' in err) == (1, True)


def test_inspect_and_validate_show_every_bucket(capfd, artifact: Path) -> None:
    status, out, _ = run(capfd, "inspect", artifact)
    assert (status, out.count("torch  "), "b4_s32" in out) == (0, 4, True)
    status, out, _ = run(capfd, "inspect", artifact, "--json")
    assert json.loads(out)["task"] == "text-classification"
    status, out, _ = run(capfd, "validate", artifact, "--json")
    assert [check["label_flips"] for check in json.loads(out)["certificates"]] == [0, 0, 0, 0]


def test_predict_keeps_every_row_and_says_which_failed(capfd, artifact: Path, tmp_path: Path) -> None:
    rows, labelled = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"id": 1, "text": "w1"}\nnot json\n{"id": 3, "text": null}\n{"id": 4, "text": "w2"}\n')
    status, out, err = run(capfd, "predict", artifact, "--input", rows, "--output", labelled)
    answers = [json.loads(line) for line in labelled.read_text().splitlines()]
    assert (status, out, "4 rows, 2 of them with an error" in err) == (1, "", True)
    assert [answer.get("line") for answer in answers] == [None, 2, 3, None]
    assert [answer.get("id") for answer in answers] == [1, None, 3, 4]
    assert {"label", "score"} <= answers[0].keys()
    assert "exists; give another one" in wrong(capfd, "predict", artifact, "--input", rows, "--output", labelled)
    both = ["--input", rows, "--output", rows, "--force"]
    assert "is also the input" in wrong(capfd, "predict", artifact, *both)
    assert rows.read_text().startswith('{"id": 1')


def test_predict_writes_csv(capfd, artifact: Path, tmp_path: Path) -> None:
    rows = tmp_path / "in.csv"
    rows.write_text("id,text\n7,w1\n", encoding="utf-8")
    status, out, _ = run(capfd, "predict", artifact, "--input", rows, "--csv")
    assert (status, out.splitlines()[0].startswith("id,text,label,score"), out.splitlines()[1][:5]) == (
        0,
        True,
        "7,w1,",
    )


def test_a_column_that_no_row_has_is_refused_before_anything_is_written(capfd, artifact: Path, tmp_path: Path) -> None:
    rows, labelled = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"id": 1, "review": "w1"}\n')
    status, out, err = run(capfd, "predict", artifact, "--input", rows, "--output", labelled, "--column", "reviw")
    assert (status, out, labelled.exists()) == (1, "", False)
    assert "no column 'reviw'; it has id, review" in err


def test_a_recipe_says_what_to_predict_with_and_what_to_evaluate(capfd, tiny_bert: Path, tmp_path: Path) -> None:
    recipe, rows = tmp_path / "tiny.yaml", tmp_path / "rows.txt"
    rows.write_text("w1 w2 w3\nw1\n" * 4)
    (tmp_path / "sst2").mkdir()
    table = "".join(f"w{n} w{n + 1},{n % 2}\n" for n in range(8))
    (tmp_path / "sst2" / "validation.csv").write_text(f"sentence,label\n{table}")
    recipe.write_text(
        f"model: {tiny_bert}\nbuckets: auto\nn_buckets: 2\ncalibration: {{file: {rows}, column: text}}\n"
        f"evaluate: {{glue: sst2, data_dir: {tmp_path}, rounds: 1, label_order: [negative, positive]}}\n"
    )
    status, out, _ = run(capfd, "predict", "--recipe", recipe, "--input", rows, "--overflow", "error")
    assert (status, len(out.splitlines())) == (0, 8)
    status, out, _ = run(capfd, "eval", "--recipe", recipe, "--json")
    report = json.loads(out)
    assert (status, report["n"], report["calibration"]) == (0, 8, "the recipe's")
    assert report["ladder"] == ["b1_s5", "b8_s5", "b1_s64", "b8_s64"]
    status, out, _ = run(capfd, "eval", "--recipe", recipe, "--buckets", "16", "--limit", "3", "--json")
    assert (json.loads(out)["n"], json.loads(out)["ladder"]) == (3, ["b1_s16", "b8_s16"])


def test_an_interrupted_job_and_a_full_disk_end_with_1_and_one_line(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, said in ((KeyboardInterrupt(), "interrupted\n"), (OSError(28, "No space left"), "error: [Errno 28]")):

        def fail(options: object, error: BaseException = error) -> int:
            raise error

        monkeypatch.setitem(COMMANDS, "cache", fail)
        status, out, err = run(capfd, "cache")
        assert (status, out, err.startswith(said), err.count("\n")) == (1, "", True, 1)


def test_a_recipe_compiles_and_a_wrong_one_is_named_by_line(capfd, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"model: {tiny_bert}\nbuckets: [8, 32]\noutput: {tmp_path / 'made'}\n", encoding="utf-8")
    assert run(capfd, "compile", "--recipe", recipe)[0] == 0
    assert (tmp_path / "made" / "bucket_config.json").is_file()
    recipe.write_text(f"model: {tiny_bert}\nbucket_sizes: [8]\n", encoding="utf-8")
    status, _, err = run(capfd, "compile", "--recipe", recipe)
    assert (status, "tiny.yaml:2: bucket_sizes" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["plan"], "plan needs one of FILE, --lengths and --dataset"),
        (["compile"], "compile needs a MODEL or a --recipe"),
        (["predict"], "predict needs a MODEL or a --recipe"),
        (["predict", "model"], "standard input needs --kind"),
        (["predict", "model", "--kind", "text", "--json"], "--json prints a summary"),
        (["eval", "--model", "m", "--buckets", "8"], "eval needs --task, --data, or a --recipe"),
        (["eval", "--task", "sst2", "--buckets", "8"], "eval needs --model or a --recipe"),
        (["plan", "--lengths", "1", "--model", "m", "--tokenizer", "m"], "--tokenizer and --model do not go together"),
        (["plan", "--lengths", "1", "--memory", "2GB"], "--memory needs --model"),
        (["plan", "--lengths", "1", "--compile-seconds", "2"], "--compile-seconds needs --model"),
        (["plan", "--lengths", "1", "--seconds", "2"], "--seconds needs --model"),
        (["plan", "--lengths", "1", "--window", "2"], "--window needs --model"),
        (["plan", "--lengths", "1,x"], "'x' is not a whole number of at least 1"),
    ],
    ids=[
        *["nothing", "plan", "compile", "predict", "stdin", "json", "eval", "eval model"],
        *["two tokenizers", "memory", "compile seconds", "seconds", "window", "numbers"],
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_needed(capfd, arguments: list[str], message: str) -> None:
    assert message in wrong(capfd, *arguments)


def test_a_failed_job_ends_with_1_and_one_line(capfd, tmp_path: Path) -> None:
    status, out, err = run(capfd, "inspect", tmp_path / "nothing")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")


def test_labelled_files_of_the_users_own_are_evaluated(capfd, tiny_bert: Path, tmp_path: Path) -> None:
    rows, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    rows.write_text("".join(f'{{"text": "w{n} w{n + 1}", "label": "LABEL_{n % 2}"}}\n' for n in range(12)))
    files = ["--output", report, "--chart", tmp_path / "report.svg"]
    options = ["--model", tiny_bert, "--buckets", "8,32", "--rounds", 1]
    status, out, _ = run(capfd, "eval", "--data", rows, *options, *files)
    figures = json.loads(report.read_text())["systems"]
    assert (status, figures["hf_bucket"]["label_flips"]) == (0, 0)
    assert figures["hf_bucket"]["metrics"] == figures["torch"]["metrics"]
    assert "accuracy" in out
    assert (tmp_path / "report.svg").read_text().lstrip().startswith("<?xml")


def test_the_cache_can_be_listed(capfd, artifact: Path) -> None:
    status, out, _ = run(capfd, "cache")
    assert (status, "compiled models in" in out) == (0, True)


def test_tune_says_what_every_bucket_costs_here_and_keeps_it(
    capfd, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_BUCKET_CACHE", str(tmp_path / "cache"))
    status, out, _ = run(capfd, "tune", str(artifact), "--seconds", "0.2")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()[3:7]] == [b.name for b in hf_bucket.load(artifact).ladder]
    assert "Many batches are faster" in out
    status, out, _ = run(capfd, "tune", str(artifact), "--seconds", "0.1", "--json")
    told = {"at_once", "alone", "ladders", "seconds", "provider", "provider_of_many", "compared"}
    assert (status, set(json.loads(out))) == (0, told)
    assert len(list((tmp_path / "cache").rglob("CPUExecutionProvider-shared-*.json"))) == 1
