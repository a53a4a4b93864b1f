"""The command line as a user types it: outputs, exit status, and nothing overwritten unasked."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_bucket.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def artifact(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "model"
    assert main(["compile", str(tiny_bert), "--buckets", "8,32", "--batch-sizes", "1,4", "--output", str(folder)]) == 0
    return folder


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def wrong(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err


def test_help_is_light_and_shows_examples() -> None:
    code = (
        "import sys\nfrom hf_bucket.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('numpy', 'torch', 'onnxruntime', 'transformers') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "examples:\n  hf-bucket plan --lengths" in out
    assert out.endswith("[]\n")


def test_plan_draws_prints_and_speaks_json(capsys, tmp_path: Path) -> None:
    chart = tmp_path / "plan.png"
    status, out, err = run(capsys, "plan", "--lengths", "12,15,18,40,41,120", "--n-buckets", "3", "--chart", chart)
    assert (status, "buckets=[18, 41, 120]" in out, f"drew {chart}" in err) == (0, True, True)
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert "exists; give another one" in wrong(capsys, "plan", "--lengths", "1,2", "--chart", chart)
    status, out, _ = run(capsys, "plan", "--lengths", "12,120", "--n-buckets", "2", "--json")
    assert (status, json.loads(out)["waste"]) == (0, 0.0)


def test_plan_counts_the_tokens_of_texts(capsys, tiny_bert: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.csv"
    texts.write_text("id,text\n1,w1 w2 w3\n2,w1\n", encoding="utf-8")
    status, out, _ = run(capsys, "plan", texts, "--tokenizer", tiny_bert, "--n-buckets", "2", "--json")
    assert (status, [pair[1] for pair in json.loads(out)["ladder"]][::2]) == (0, [3, 5])
    assert "texts need a --tokenizer MODEL" in wrong(capsys, "plan", texts)
    status, _, err = run(capsys, "plan", texts, "--tokenizer", tiny_bert, "--column", "review")
    assert (status, "no column 'review'" in err, "id, text" in err) == (1, True, True)


def test_inspect_and_validate_show_every_bucket(capsys, artifact: Path) -> None:
    status, out, _ = run(capsys, "inspect", artifact)
    assert (status, out.count("torch  "), "b4_s32" in out) == (0, 4, True)
    status, out, _ = run(capsys, "inspect", artifact, "--json")
    assert json.loads(out)["task"] == "text-classification"
    status, out, _ = run(capsys, "validate", artifact, "--json")
    assert [check["label_flips"] for check in json.loads(out)] == [0, 0, 0, 0]


def test_predict_keeps_every_row_and_says_which_failed(capsys, artifact: Path, tmp_path: Path) -> None:
    rows, labelled = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"id": 1, "text": "w1"}\nnot json\n{"id": 3, "text": null}\n{"id": 4, "text": "w2"}\n')
    status, out, err = run(capsys, "predict", artifact, "--input", rows, "--output", labelled)
    answers = [json.loads(line) for line in labelled.read_text().splitlines()]
    assert (status, out, "4 rows, 2 of them with an error" in err) == (1, "", True)
    assert [answer.get("line") for answer in answers] == [None, 2, 3, None]
    assert [answer.get("id") for answer in answers] == [1, None, 3, 4]
    assert {"label", "score"} <= answers[0].keys()
    assert "exists; give another one" in wrong(capsys, "predict", artifact, "--input", rows, "--output", labelled)
    both = ["--input", rows, "--output", rows, "--force"]
    assert "is also the input" in wrong(capsys, "predict", artifact, *both)
    assert rows.read_text().startswith('{"id": 1')


def test_predict_writes_csv(capsys, artifact: Path, tmp_path: Path) -> None:
    rows = tmp_path / "in.csv"
    rows.write_text("id,text\n7,w1\n", encoding="utf-8")
    status, out, _ = run(capsys, "predict", artifact, "--input", rows, "--csv")
    assert (status, out.splitlines()[0].startswith("id,text,label,score"), out.splitlines()[1][:5]) == (
        0,
        True,
        "7,w1,",
    )


def test_a_recipe_compiles_and_a_wrong_one_is_named_by_line(capsys, tiny_bert: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(f"model: {tiny_bert}\nbuckets: [8, 32]\noutput: {tmp_path / 'made'}\n", encoding="utf-8")
    assert run(capsys, "compile", "--recipe", recipe)[0] == 0
    assert (tmp_path / "made" / "bucket_config.json").is_file()
    recipe.write_text(f"model: {tiny_bert}\nbucket_sizes: [8]\n", encoding="utf-8")
    status, _, err = run(capsys, "compile", "--recipe", recipe)
    assert (status, "tiny.yaml:2: bucket_sizes" in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["plan"], "plan needs one of FILE, --lengths and --dataset"),
        (["compile"], "compile needs a MODEL or a --recipe"),
        (["predict", "model"], "standard input needs --kind"),
        (["eval", "--model", "m", "--buckets", "8"], "eval needs --task or --data"),
        (["plan", "--lengths", "1,x"], "'x' is not a whole number of at least 1"),
    ],
    ids=["nothing", "plan", "compile", "predict", "eval", "numbers"],
)
def test_wrong_usage_ends_with_2_and_says_what_is_needed(capsys, arguments: list[str], message: str) -> None:
    assert message in wrong(capsys, *arguments)


def test_a_failed_job_ends_with_1_and_one_line(capsys, tmp_path: Path) -> None:
    status, out, err = run(capsys, "inspect", tmp_path / "nothing")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")


def test_labelled_files_of_the_users_own_are_evaluated(capsys, tiny_bert: Path, tmp_path: Path) -> None:
    rows, report = tmp_path / "rows.jsonl", tmp_path / "report.json"
    rows.write_text("".join(f'{{"text": "w{n} w{n + 1}", "label": "LABEL_{n % 2}"}}\n' for n in range(12)))
    files = ["--output", report, "--chart", tmp_path / "report.svg"]
    options = ["--model", tiny_bert, "--buckets", "8,32", "--rounds", 1]
    status, out, _ = run(capsys, "eval", "--data", rows, *options, *files)
    figures = json.loads(report.read_text())["systems"]
    assert (status, figures["hf_bucket"]["label_flips"]) == (0, 0)
    assert figures["hf_bucket"]["metrics"] == figures["torch"]["metrics"]
    assert "accuracy" in out
    assert (tmp_path / "report.svg").read_text().lstrip().startswith("<?xml")


def test_the_cache_can_be_listed(capsys, artifact: Path) -> None:
    status, out, _ = run(capsys, "cache")
    assert (status, "compiled models in" in out) == (0, True)
