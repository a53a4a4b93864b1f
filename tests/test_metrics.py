"""The official GLUE metrics against values worked out by hand, and comparisons of logits."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.errors import DataError, DependencyError
from hf_bucket.metrics import LABELLED, OFFICIAL_METRICS, flipped_rows, max_delta, padded_waste, score

LABELS = np.array([1, 1, 1, 1, 0, 0, 0, 1])
PREDICTIONS = np.array([1, 1, 1, 0, 0, 1, 0, 0])
TP, FP, FN, TN = 3, 1, 2, 2

binary = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@settings(deadline=None)  # the first call imports scikit-learn
@given(rows=binary)
def test_accuracy_f1_and_matthews_follow_their_definitions(rows):
    predictions, labels = np.array(rows).T
    tp, fp = ((predictions == 1) & (labels == 1)).sum(), ((predictions == 1) & (labels == 0)).sum()
    fn, tn = ((predictions == 0) & (labels == 1)).sum(), ((predictions == 0) & (labels == 0)).sum()
    root = float(tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    expected = {"accuracy": (tp + tn) / len(rows), "f1": 2 * tp / (2 * tp + fp + fn) if tp else 0.0}
    assert score("mrpc", predictions, labels) == pytest.approx(expected)
    matthews = (tp * tn - fp * fn) / root**0.5 if root else 0.0
    assert score("cola", predictions, labels) == pytest.approx({"matthews": matthews})


@pytest.mark.parametrize("task", ["sst2", "qnli", "rte", "wnli", "mnli"])
def test_accuracy_is_the_only_metric_of(task):
    assert score(task, PREDICTIONS, LABELS) == {"accuracy": 5 / 8}


@pytest.mark.parametrize("task", ["mrpc", "qqp"])
def test_paraphrase_tasks_add_f1_of_label_1(task):
    assert score(task, PREDICTIONS, LABELS) == pytest.approx({"accuracy": 5 / 8, "f1": 2 * TP / (2 * TP + FP + FN)})


def test_cola_is_scored_by_matthews_correlation():
    root = ((TP + FP) * (TP + FN) * (TN + FP) * (TN + FN)) ** 0.5
    assert score("cola", PREDICTIONS, LABELS) == pytest.approx({"matthews": (TP * TN - FP * FN) / root})


def test_stsb_is_scored_by_pearson_and_spearman():
    # deviations (-1.5, -0.5, 0.5, 1.5) and (-2.5, -1.5, -0.5, 4.5): products sum to 11, squares to 5 and 29
    metrics = score("stsb", np.array([1.0, 2.0, 3.0, 4.0]), np.array([0.0, 1.0, 2.0, 7.0]))
    assert metrics == pytest.approx({"pearson": 11.0 / (5 * 29) ** 0.5, "spearman": 1.0})


def test_every_task_has_a_metric():
    assert list(OFFICIAL_METRICS) == ["cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli", LABELLED]
    for task in OFFICIAL_METRICS:
        assert list(score(task, LABELS, LABELS).values()) == pytest.approx([1.0] * len(OFFICIAL_METRICS[task]))


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "expected"),
    [
        pytest.param("cola", [0, 0, 0], [0, 1, 1], {"matthews": 0.0}, id="one label predicted"),
        pytest.param("cola", [1, 0, 1], [1, 1, 1], {"matthews": 0.0}, id="one label in the data"),
        pytest.param("cola", [1, 1], [1, 1], {"matthews": 0.0}, id="one label on both sides"),
        pytest.param("mrpc", [0, 0], [0, 0], {"accuracy": 1.0, "f1": 0.0}, id="nothing positive"),
        pytest.param("mrpc", [1], [1], {"accuracy": 1.0, "f1": 1.0}, id="a single row"),
        pytest.param("sst2", [0, 0], [1, 1], {"accuracy": 0.0}, id="nothing right"),
    ],
)
def test_degenerate_labels_have_a_value_and_no_warning(task, predictions, labels, expected):
    assert score(task, np.array(predictions), np.array(labels)) == expected


def test_nearly_constant_predictions_have_a_correlation_and_no_warning():
    predictions = 1e9 + np.array([0.0, 1e-6, 2e-6])
    assert score("stsb", predictions, np.array([1.0, 2.0, 3.0]))["spearman"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        pytest.param("ax", [1], [1], "task 'ax' is not in GLUE; use one of cola, sst2", id="unknown task"),
        pytest.param("sst2", [1, 0], [1], "got 2 predictions for 1 labels", id="unequal counts"),
        pytest.param("sst2", [], [], "sst2 has no rows to score", id="empty"),
        pytest.param("stsb", [2.0, 2.0], [1.0, 3.0], "pearson is undefined: all 2 predictions are 2", id="constant"),
        pytest.param("stsb", [1.0, 2.0], [5.0, 5.0], "pearson is undefined: all 2 labels are 5", id="one label"),
        pytest.param("stsb", [1.0], [2.0], "pearson is undefined: all 1 predictions are 1", id="one row"),
        pytest.param("stsb", [1.0, np.nan], [2.0, 3.0], "the prediction of row 1 is not a finite number", id="nan"),
        pytest.param("stsb", [1.0, 2.0], [np.inf, 3.0], "the label of row 0 is not a finite number", id="infinite"),
    ],
)
def test_what_cannot_be_scored_is_refused(task, predictions, labels, message):
    with pytest.raises(DataError, match=message):
        score(task, np.array(predictions), np.array(labels))


@pytest.mark.parametrize(("task", "module"), [("sst2", "sklearn.metrics"), ("stsb", "scipy.stats")])
def test_a_missing_package_names_the_command_that_installs_it(monkeypatch, task, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DependencyError, match=r'pip install "hf-bucket\[eval\]"'):
        score(task, np.array([0.0, 1.0]), np.array([0.0, 1.0]))


def test_a_row_flips_when_another_label_leads():
    reference = np.array([[0.1, 0.2], [3.0, 1.0], [0.0, 0.5]], dtype=np.float32)
    logits = np.array([[0.2, 0.1], [9.0, 8.0], [0.6, 0.5]], dtype=np.float32)
    assert flipped_rows(logits, reference) == [0, 2]
    assert flipped_rows(reference, reference) == []


def test_the_largest_difference_counts_whatever_its_sign():
    reference = np.array([[0.0, 1.0], [2.0, 3.0]], dtype=np.float32)
    assert max_delta(reference + np.array([[0, 0.25], [-0.5, 0]], dtype=np.float32), reference) == 0.5


@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=50), batch_size=st.integers(1, 9))
def test_waste_is_the_share_of_cells_that_no_token_fills(lengths, batch_size):
    cells = real = 0
    for row, length in enumerate(lengths):
        start = row - row % batch_size
        cells += max(lengths[start : start + batch_size])
        real += length
    assert padded_waste(lengths, batch_size) == pytest.approx((cells - real) / cells)
    assert 0 <= padded_waste(lengths, batch_size) < 1


def test_rows_of_one_length_waste_nothing():
    assert padded_waste([7, 7, 7], 2) == 0.0
