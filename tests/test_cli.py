"""The command line as a user types it: outputs, exit status, and nothing overwritten unasked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_bucket
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
        (["plan", "--lengths", "1,x"], "'x' is not a whole number of at least 1"),
    ],
    ids=["nothing", "plan", "compile", "predict", "stdin", "json", "eval", "eval model", "numbers"],
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
    assert [line.split()[0] for line in out.splitlines()[1:5]] == [b.name for b in hf_bucket.load(artifact).ladder]
    assert "Many batches are faster" in out
    status, out, _ = run(capfd, "tune", str(artifact), "--seconds", "0.1", "--json")
    assert (status, set(json.loads(out))) == (0, {"at_once", "seconds"})
    assert len(list((tmp_path / "cache").rglob("CPUExecutionProvider-shared-*.json"))) == 1
