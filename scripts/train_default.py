"""Train the small classifier that ships in ``hf_bucket/default``: a sentiment teacher distilled into a tiny BERT.

python scripts/train_default.py --data ../shared/data/glue/sst2 --teacher ../shared/models/minilm-sst2 --output DIR

The teacher labels the train split and texts made from it; the student learns its logits and the split's own labels.
Nothing is downloaded. The validation split is read once, after the model is saved.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn import functional
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

LABELS = ("negative", "positive")
NO_LABEL = -100  # torch's own mark for a row without a label
UNK, CLS, SEP, MASK, PAD = SPECIAL = ("[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]")

# Two phrases in one sentence, so that the student meets contrast and negation more often than in the train split.
FRAMES = (
    "{} , but {}",
    "{} and {}",
    "{} . {}",
    "although {} , {}",
    "{} , not {}",
    "{} , which is {}",
    "it is n't {} , it 's {}",
    "i expected {} ; it was {}",
)

# The treebank writes "does n't" and "it 's" where people write "doesn't" and "it's".
SPELLINGS = ((" n't", "n't"), (" '", "'"), (" ,", ","), (" .", "."), (" ;", ";"), ("-lrb- ", "("), (" -rrb-", ")"))

# What the treebank never contains, as it would write it.
TYPOGRAPHY = (
    ("\N{LEFT SINGLE QUOTATION MARK}", "'"),
    ("\N{RIGHT SINGLE QUOTATION MARK}", "'"),
    ("\N{LEFT DOUBLE QUOTATION MARK}", '"'),
    ("\N{RIGHT DOUBLE QUOTATION MARK}", '"'),
    ("\N{EN DASH}", "-"),
    ("\N{EM DASH}", "--"),
    ("\N{HORIZONTAL ELLIPSIS}", "..."),
)

Say = Callable[[str], None]
TokenIds = list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Everything that shapes the result, beside the data and the teacher."""

    seed: int = 0
    epochs: int = 6
    vocabulary: int = 10_000
    min_count: int = 8  # a piece seen less often in the train split yields its place to a common word
    width: int = 128
    inner_width: int = 256
    layers: int = 2
    heads: int = 4
    positions: int = 512
    dropout: float = 0.1
    substituted: int = 40_000  # made texts: some words swapped for random ones
    framed: int = 40_000  # made texts: two phrases in a frame
    documents: int = 1_000  # long texts per epoch, up to ``positions`` tokens
    batch_rows: int = 192
    batch_tokens: int = 4_096
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    temperature: float = 2.0
    hard_weight: float = 0.3  # share of the loss that the split's own labels get, in [0, 1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Rows to learn from.

    Shape: ``logits`` (row, label) of the teacher; ``labels`` (row,), ``NO_LABEL`` where only the teacher knows.
    """

    ids: list[TokenIds]
    logits: torch.Tensor
    labels: torch.Tensor


def main(arguments: Sequence[str]) -> int:
    """Train, save, reload, report; return the exit status."""
    options = make_parser().parse_args(arguments)
    recipe = replace(Recipe(), seed=options.seed, epochs=options.epochs)
    started = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - started:6.0f} s] {line}", flush=True)

    torch.set_num_threads(options.threads)
    train(recipe, read_split(options.data, "train"), options.teacher, options.output, say)
    accuracy, rows = evaluate(options.output, read_split(options.data, "validation"))
    say(f"validation accuracy {accuracy:.4f} (n={rows}), float32, reloaded from {options.output}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="train_default.py", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder with SST-2's train.parquet and validation.parquet")
    add("--teacher", required=True, type=Path, help="folder of a fine-tuned BERT classifier with the same labels")
    add("--output", required=True, type=Path, help="folder to write the checkpoint to")
    add("--seed", type=int, default=Recipe().seed)
    add("--epochs", type=int, default=Recipe().epochs)
    add("--threads", type=int, default=2, help="of torch (default 2)")
    return parser


def read_split(folder: Path, split: str) -> pd.DataFrame:
    """Return the columns ``sentence`` and ``label`` of one split."""
    return pd.read_parquet(folder / f"{split}.parquet", columns=["sentence", "label"])


def train(recipe: Recipe, split: pd.DataFrame, teacher_folder: Path, output: Path, say: Say) -> None:
    """Distil the teacher on ``split`` and save the student in float16."""
    set_seed(recipe.seed)
    rng = random.Random(recipe.seed)
    texts = [text.strip() for text in split["sentence"]]
    teacher = AutoModelForSequenceClassification.from_pretrained(teacher_folder, dtype=torch.float32).eval()
    teacher_tokenizer = read_tokenizer(teacher_folder)
    tokenizer = make_tokenizer(recipe, teacher_tokenizer, texts)
    say(f"vocabulary of {tokenizer.get_vocab_size()} pieces from {len(texts)} texts")

    made = make_texts(recipe, texts, whole_words(tokenizer), rng)
    everything = texts + made
    labels = torch.tensor([*split["label"], *[NO_LABEL] * len(made)])
    logits = teacher_logits(teacher, teacher_tokenizer, everything, say)
    student = make_student(recipe, teacher, teacher_tokenizer, tokenizer)
    say(f"student of {student.num_parameters()} parameters; {len(texts)} texts and {len(made)} made from them")

    treebank = Examples(ids=encode(tokenizer, everything), logits=logits, labels=labels)
    written = replace(treebank, ids=encode(tokenizer, [as_written(text) for text in everything]))
    fit(recipe, student, (treebank, written), tokenizer, rng, say)
    save(student, tokenizer, output)


def set_seed(seed: int) -> None:
    """Make torch repeat itself."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a check that costs a tenth of the time


# --- texts and tokens ---


def read_tokenizer(folder: Path) -> Tokenizer:
    """Return a saved tokenizer without the truncation and padding of whoever saved it."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def make_tokenizer(recipe: Recipe, teacher: Tokenizer, texts: Sequence[str]) -> Tokenizer:
    """Return a lower-casing WordPiece tokenizer whose pieces are the teacher's most useful ones.

    Those are the characters, what ``texts`` use often, and then English words by the teacher's order, which is their
    frequency: common words that the train split lacks keep an embedding of their own.
    """
    counts = Counter(token for encoding in teacher.encode_batch(list(texts)) for token in encoding.tokens)
    order = sorted(teacher.get_vocab(), key=teacher.get_vocab().__getitem__)
    characters = [piece for piece in order if len(piece.removeprefix("##")) == 1 and piece.isascii()]
    frequent = [piece for piece, count in counts.most_common() if count >= recipe.min_count]
    words = [piece for piece in order if piece.isalpha() and piece.isascii()]
    pieces = dict.fromkeys([*SPECIAL, *characters, *frequent, *words])
    vocabulary = {piece: number for number, piece in enumerate(list(pieces)[: recipe.vocabulary])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK, max_input_chars_per_word=100))
    plain = [normalizers.Replace(typographic, typed) for typographic, typed in TYPOGRAPHY]
    tokenizer.normalizer = normalizers.Sequence([*plain, normalizers.BertNormalizer(lowercase=True)])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(CLS, vocabulary[CLS]), (SEP, vocabulary[SEP])],
    )
    return tokenizer


def whole_words(tokenizer: Tokenizer) -> list[str]:
    """Return the words of the vocabulary that are one piece, in the order of their ids."""
    vocabulary = tokenizer.get_vocab()
    return [piece for piece in sorted(vocabulary, key=vocabulary.__getitem__) if piece.isalpha() and len(piece) > 1]


def make_texts(recipe: Recipe, texts: Sequence[str], words: Sequence[str], rng: random.Random) -> list[str]:
    """Return texts that the train split does not hold, for the teacher to label."""
    substituted = [substitute(rng.choice(texts), words, rng) for _ in range(recipe.substituted)]
    phrases = [text for text in texts if 2 <= len(text.split()) <= 12]
    framed = [rng.choice(FRAMES).format(rng.choice(phrases), rng.choice(phrases)) for _ in range(recipe.framed)]
    return [*words, *substituted, *framed]


def substitute(text: str, words: Sequence[str], rng: random.Random, *, share: float = 0.25) -> str:
    """Return ``text`` with about ``share`` of its words swapped for random ones."""
    return " ".join(rng.choice(words) if rng.random() < share else word for word in text.split())


def as_written(text: str) -> str:
    """Return a text of the treebank as a person would write it."""
    for treebank, written in SPELLINGS:
        text = text.replace(treebank, written)
    return text


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[TokenIds]:
    """Return the token ids of each text, without special tokens."""
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def pad(rows: Sequence[TokenIds], cls_id: int, sep_id: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Return a batch, padded on the right; Shape: (row, token) each."""
    ids = torch.full((len(rows), max(map(len, rows)) + 2), pad_id)
    for line, row in zip(ids, rows, strict=True):
        line[: len(row) + 2] = torch.tensor([cls_id, *row, sep_id])
    lengths = torch.tensor([len(row) + 2 for row in rows])
    mask = torch.arange(ids.shape[1])[None, :] < lengths[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


def special_ids(tokenizer: Tokenizer) -> tuple[int, int, int]:
    """Return the ids of CLS, SEP and PAD."""
    vocabulary = tokenizer.get_vocab()
    return vocabulary[CLS], vocabulary[SEP], vocabulary[PAD]


def batches(lengths: Sequence[int], max_rows: int, max_tokens: int, rng: random.Random) -> list[list[int]]:
    """Return row numbers in batches of like length, at most ``max_tokens`` cells each, in random order."""
    order = sorted(range(len(lengths)), key=lambda row: lengths[row] + rng.random())
    found: list[list[int]] = [[]]
    for row in order:  # ascending: this row is the longest of its batch so far
        if len(found[-1]) == max_rows or (len(found[-1]) + 1) * (lengths[row] + 2) > max_tokens:
            found.append([])
        found[-1].append(row)
    found = [batch for batch in found if batch]
    rng.shuffle(found)
    return found


# --- teacher and student ---


@torch.inference_mode()
def teacher_logits(teacher: PreTrainedModel, tokenizer: Tokenizer, texts: Sequence[str], say: Say) -> torch.Tensor:
    """Return the teacher's logits; Shape: (text, label)."""
    ids = encode(tokenizer, texts)
    found = torch.empty(len(texts), len(LABELS))
    todo = batches([len(row) for row in ids], 256, 8_192, random.Random(0))
    for number, batch in enumerate(todo, 1):
        found[batch] = teacher(**pad([ids[row] for row in batch], *special_ids(tokenizer))).logits
        if number % 100 == 0 or number == len(todo):
            say(f"teacher: {number}/{len(todo)} batches")
    return found


def make_student(
    recipe: Recipe, teacher: PreTrainedModel, teacher_tokenizer: Tokenizer, tokenizer: Tokenizer
) -> BertForSequenceClassification:
    """Return a small BERT whose word and position embeddings are the teacher's, projected."""
    student = BertForSequenceClassification(
        BertConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=recipe.inner_width,
            max_position_embeddings=recipe.positions,
            hidden_dropout_prob=recipe.dropout,
            attention_probs_dropout_prob=0.0,  # dropout here is slow on CPU,
            pad_token_id=tokenizer.token_to_id(PAD),
            id2label=dict(enumerate(LABELS)),
            label2id={label: number for number, label in enumerate(LABELS)},
            problem_type="single_label_classification",
        )
    )
    source, target = teacher.base_model.embeddings, student.bert.embeddings
    order = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    with torch.no_grad():
        words = source.word_embeddings.weight[[teacher_tokenizer.token_to_id(piece) for piece in order]]
        basis = principal_axes(words, recipe.width)
        target.word_embeddings.weight.copy_((words - words.mean(0)) @ basis)
        places = source.position_embeddings.weight[: recipe.positions]
        target.position_embeddings.weight.copy_((places - places.mean(0)) @ basis)
        target.token_type_embeddings.weight.zero_()
    return student


def principal_axes(vectors: torch.Tensor, n_axes: int) -> torch.Tensor:
    """Return the directions in which ``vectors`` vary most; Shape: (row, width) -> (width, n_axes)."""
    centred = vectors - vectors.mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return directions.flip(1)[:, :n_axes]


# --- training ---


def fit(
    recipe: Recipe,
    student: BertForSequenceClassification,
    spellings: tuple[Examples, Examples],
    tokenizer: Tokenizer,
    rng: random.Random,
    say: Say,
) -> None:
    """Train ``student`` in place: every row once per epoch in one of its two spellings, and new long texts."""
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    student.train()
    for epoch in range(recipe.epochs):
        examples = mix(spellings, rng)
        long = make_documents(recipe, examples, tokenizer.token_to_id("."), rng)
        examples = Examples(
            ids=examples.ids + long.ids,
            logits=torch.cat([examples.logits, long.logits]),
            labels=torch.cat([examples.labels, long.labels]),
        )
        todo = batches([len(row) for row in examples.ids], recipe.batch_rows, recipe.batch_tokens, rng)
        total = 0.0
        for number, batch in enumerate(todo):
            set_rate(optimizer, recipe, epoch + number / len(todo))
            total += step(recipe, student, optimizer, examples, batch, special_ids(tokenizer))
        say(f"epoch {epoch + 1}/{recipe.epochs}: loss {total / len(todo):.4f} over {len(todo)} batches")
    student.eval()


def mix(spellings: tuple[Examples, Examples], rng: random.Random) -> Examples:
    """Return every row once, in one spelling or the other."""
    pairs = zip(spellings[0].ids, spellings[1].ids, strict=True)
    return replace(spellings[0], ids=[pair[rng.random() < 0.5] for pair in pairs])


def make_documents(recipe: Recipe, examples: Examples, stop_id: int, rng: random.Random) -> Examples:
    """Return long texts made of phrases of the train split, so that no position is left untrained.

    A document leans to one side, as reviews do; its logits are the mean of its phrases'.
    """
    sides: tuple[list[int], ...] = ([], [])
    for row, label in enumerate(examples.labels.tolist()):
        if label != NO_LABEL and len(examples.ids[row]) >= 6:
            sides[label].append(row)
    made = [make_document(recipe, examples.ids, sides, stop_id, rng) for _ in range(recipe.documents)]
    return Examples(
        ids=[ids for ids, _ in made],
        logits=torch.stack([examples.logits[rows].mean(0) for _, rows in made]),
        labels=torch.full((len(made),), NO_LABEL),
    )


def make_document(
    recipe: Recipe, ids: Sequence[TokenIds], sides: Sequence[Sequence[int]], stop_id: int, rng: random.Random
) -> tuple[TokenIds, list[int]]:
    """Return one document's token ids and the rows it was made of."""
    positive = rng.random()
    room = rng.randint(32, recipe.positions - 2)
    document: TokenIds = []
    rows: list[int] = []
    while not rows or len(document) < room:
        rows.append(rng.choice(sides[rng.random() < positive]))
        document += [*ids[rows[-1]], stop_id]
    return document[: recipe.positions - 2], rows


def set_rate(optimizer: torch.optim.Optimizer, recipe: Recipe, epoch: float) -> None:
    """Warm up over half an epoch, then fall to zero in a line."""
    factor = min(epoch / 0.5, (recipe.epochs - epoch) / (recipe.epochs - 0.5)) if epoch < recipe.epochs else 0.0
    for group in optimizer.param_groups:
        group["lr"] = recipe.learning_rate * factor


def step(
    recipe: Recipe,
    student: BertForSequenceClassification,
    optimizer: torch.optim.Optimizer,
    examples: Examples,
    batch: Sequence[int],
    specials: tuple[int, int, int],
) -> float:
    """Take one step and return the loss before it."""
    logits = student(**pad([examples.ids[row] for row in batch], *specials)).logits
    loss = distillation_loss(recipe, logits, examples.logits[batch], examples.labels[batch])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def distillation_loss(
    recipe: Recipe, logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Return the loss of Hinton et al. (2015, arXiv 1503.02531): softened teacher, and labels where there are any.

    Shape: ``logits`` and ``teacher`` (row, label), ``labels`` (row,) -> ().
    """
    heat = recipe.temperature
    soft = (
        functional.kl_div(
            functional.log_softmax(logits / heat, -1), functional.softmax(teacher / heat, -1), reduction="none"
        ).sum(-1)
        * heat**2
    )
    hard = functional.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
    weight = torch.where(labels == NO_LABEL, 0.0, recipe.hard_weight)
    return ((1 - weight) * soft + weight * hard).mean()


# --- saving and measuring ---


def save(student: BertForSequenceClassification, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the checkpoint in float16 and its tokenizer."""
    student.half().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
        pad_token=PAD,
        padding_side="right",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        model_max_length=student.config.max_position_embeddings,
    ).save_pretrained(folder)


@torch.inference_mode()
def evaluate(folder: Path, split: pd.DataFrame) -> tuple[float, int]:
    """Return a saved checkpoint's accuracy in float32, and the number of rows."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    right = 0
    for text, label in zip(split["sentence"], split["label"], strict=True):
        logits = model(**tokenizer(text, truncation=True, return_tensors="pt")).logits
        right += int(logits.argmax()) == label
    return right / len(split), len(split)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
