"""Every command and every Python block of the README and of docs/extending.md, run exactly as printed.

They run one after the other in a folder that looks like a clone, since some use what others made. Models of the Hub are
found in a folder laid out like the Hub's cache.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hf_bucket

ROOT = Path(hf_bucket.__file__).parents[1]
DEFAULT = ROOT / "hf_bucket" / "default"
HUB_MODELS = (
    "distilbert/distilbert-base-uncased-finetuned-sst-2-english",
    "textattack/bert-base-uncased-MRPC",
)
CLONED = ("Makefile", "README.md", "constraints.txt", "pyproject.toml")
CLONED += ("benchmarks", "docs", "hf_bucket", "recipes", "scripts", "tests")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="not run from a clone")


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and text of every block of a page, in order."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


def save_in_hub_cache(folder: Path, name: str) -> None:
    """Lay the bundled model out as the Hub's cache would hold one called ``name``, with labels that have no name."""
    model = folder / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / ("0" * 40)
    shutil.copytree(DEFAULT, snapshot)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0" * 40)
    config = json.loads((snapshot / "config.json").read_text())
    config.update(id2label={"0": "LABEL_0", "1": "LABEL_1"}, label2id={"LABEL_0": 0, "LABEL_1": 1})
    (snapshot / "config.json").write_text(json.dumps(config))


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with everything a clone has, and a virtual environment that is already there."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in CLONED:  # and nothing that a reader who ran the commands left beside it
        (folder / name).symlink_to(ROOT / name)
    (folder / ".venv").symlink_to(sys.prefix)
    for name in HUB_MODELS:
        save_in_hub_cache(tmp_path / "hf" / "hub", name)
    pairs = [(f"Film {n} is a delight .", "It is a delight ." if n % 2 else "It rains .", n % 2, n) for n in range(12)]
    (folder / "glue" / "mrpc").mkdir(parents=True)
    pandas = pytest.importorskip("pandas")
    columns = ["sentence1", "sentence2", "label", "idx"]
    pandas.DataFrame(pairs, columns=columns).to_parquet(folder / "glue" / "mrpc" / "validation.parquet")
    return folder


def run(command: list[str], clone: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one block in the clone and return what it printed; it must succeed."""
    paths = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    changed = {
        "PATH": paths,
        "HF_HOME": str(clone.parent / "hf"),
        "HF_BUCKET_CACHE": str(clone.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        # pip looks at what is installed and changes nothing
        "PIP_DRY_RUN": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        **environment,
    }
    for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "MAKEFLAGS", "MAKELEVEL", "VENV", "DEMO", "HF_HUB_CACHE"):
        changed.setdefault(name, "")
    kept = {name: value for name, value in {**os.environ, **changed}.items() if value}
    done = subprocess.run(command, cwd=clone, env=kept, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"
    return done


def run_blocks(page: str, clone: Path, languages: tuple[str, ...]) -> dict[str, str]:
    """Run all blocks but those of make; return what each printed, by its text."""
    shells = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
    texts = [(language, text) for language, text in blocks(page) if not text.startswith("make ")]
    assert {language for language, _ in texts} == set(languages)
    return {text: run([*shells[language], text], clone).stdout for language, text in texts}


def test_every_command_and_block_of_the_readme_runs(clone: Path) -> None:
    printed = run_blocks("README.md", clone, ("bash", "python"))
    for expected in (
        "'label': 'negative'",  # the bundled model's answer
        "[{'logits': array(",
        "buckets=[",
        "label flips",
        "compiled models in",
        '"text": "a dull, endless film"',
        "torch.Size([",
    ):
        assert any(expected in text for text in printed.values()), expected
    assert (clone / "plan.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in (clone / "labelled.jsonl").read_text(encoding="utf-8").splitlines()]
    reviews = (DEFAULT / "reviews.jsonl").read_text(encoding="utf-8").splitlines()
    assert [row["text"] for row in rows] == [json.loads(line)["text"] for line in reviews]
    assert all({"label", "predicted_label", "score"} == row.keys() - {"text"} for row in rows)


def test_every_block_on_extending_runs(clone: Path) -> None:
    script = "\n".join(text for _, text in blocks("docs/extending.md"))
    assert {language for language, _ in blocks("docs/extending.md")} == {"python"}
    printed = run([sys.executable, "-c", script], clone).stdout
    assert printed.count("'logits': array(") == 2
    assert "length=32" in printed or "s32" in printed


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.skipif(
    not (Path(sys.prefix) / ".installed").exists(), reason="the environment was not made by make: run make test"
)
def test_the_two_commands_run(clone: Path) -> None:
    commands = next(text for _, text in blocks("README.md") if text.startswith("make ")).splitlines()
    assert commands == ["make demo", "make test"]
    demo = run(["bash", "-c", commands[0]], clone)
    for expected in ("accuracy", "label flips", "max |delta logit|", "texts/s", "waste", "demo/plan.png"):
        assert expected in demo.stdout, expected
    for chart in ("plan.png", "evaluation.png"):
        assert (clone / "demo" / chart).read_bytes().startswith(b"\x89PNG")
    assert (clone / "demo" / "model" / "bucket_config.json").is_file()
    assert "\x1b" not in demo.stdout + demo.stderr  # no terminal: no control characters
    tests = run(["bash", "-c", commands[1]], clone, ARGS="tests/test_assign.py", JOBS="1")
    assert " passed" in tests.stdout


def test_the_readme_shows_the_charts_and_links_to_what_there_is() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if "://" not in target]
    assert sum(target.endswith(".png") for target in targets) >= 2
    for page, _, section in (target.partition("#") for target in targets):
        assert (ROOT / page).is_file(), page
        if section:
            headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
            names = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert section in names
