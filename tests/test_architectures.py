"""The survey of model types: what its rows, verdicts and tables are made of. No model is built here."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "architectures.py"


def test_exceptions_name_model_types(architectures: ModuleType) -> None:
    known = set(architectures.model_types())
    assert set(architectures.SPECIFIC) <= known
    assert set(architectures.SHORTEST) <= known


def test_special_ids_are_small_and_all_different(architectures: ModuleType) -> None:
    defaults = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 50256, "mask_token_id": 7}
    assert architectures.special_ids(defaults) == {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def test_an_id_that_a_config_leaves_open_stays_open(architectures: ModuleType) -> None:
    assert architectures.special_ids({"pad_token_id": None, "eos_token_id": 2}) == {"eos_token_id": 2}


def test_row_lengths_lie_around_every_edge(architectures: ModuleType) -> None:
    assert architectures.row_lengths((5, 12)) == [1, 4, 5, 6, 11, 12]
    assert architectures.row_lengths((5, 12), 4) == [4, 5, 6, 11, 12]


@pytest.mark.parametrize("length", [1, 2, 3, 9])
def test_a_row_has_its_length_and_ends_as_its_family_does(architectures: ModuleType, length: int) -> None:
    vocabulary = architectures.Vocabulary(pad=0, head=(1,), tail=(2,))
    row = vocabulary.row(length, np.random.default_rng(0))
    assert len(row) == length
    assert row[-1] == 2
    assert 0 not in row


def test_batches_hold_every_row_alone_and_once_in_company(architectures: ModuleType) -> None:
    groups = architectures.batches([0, 1, 2, 3, 4], 3)
    assert groups[:5] == [(0,), (1,), (2,), (3,), (4,)]
    assert sorted(row for group in groups[5:] for row in group) == [0, 1, 2, 3, 4]
    assert max(map(len, groups)) == 3
    assert architectures.batches([0, 1], 1) == [(0,), (1,)]


@pytest.mark.parametrize(
    ("difference", "moved", "spread", "verdict"),
    [
        pytest.param(1e-5, 1e-6, 2.0, "same", id="equal"),
        pytest.param(1e-5, 1.0, 2.0, "same", id="equal, though torch moves"),
        pytest.param(0.1, 1e-6, 2.0, "failed", id="taken, but different"),
        pytest.param(float("inf"), 1e-6, 2.0, "failed", id="taken, but no number"),
        pytest.param(None, 0.1, 2.0, "leaks", id="refused, torch moves"),
        pytest.param(None, 1e-6, 2.0, "refused", id="refused, torch stays"),
        pytest.param(0.0, 0.0, 0.01, "failed", id="logits too much alike"),
        pytest.param(0.0, 0.0, float("nan"), "failed", id="logits that are no numbers"),
    ],
)
def test_verdicts(
    architectures: ModuleType, difference: float | None, moved: float, spread: float, verdict: str
) -> None:
    assert architectures.judge(difference=difference, moved=moved, spread=spread, reason="no")[0] == verdict


def test_a_verdict_has_a_name(architectures: ModuleType) -> None:
    with pytest.raises(ValueError, match="must be one of same, leaks, refused, failed"):
        architectures.Finding(model_type="bert", verdict="fine")


def test_a_difference_that_is_no_number_is_infinite(architectures: ModuleType) -> None:
    assert architectures.largest_difference(np.array([1.0, np.nan]), np.array([1.0, 1.0])) == float("inf")
    assert architectures.largest_difference(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.5


def test_the_last_finding_of_a_type_counts(architectures: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results" / "found.jsonl"
    assert architectures.read(path) == {}
    first = architectures.Finding(model_type="bert", verdict="failed", reason="it took more than 1 s")
    second = architectures.Finding(
        model_type="bert", verdict="same", difference=1e-6, moved={"right": 1e-6, "left": 1.0}
    )
    for finding in (first, second):
        architectures.append(finding, path)
    assert architectures.read(path) == {"bert": second}
    architectures.write([second], path)
    assert architectures.read(path) == {"bert": second}
    assert len(path.read_text(encoding="utf-8").splitlines()) == 1


def test_a_crash_or_a_timeout_costs_one_row(architectures: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architectures, "__file__", "/no/such/architectures.py")
    crashed = architectures.run_one("bert", 60)
    assert crashed.verdict == "failed"
    assert "no/such/architectures.py" in crashed.reason
    late = architectures.run_one("bert", 0)
    assert (late.verdict, late.reason) == ("failed", "it took more than 0 s")


def test_the_report_has_a_row_per_type(architectures: ModuleType) -> None:
    findings = [
        architectures.Finding(model_type="bert", verdict="same", difference=2e-6, spread=1.5, max_length=64, runs=204),
        architectures.Finding(model_type="t5", verdict="same", difference=0.0, spread=4.0),
        architectures.Finding(model_type="fnet", verdict="leaks", spread=1.8, moved={"right": 1.5, "left": 1.7}),
        architectures.Finding(model_type="luke", verdict="refused", reason="a | b"),
    ]
    text = architectures.report(findings, total=127, where="2 cores")
    assert "2 same, 1 leaks, 1 refused (of 127)" in text
    assert "| bert | 2.0e-06 | 1.50 | 64 | 0 |" in text
    assert "| t5 | 0.0e+00 | 4.00 | no limit | 0 |" in text
    assert "| fnet | 1.5 | 1.7 | 1.80 | 0 |" in text
    assert "| luke | a \\| b | 0 |" in text
    assert "## Failed" not in text


def test_progress_says_what_is_left(architectures: ModuleType) -> None:
    finding = architectures.Finding(model_type="bert", verdict="same", difference=2e-6, seconds=20.4)
    line = architectures.progress(finding, 3, 127, left_s=1830)
    assert line == "[3/127] bert: same, 2.0e-06 off (20 s); about 30 min left"
