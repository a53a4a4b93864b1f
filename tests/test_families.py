"""What differs between architectures is data in one table, and padding, limits and batches follow it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import fake_artifact, fake_engine
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_bucket
from hf_bucket.artifact import open_artifact
from hf_bucket.assign import Assignment, assign
from hf_bucket.batch import Features, pad, unpad
from hf_bucket.errors import InputError
from hf_bucket.families import FAMILIES, counted_id, family_of, true_max_length
from hf_bucket.ladder import Bucket, make_ladder
from hf_bucket.manifest import MANIFEST
from hf_bucket.probes import probe_features
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.tasks import InputSpec, OutputSpec, Signature

LADDER = make_ladder([4, 8], batch_sizes=[1, 3])


def test_no_other_module_asks_for_a_model_type() -> None:
    folder = Path(hf_bucket.__file__).parent
    asking = [path.name for path in folder.glob("*.py") if "model_type" in path.read_text(encoding="utf-8")]
    assert asking == ["families.py"]


def test_every_model_type_is_known_to_transformers_and_named_once() -> None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    named = [model_type for family in FAMILIES for model_type in family.model_types]
    assert max(Counter(named).values()) == 1
    assert set(named) <= set(CONFIG_MAPPING_NAMES)
    assert family_of({"model_type": "xlnet"}).padding_side == "left"
    assert family_of({}).padding_side == "right"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"model_type": "layoutlmv3", "max_position_embeddings": 514, "pad_token_id": 1}, 512),
        ({"model_type": "mpt", "max_seq_len": 2048}, 2048),
        ({"model_type": "big_bird", "max_position_embeddings": 4096, "attention_type": "original_full"}, 4096),
        (
            {
                "model_type": "big_bird",
                "max_position_embeddings": 4096,
                "attention_type": "block_sparse",
                "num_random_blocks": 3,
                "block_size": 64,
            },
            704,
        ),
    ],
    ids=["nested", "layoutlmv3", "mpt", "full attention", "sparse attention"],
)
def test_the_true_maximum_follows_the_family(config: dict[str, object], expected: int) -> None:
    assert true_max_length(config) == expected


def test_heads_that_read_the_end_of_sequence_count_it() -> None:
    assert counted_id({"model_type": "bart", "eos_token_id": 2}) == 2
    assert counted_id({"model_type": "t5", "eos_token_id": 1}) == 1
    assert counted_id({"model_type": "bert", "eos_token_id": 2}) is None


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 3)), min_size=1, max_size=30),
)
def test_rows_of_different_kinds_never_share_a_batch(rows: list[tuple[int, int]]) -> None:
    lengths, kinds = [length for length, _ in rows], [kind for _, kind in rows]
    found = assign(lengths, LADDER, kinds=kinds)
    assert sorted(row for one in found for row in one.rows) == list(range(len(rows)))
    assert all(len({kinds[row] for row in one.rows}) == 1 for one in found)
    assert all(lengths[row] <= one.bucket.length for one in found for row in one.rows)


@settings(deadline=None)
@given(st.lists(st.integers(1, 8), min_size=1, max_size=3), st.sampled_from(["left", "right"]))
def test_padding_goes_to_the_familys_side_and_comes_off_again(lengths: list[int], side) -> None:
    signature = Signature(
        inputs=(InputSpec(name="input_ids", dtype="int64", axes=("row", "token"), pad_id=3),),
        outputs=(OutputSpec(name="echo", dtype="int64", axes=("row", "token")),),
        padding_side=side,
    )
    rows = [tuple(100 * row + place for place in range(length)) for row, length in enumerate(lengths, 1)]
    assignment = Assignment(bucket=Bucket(batch_size=3, extent=(8,)), rows=tuple(range(len(rows))))
    batch = pad(Features(lengths=tuple(lengths), columns={"input_ids": rows}), assignment, signature)
    filler = [3] * (8 - lengths[0])
    first = batch.arrays["input_ids"][0].tolist()
    assert first == ([*filler, *rows[0]] if side == "left" else [*rows[0], *filler])
    back = unpad(batch, {"echo": batch.arrays["input_ids"]}, signature)
    assert [tuple(back[row]["echo"].tolist()) for row in range(len(rows))] == rows


def test_a_row_without_the_token_that_the_head_reads_is_refused(tmp_path: Path) -> None:
    artifact = fake_artifact(tmp_path / "fake", make_ladder([8], batch_sizes=[1, 4]))
    manifest = replace(artifact.manifest, signature=replace(artifact.manifest.signature, counted_id=2))
    (artifact.folder / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    runner = Runner(open_artifact(artifact.folder), RunOptions(), engine=fake_engine)
    good = probe_features([(1, 5, 2), (1, 5, 2, 2), (1, 6, 2)])
    assert [row["logits"].tolist() for row in runner.run(good)] == [[8.0, 3.0], [10.0, 4.0], [9.0, 3.0]]
    assert runner.stats()["buckets"]["b1_s8"]["batches"] + runner.stats()["buckets"]["b4_s8"]["batches"] == 2
    with pytest.raises(InputError, match="input 1 has no token 2, the end of sequence that this model's head reads"):
        runner.run(probe_features([(1, 5, 2), (1, 5, 5)]))


def test_pairs_and_single_texts_of_a_bart_share_no_batch_and_get_torchs_answer(tmp_path: Path) -> None:
    import torch
    from transformers import BartConfig, BartForSequenceClassification, PreTrainedTokenizerFast

    from hf_bucket import BucketedModelForSequenceClassification

    from conftest import WORDS, text_of, tiny_tokenizer  # isort: skip

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=4 + len(WORDS),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=3,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        init_std=0.5,
    )
    model = BartForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(),
        pad_token="[PAD]",
        unk_token="[UNK]",
        eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.save_pretrained(tmp_path)
    bucketed = BucketedModelForSequenceClassification.from_pretrained(tmp_path, buckets=[(4, 16)])
    texts = [text_of(3), (text_of(4), text_of(2)), text_of(7), (text_of(1), text_of(5))]
    found = np.array([row["logits"] for row in bucketed.runner(texts)])
    with torch.inference_mode():
        alone = [
            model(**tokenizer(*([text] if isinstance(text, str) else text), return_tensors="pt")).logits[0]
            for text in texts
        ]
    assert np.abs(found - torch.stack(alone).numpy()).max() < 1e-4
