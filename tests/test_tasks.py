"""A model's limits, labels and padding are what transformers would use, read from its JSON files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import PAD, SEP, WORDS, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_bucket.encode import Encoder
from hf_bucket.errors import ModelError
from hf_bucket.facts import Facts, check_vocabulary, read_facts
from hf_bucket.families import true_max_length
from hf_bucket.tasks import AXES, TASKS, InputSpec, Signature, get_task

TASK = get_task("text-classification")
ENCODER = Encoder(tiny_tokenizer().to_str(), inputs=["input_ids"])
CONFIG = {"model_type": "bert", "max_position_embeddings": 64, "vocab_size": 94, "pad_token_id": 3}

# What makes a tiny model of any of the types below; a configuration takes the keys it has.
TINY = {
    "vocab_size": 32,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "embedding_size": 24,
    "dim": 24,
    "hidden_dim": 8,
    "n_heads": 2,
    "n_layers": 1,
    "n_embd": 24,
    "n_head": 2,
    "n_layer": 1,
    "attention_window": [4],
    "entity_vocab_size": 4,
    "entity_emb_size": 4,
    "max_depth": 2,
    "xpath_unit_hidden_size": 4,
    "languages": ("en_XX",),
    "default_language": "en_XX",
    "mask_token_id": 4,
}

ABSOLUTE_POSITIONS = (
    "bert",
    "distilbert",
    "electra",
    "gpt2",
    "camembert",
    "data2vec-text",
    "esm",
    "ibert",
    "lilt",
    "longformer",
    "luke",
    "markuplm",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def write(folder: Path, config: object, tokenizer: object = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder


def facts_of(folder: Path, config: object, tokenizer: object = None) -> Facts:
    return read_facts(write(folder, config, tokenizer), TASK, ENCODER)


# property


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 600), st.none() | st.integers(0, 2))
def test_positions_after_the_padding_id_are_as_many_fewer(positions: int, pad: int | None) -> None:
    config = {"model_type": "roberta", "max_position_embeddings": positions, "pad_token_id": pad}
    assert true_max_length(config) == positions - (1 if pad is None else pad) - 1
    assert true_max_length({**config, "model_type": "bert"}) == positions


# oracle


@pytest.mark.parametrize(
    ("model_type", "pad_id"),
    [*((name, 3) for name in ABSOLUTE_POSITIONS), ("mpnet", 1)],  # MPNet counts from 2, whatever its padding id
)
def test_a_model_takes_its_true_maximum_and_not_one_token_more(model_type: str, pad_id: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(model_type)
    names = config.to_dict()
    for name, value in {**TINY, "max_position_embeddings": 20, "n_positions": 20}.items():
        if name in names:
            setattr(config, name, value)
    config.pad_token_id = pad_id
    model = AutoModelForSequenceClassification.from_config(config).eval()
    longest = true_max_length(json.loads(config.to_json_string(use_diff=False)))
    assert longest is not None
    with torch.no_grad():
        ids = torch.full((1, longest + 1), 5)
        assert torch.isfinite(model(ids[:, 1:], attention_mask=torch.ones_like(ids[:, 1:])).logits).all()
        with pytest.raises((IndexError, RuntimeError), match=r"index|size"):
            model(ids, attention_mask=torch.ones_like(ids))


def test_facts_of_a_real_model_are_those_that_transformers_reads(assets: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = assets / "models" / "minilm-mrpc"
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    encoder = Encoder((folder / "tokenizer.json").read_text(encoding="utf-8"), inputs=["input_ids"])
    assert read_facts(folder, TASK, encoder) == Facts(
        max_length=512,
        vocab_size=config.vocab_size,
        labels=tuple(config.id2label[index] for index in range(config.num_labels)),
        problem_type=config.problem_type,
        pad_ids={
            "input_ids": tokenizer.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": tokenizer.pad_token_type_id,
        },
    )


# tables


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({}, None, id="nothing said"),
        pytest.param({"model_type": "bert", "max_position_embeddings": 512}, 512, id="bert"),
        pytest.param({"model_type": "gpt2", "n_positions": 1024}, 1024, id="gpt2"),
        pytest.param({"model_type": "x", "max_seq_len": 2048}, 2048, id="max_seq_len"),
        pytest.param({"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1}, 512, id="roberta"),
        pytest.param({"model_type": "roberta", "max_position_embeddings": 514}, 512, id="roberta without pad id"),
        pytest.param({"model_type": "mpnet", "max_position_embeddings": 514, "pad_token_id": 1}, 512, id="mpnet"),
        pytest.param({"model_type": "xlm-roberta", "max_position_embeddings": 8194}, 8192, id="xlm-roberta"),
        pytest.param({"model_type": "longformer", "max_position_embeddings": 4098}, 4096, id="longformer"),
        pytest.param({"model_type": "esm", "max_position_embeddings": 1026, "pad_token_id": 1}, 1024, id="esm"),
        pytest.param({"model_type": "t5", "n_positions": 512}, None, id="t5 has relative positions"),
        pytest.param({"model_type": "xlnet", "max_position_embeddings": 512}, None, id="xlnet has relative positions"),
        pytest.param({"model_type": "bert", "max_position_embeddings": -1}, None, id="minus one"),
        pytest.param({"model_type": "bert", "max_position_embeddings": None}, None, id="null"),
        pytest.param({"model_type": "bert", "max_position_embeddings": "512"}, None, id="text"),
    ],
)
def test_the_true_maximum_is_what_the_positions_allow(config: dict[str, object], expected: int | None) -> None:
    assert true_max_length(config) == expected


@pytest.mark.parametrize("name", [name for task in TASKS for name in (task.name, *task.aliases)])
def test_a_task_is_found_by_its_name_and_its_aliases(name: str) -> None:
    task = get_task(name)
    assert name in (task.name, *task.aliases)


@pytest.mark.parametrize("name", ["", "TEXT-CLASSIFICATION", "fill-mask", None, 3])
def test_an_unknown_task_names_the_known_ones(name: Any) -> None:
    with pytest.raises(ModelError, match=rf'task {name!r} is not supported; use one of "text-classification", "sent'):
        get_task(name)


@pytest.mark.parametrize(
    ("tokenizer", "config_pad", "expected"),
    [
        pytest.param({"pad_token": PAD}, None, 3, id="text"),
        pytest.param({"pad_token": {"content": PAD, "lstrip": False}}, None, 3, id="dict"),
        pytest.param({"pad_token": PAD}, 0, 3, id="the tokenizer is right where the config differs"),
        pytest.param({"pad_token": {"content": SEP}}, 3, 2, id="a dict is right where the config differs"),
        pytest.param(None, 3, 3, id="no tokenizer_config.json"),
        pytest.param({}, 3, 3, id="no pad token in it"),
        pytest.param({"pad_token": None}, 3, 3, id="null"),
        pytest.param({"pad_token": "<pad>"}, 3, 3, id="unknown to the tokenizer"),
        pytest.param({"pad_token": {"content": None}}, 3, 3, id="dict of null"),
        pytest.param({"pad_token": {}}, 3, 3, id="empty dict"),
        pytest.param({"pad_token": 3}, 2, 2, id="a number"),
        pytest.param({"pad_token": "[UNK]"}, 3, 0, id="an id of 0 is an id"),
        pytest.param(None, 0, 0, id="an id of 0 in the config is one too"),
    ],
)
def test_the_pad_id_is_the_tokenizers_then_the_configs(
    tmp_path: Path, tokenizer: object, config_pad: int | None, expected: int
) -> None:
    facts = facts_of(tmp_path, {**CONFIG, "pad_token_id": config_pad}, tokenizer)
    assert facts.pad_ids == {"input_ids": expected, "attention_mask": 0, "token_type_ids": 0}


@pytest.mark.parametrize("config_pad", [None, "3", -1, 1.0, True], ids=repr)
@pytest.mark.parametrize("tokenizer", [None, {"pad_token": "<pad>"}], ids=["no tokenizer", "unknown token"])
def test_no_pad_token_anywhere_says_what_to_add(tmp_path: Path, config_pad: object, tokenizer: object) -> None:
    with pytest.raises(ModelError, match=r"names no pad token in config\.json or tokenizer_config\.json; add pad_"):
        facts_of(tmp_path, {**CONFIG, "pad_token_id": config_pad}, tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        pytest.param({"pad_token_type_id": 4}, 4, id="xlnet's way"),
        pytest.param({"pad_token_type_id": None}, 0, id="null"),
        pytest.param({}, 0, id="not said"),
    ],
)
def test_the_type_of_a_padding_token_is_the_tokenizers(tmp_path: Path, tokenizer: object, expected: int) -> None:
    assert facts_of(tmp_path, CONFIG, tokenizer).pad_ids["token_type_ids"] == expected


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        pytest.param({"id2label": {"0": "no", "1": "yes"}}, ("no", "yes"), id="named"),
        pytest.param({"id2label": {"1": "yes", "0": "no"}}, ("no", "yes"), id="named in another order"),
        pytest.param(
            {"id2label": {str(number): f"l{number}" for number in (10, 9, 2, 1, 0, 3, 4, 5, 6, 7, 8)}},
            tuple(f"l{number}" for number in range(11)),
            id="eleven, by number and not by text",
        ),
        pytest.param({"id2label": {"0": 1}}, ("1",), id="a name that is a number"),
        pytest.param({}, ("LABEL_0", "LABEL_1"), id="absent"),
        pytest.param({"id2label": None}, ("LABEL_0", "LABEL_1"), id="null"),
        pytest.param({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2"), id="only a number"),
        pytest.param({"num_labels": 1}, ("LABEL_0",), id="one"),
        pytest.param({"num_labels": 3, "id2label": {"0": "score"}}, ("score",), id="names before the number"),
    ],
)
def test_labels_are_in_the_order_of_the_logits(
    tmp_path: Path, config: dict[str, object], labels: tuple[str, ...]
) -> None:
    assert facts_of(tmp_path, {**CONFIG, **config}).labels == labels


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"id2label": {"a": "no"}}, id="keys are words"),
        pytest.param({"id2label": ["no", "yes"]}, id="a list"),
        pytest.param({"id2label": 2}, id="a number"),
        pytest.param({"num_labels": None}, id="number is null"),
        pytest.param({"num_labels": "two"}, id="number is a word"),
    ],
)
def test_labels_that_cannot_be_read_are_a_model_error(tmp_path: Path, config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"config\.json has no usable label names"):
        facts_of(tmp_path, {**CONFIG, **config})


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"{", "cannot be read", id="not JSON"),
        pytest.param(b"\xff", "cannot be read", id="not text"),
        pytest.param(b"[]", "holds a list, expected an object", id="a list"),
        pytest.param(b"null", "holds a NoneType, expected an object", id="null"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    write(tmp_path, CONFIG, {})
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"/{name} {message}"):
        read_facts(tmp_path, TASK, ENCODER)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json cannot be read .*No such file"):
        read_facts(tmp_path, TASK, ENCODER)


# examples


@pytest.mark.parametrize("vocab_size", [None, 4 + len(WORDS), 100], ids=["unknown", "just enough", "more"])
def test_a_vocabulary_that_fits_the_embedding_passes(tmp_path: Path, vocab_size: int | None) -> None:
    check_vocabulary(ENCODER, facts_of(tmp_path, {**CONFIG, "vocab_size": vocab_size}))


def test_a_vocabulary_one_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer has ids up to 93 but the model embeds only 0 to 92"):
        check_vocabulary(ENCODER, facts_of(tmp_path, {**CONFIG, "vocab_size": 93}))


def test_limits_and_problem_type_are_the_configs(tmp_path: Path) -> None:
    facts = facts_of(tmp_path, {**CONFIG, "model_type": "roberta", "problem_type": "regression"})
    assert (facts.max_length, facts.vocab_size, facts.problem_type) == (60, 94, "regression")
    assert facts_of(tmp_path, {"pad_token_id": 3}).vocab_size is None


def test_every_task_names_only_known_axes_and_takes_ids_and_mask() -> None:
    for task in TASKS:
        named = {axis for axes in (task.input_axes, *task.output_axes.values()) for axis in axes}
        assert named <= set(AXES)
        assert {"input_ids", "attention_mask"} <= set(task.pad_ids)


def test_input_names_keep_the_graphs_order() -> None:
    specs = tuple(InputSpec(name=name, dtype="int64", axes=("row", "token"), pad_id=0) for name in "bca")
    assert Signature(inputs=specs, outputs=()).input_names == ("b", "c", "a")
