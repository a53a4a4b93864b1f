"""Try every model type that transformers can classify sequences with: tiny random models, every row against torch.

python scripts/architectures.py                          # all of them; takes up where it was stopped
python scripts/architectures.py --only bert,roberta --again

Each type is built from its config class, compiled for a few buckets and run through all of them; nothing is downloaded.
The results go to a JSON file of one line per type and to docs/architectures.md.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_bucket.assign import Assignment
from hf_bucket.batch import Features, pad, unpad
from hf_bucket.compile import CompileOptions, compile_model
from hf_bucket.errors import BucketError
from hf_bucket.families import true_max_length
from hf_bucket.runner import Runner, RunOptions
from hf_bucket.session_ort import EngineOptions, Mode, open_sessions
from hf_bucket.source import Source

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE = ROOT / "benchmarks/results/architectures.jsonl", ROOT / "docs/architectures.md"
Row = tuple[int, ...]  # token ids
Logits = NDArray[Any]  # of floats; shape (row, label), or (label,) of one row
Say = Callable[[str], None]

# --- what a tiny model looks like ---

WORDS = 100  # ids of the tokenizer; larger ones are left to image tokens and the like
LABELS = 3
POSITIONS = 64
STANDARD_DEVIATION = 0.3  # of weight matrices, and of what is added to biases and norms: large enough to show a leak
SEED = 0

# Set wherever the config class has a parameter of that name.
SMALL: dict[str, object] = {
    "vocab_size": 128,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "embedding_size", "d_latents"), 32),
    **dict.fromkeys(("input_embedding_size", "output_embedding_size", "entity_emb_size"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_self_attention_heads", "num_cross_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads"), 2),
    "linear_num_value_heads": 4,
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers", "num_self_attends_per_block"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "d_inner"), 48),
    **dict.fromkeys(("dff", "hidden_dim", "n_inner", "ffn_hidden_size", "feed_forward_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("head_dim", "d_kv", "d_head", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "index_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "gated_norm_rank", "adapter_rank"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "index_topk"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), POSITIONS),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "index_n_heads", "n_group"), 2),
    **dict.fromkeys(("topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "local_attention", "window_size", "attention_window"), 8),
    **dict.fromkeys(("mamba_d_state", "chunk_size", "query_pre_attn_scalar"), 8),
    "use_mamba_kernels": False,
    **dict.fromkeys(("image_size", "input_size"), 32),
    "patch_size": 8,
    "entity_vocab_size": 16,
    "max_2d_position_embeddings": POSITIONS,
    "image_token_id": 120,
    "image_token_index": 120,
    "boi_token_index": 121,
    "eoi_token_index": 122,
    "video_token_id": 123,
    "vision_start_token_id": 124,
    "vision_end_token_id": 125,
}

# What single types need beside; a value for a part of the config (text_config) is a mapping of its own.
_LATENT = {"num_key_value_heads": 4}  # attention on a shared latent has no groups of heads
_HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
_WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
SPECIFIC: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v2", "deepseek_v3", "esmc", "minicpm3", "mistral4"), _LATENT),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), _HYBRID),
    **dict.fromkeys(("exaone4", "gemma3_text", "olmo3"), _WINDOWED),
    "gemma3": {"text_config": _WINDOWED},
    "qwen3_5": {"text_config": _HYBRID},
    "axk2": {**_LATENT, "index_n_heads": 16},  # with few heads many tokens tie, and any of them may be chosen
    "cohere_compass_text": {
        **_WINDOWED,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "esm": {"pad_token_id": 1, "mask_token_id": 99, "token_dropout": True},
    "funnel": {"block_sizes": [1, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lilt": {"hidden_size": 48},
    "markuplm": {"max_depth": 2, "xpath_unit_hidden_size": 8, "max_xpath_tag_unit_embeddings": 217},
    "perceiver": {"num_latents": 8},
    "reformer": {
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "t5": {"decoder_start_token_id": 0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}

SHORTEST = {"canine": 4, "funnel": 3}  # tokens that torch itself needs, where one is not enough


def tiny_config(model_type: str) -> Any:
    """Return the config of a tiny model of that type."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    return config_class(**tiny_values(config_class, SPECIFIC.get(model_type, {})), num_labels=LABELS)


def tiny_values(config_class: Any, specific: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of ``config_class`` for a tiny model; ``specific`` goes before ``SMALL``."""
    defaults = {name: one.default for name, one in inspect.signature(config_class.__init__).parameters.items()}
    values = {name: SMALL[name] for name in defaults if name in SMALL} | special_ids(defaults)
    declared = {name: part for name, part in config_class.sub_configs_defaults.items() if not part.optional}
    nested = {name: tiny_values(part_class(part), specific.get(name, {})) for name, part in declared.items()}
    return values | dict(specific) | nested


def part_class(declared: Any) -> Any:
    """Return the config class of a part of a config, such as ``text_config``, as transformers declares it."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[declared.model_type] if declared.model_type else declared.config_class


def special_ids(defaults: Mapping[str, object]) -> dict[str, int]:
    """Return ids for the special tokens that a config class names: its own where they are small, all different.

    An id that the class leaves open stays so: that is how such checkpoints come.
    """
    taken: set[int] = set()
    ids: dict[str, int] = {}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        default = defaults.get(name)
        if not isinstance(default, int):
            continue
        small = 0 <= default < 8 and default not in taken
        ids[name] = default if small else next(free for free in range(4) if free not in taken)
        taken.add(ids[name])
    return ids


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Ids of a tiny tokenizer.

    Attributes:
        head, tail: special tokens before and after a single text.
    """

    pad: int
    head: Row
    tail: Row

    @property
    def special(self) -> frozenset[int]:
        """Ids of no word."""
        return frozenset({self.pad, *self.head, *self.tail})

    @property
    def words(self) -> list[int]:
        """Ids of words, ascending."""
        return [number for number in range(WORDS) if number not in self.special]

    def row(self, length: int, generator: np.random.Generator) -> Row:
        """Return a row of that many tokens; one too short for its special tokens keeps the last of them."""
        frame = len(self.head) + len(self.tail)
        if length < frame:
            return (*self.head, *self.tail)[frame - length :]
        return (*self.head, *(int(word) for word in generator.choice(self.words, length - frame)), *self.tail)


def vocabulary_of(config: Any, *, reads_last: bool) -> Vocabulary:
    """Return the ids that rows of this model are made of: framed as the family does it, decoders not at all."""
    text = config.get_text_config()
    taken = {name: getattr(text, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    free = (number for number in range(8) if number not in taken.values())
    pad, start, end = (next(free) if value is None else value for value in taken.values())
    if reads_last:
        return Vocabulary(pad=pad, head=(), tail=())
    return Vocabulary(pad=pad, head=() if config.is_encoder_decoder else (start,), tail=(end,))


def make_tokenizer(vocabulary: Vocabulary, names: Sequence[str]) -> Any:
    """Return a fast tokenizer of one word per id."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = {f"w{number}": number for number in vocabulary.words}
    tokens |= {f"<{number}>": number for number in sorted(vocabulary.special)}
    unknown = f"w{vocabulary.words[0]}"
    backend = Tokenizer(models.WordLevel(tokens, unk_token=unknown))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [f"<{number}>" for number in sorted(vocabulary.special)]
    frame = [" ".join(f"<{number}>" for number in ids) for ids in (vocabulary.head, vocabulary.tail)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{frame[0]} $A {frame[1]}".strip(),
        pair=f"{frame[0]} $A $B {frame[1]}".strip(),
        special_tokens=[(token, tokens[token]) for token in special],
    )
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=f"<{vocabulary.pad}>", unk_token=unknown, model_input_names=list(names)
    )


def build(model_type: str) -> tuple[Any, Vocabulary]:
    """Return a tiny model of random weights, and the ids it reads."""
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_config(tiny_config(model_type)).float().eval()
    randomise(model)
    forwards = [vars(base)["forward"] for base in type(model).__mro__ if "forward" in vars(base)]
    reads_last = any("last_non_pad" in inspect.getsource(forward) for forward in forwards)
    return model, vocabulary_of(model.config, reads_last=reads_last)


def randomise(model: Any) -> None:
    """Give a model weights far from their first values; what starts at 1, such as a norm, stays about there."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for weight in model.parameters():
            noise = STANDARD_DEVIATION * torch.randn(weight.shape, generator=generator)
            weight.copy_(noise if weight.ndim > 1 else weight + noise)


def save(model: Any, vocabulary: Vocabulary, folder: Path) -> None:
    """Write the checkpoint and its tokenizer, which makes token types for models that have an embedding of them."""
    accepted = inspect.signature(model.forward).parameters
    typed = "token_type_ids" in accepted and getattr(model.config, "type_vocab_size", 0) > 0
    names = ["input_ids", *(["token_type_ids"] if typed else []), "attention_mask"]
    model.save_pretrained(folder)
    make_tokenizer(vocabulary, names).save_pretrained(folder)


# --- rows, and torch's answers ---

EDGES = (5, 19, 33)  # lengths of buckets below the maximum; none is a multiple of 8
BATCH_SIZES = (1, 3)
TOLERANCE = 1e-4  # of the spread of the logits
LEAST_SPREAD = 0.1


def row_lengths(edges: Sequence[int], shortest: int = 1) -> list[int]:
    """Return every class of length for these buckets: the shortest, and one under, exact and one over each edge."""
    around = {edge + step for edge in edges for step in (-1, 0, 1)}
    return sorted(length for length in {shortest} | around if shortest <= length <= max(edges))


def torch_logits(model: Any, rows: Sequence[Row]) -> Logits:
    """Return torch's answers, every row alone and without padding. Shape: (row, label)."""
    return np.array([padded_logits(model, row, len(row), 0, "right") for row in rows])


def padded_logits(model: Any, row: Row, length: int, pad: int, side: str) -> Logits:
    """Return torch's answer to one row padded to ``length`` on one side, the padding masked. Shape: (label,)."""
    import torch

    fill = length - len(row)
    before, after = (fill, 0) if side == "left" else (0, fill)
    ids = torch.tensor([[*[pad] * before, *row, *[pad] * after]])
    mask = torch.tensor([[*[0] * before, *[1] * len(row), *[0] * after]])
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[0].double().numpy()  # type: ignore[no-any-return]


def movement(model: Any, rows: Sequence[Row], expected: Logits, pad: int, side: str) -> float:
    """Return how far padding on one side to the longest row's length moves torch's own logits."""
    longest = max(map(len, rows))
    moved = [padded_logits(model, row, longest, pad, side) for row in rows]
    return largest_difference(np.array(moved), expected)


def largest_difference(got: Logits, expected: Logits) -> float:
    """Return the largest difference of a logit; infinity where one is no number."""
    with np.errstate(invalid="ignore"):
        difference = float(np.abs(got - expected).max(initial=0.0))
    return difference if np.isfinite(difference) else float("inf")


def spread_of(logits: Logits) -> float:
    """Return how far the logits of one label lie apart over the rows, for the label where they do most."""
    return float((logits.max(axis=0) - logits.min(axis=0)).max())


# --- one model type ---

VERDICTS = ("same", "leaks", "refused", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What was found about one model type.

    Attributes:
        verdict: ``same``: every row's logits are unpadded torch's; ``leaks``: torch's own logits change when a row is
            padded, and hf_bucket refuses the model; ``refused``: hf_bucket refuses it for another reason; ``failed``:
            none of these, so something is wrong.
        difference: largest difference of a logit between hf_bucket and torch; None where nothing was compiled.
        spread: how far the logits of one label lie apart over the rows.
        moved: how far padding on the right, on the left, moves torch's own logits.
        max_length: the true maximum as hf_bucket has it; None where there is no limit.
        runs: rows compared.
        reason: why it was refused or failed.
        versions: of the packages it was found with.
    """

    model_type: str
    verdict: str
    difference: float | None = None
    spread: float | None = None
    moved: Mapping[str, float] = field(default_factory=dict)
    max_length: int | None = None
    runs: int = 0
    reason: str = ""
    seconds: float = 0.0
    versions: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"verdict must be one of {', '.join(VERDICTS)}, got {self.verdict!r}")


def judge(*, difference: float | None, moved: float, spread: float, reason: str) -> tuple[str, str]:
    """Return the verdict on a model that was built, and its reason.

    Args:
        difference: between hf_bucket and torch; None where hf_bucket refused the model, for ``reason``.
        moved: how far padding moves torch's own logits, on the side where it does less.
    """
    allowed = TOLERANCE * spread
    if not spread >= LEAST_SPREAD:
        return "failed", f"the logits of different rows differ by {spread:.2g} only, so that a leak could not be seen"
    if difference is None:
        return ("leaks" if moved > allowed else "refused"), reason
    if difference <= allowed:
        return "same", ""
    return "failed", f"hf_bucket took the model, but a logit differs from torch's by {difference:.2g}"


def examine(model_type: str, folder: Path) -> Finding:
    """Return what is found about one model type; ``folder`` takes its checkpoint."""
    try:
        model, vocabulary = build(model_type)
    except ImportError as error:
        return Finding(model_type=model_type, verdict="refused", reason=f"transformers: {first_line(error)}")
    save(model, vocabulary, folder)
    max_length = true_max_length(model.config.to_dict())
    edges = (*EDGES, POSITIONS if max_length is None else max_length)
    generator = np.random.default_rng(SEED)
    rows = [vocabulary.row(length, generator) for length in row_lengths(edges, SHORTEST.get(model_type, 1))]
    name_padding(model, vocabulary.pad)
    expected = torch_logits(model, rows)
    moved = {side: movement(model, rows, expected, vocabulary.pad, side) for side in ("right", "left")}
    difference, runs, reason = None, 0, ""
    try:
        difference, runs = compare(folder, edges, rows, expected)
    except BucketError as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
    spread = spread_of(expected)
    verdict, reason = judge(difference=difference, moved=min(moved.values()), spread=spread, reason=reason)
    return Finding(
        model_type=model_type,
        verdict=verdict,
        difference=difference,
        spread=spread,
        moved=moved,
        max_length=max_length,
        runs=runs,
        reason=reason,
    )


def name_padding(model: Any, pad: int) -> None:
    """Tell a model without a pad token which id it is; heads that look for the last real token need it."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = pad


def compare(folder: Path, edges: Sequence[int], rows: Sequence[Row], expected: Logits) -> tuple[float, int]:
    """Compile a checkpoint, run every row through every bucket it fits, and return the largest difference and the runs.

    Both kinds of session are tried, and the main path, which chooses the buckets itself.

    Raises:
        BucketError: hf_bucket refuses the model.
    """
    options = CompileOptions(buckets=list(edges), batch_sizes=list(BATCH_SIZES))
    artifact = compile_model(Source(name=str(folder)), options, report=lambda line: None)
    features = features_of(rows)
    got: list[tuple[int, Logits]] = []
    modes: tuple[Mode, ...] = ("shared", "static")
    for mode in modes:
        runner = Runner(artifact, RunOptions(engine=EngineOptions(mode=mode, threads=1)))
        got += enumerate(result["logits"] for result in runner.run(features))
        got += run_every_bucket(runner, features)
        runner.close()
    return max(largest_difference(logits, expected[row]) for row, logits in got), len(got)


def features_of(rows: Sequence[Row]) -> Features:
    """Return rows of token ids as the main path takes them."""
    columns: dict[str, Sequence[Sequence[int]]] = {
        "input_ids": rows,
        "attention_mask": [[1] * len(row) for row in rows],
        "token_type_ids": [[0] * len(row) for row in rows],
    }
    return Features(lengths=tuple(map(len, rows)), columns=columns)


def run_every_bucket(runner: Runner, features: Features) -> list[tuple[int, Logits]]:
    """Return every row's logits from every bucket that holds it, once alone and once among other rows."""
    found: list[tuple[int, Logits]] = []
    sessions = open_sessions(runner.artifact, runner.options.engine)
    for bucket in runner.ladder:
        fitting = [row for row, length in enumerate(features.lengths) if length <= bucket.length]
        for rows in batches(fitting, bucket.batch_size):
            batch = pad(features, Assignment(bucket=bucket, rows=rows), runner.signature)
            results = unpad(batch, sessions[bucket].run(batch.arrays), runner.signature)
            found += [(row, result["logits"]) for row, result in results.items()]
    return found


def batches(rows: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Return every row alone, and batches that mix short rows with long ones."""
    mixed = [*rows[::2], *rows[1::2][::-1]]
    together = [tuple(mixed[start : start + size]) for start in range(0, len(mixed), size)] if size > 1 else []
    return [*((row,) for row in rows), *together]


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


# --- all of them ---

PACKAGES = ("hf-bucket", "transformers", "torch", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    only: tuple[str, ...]
    again: bool
    jobs: int
    timeout_s: float
    results: Path
    output: Path
    child: Path | None


def main(arguments: Sequence[str]) -> int:
    """Return 0 when no model type failed, else 1."""
    options = parse(arguments)
    if options.child is not None:
        return run_child(options.only[0], options.child)
    known = model_types()
    unknown = sorted(set(options.only) - set(known))
    if unknown:
        print(f"transformers classifies sequences with no {', '.join(unknown)}; it does with {', '.join(known)}")
        return 2
    chosen = [name for name in known if not options.only or name in options.only]
    finished = {name for name, finding in read(options.results).items() if finding.verdict != "failed"}
    todo = [name for name in chosen if options.again or name not in finished]
    if len(todo) < len(chosen):
        print(f"{len(chosen) - len(todo)} of {len(chosen)} have a result already; --again tries them once more")
    for finding in run_all(todo, options, say=lambda line: print(line, flush=True)):
        append(finding, options.results)
    found = read(options.results)
    findings = [found[name] for name in known if name in found]
    write(findings, options.results)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(report(findings, total=len(known), where=hardware()), encoding="utf-8")
    return 1 if any(finding.verdict == "failed" for finding in findings) else 0


def parse(arguments: Sequence[str]) -> Options:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--only", help="model types, separated by commas; all of them by default")
    add("--again", action="store_true", help="try those that have a result again")
    add(
        "--jobs",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=2,
        help="processes at once (default: 2)",
    )
    add("--timeout", type=float, default=600, help="seconds one model type may take (default: 600)")
    add("--results", type=Path, default=RESULTS, help="file of one line per type (default: %(default)s)")
    add("--output", type=Path, default=PAGE, help="page to write (default: %(default)s)")
    add("--child", type=Path, help=argparse.SUPPRESS)  # a process of its own: try one type in this folder
    given = parser.parse_args(arguments)
    only = tuple(name.strip() for name in (given.only or "").split(",") if name.strip())
    if given.only is not None and not only:
        parser.error("--only names no model type")
    return Options(
        only=only,
        again=given.again,
        jobs=given.jobs,
        timeout_s=given.timeout,
        results=given.results,
        output=given.output,
        child=given.child,
    )


def model_types() -> list[str]:
    """Return every model type that transformers can classify sequences with."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    return list(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)


def run_all(todo: Sequence[str], options: Options, say: Say) -> Iterable[Finding]:
    """Yield a finding per model type as it comes; each worker keeps to a core, so that two do not share one."""
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    usable = sorted(os.sched_getaffinity(0))
    for job in range(options.jobs):
        cores.put(usable[job % len(usable)])
    started = time.perf_counter()
    with ThreadPoolExecutor(options.jobs, initializer=lambda: os.sched_setaffinity(0, {cores.get()})) as workers:
        running = [workers.submit(run_one, model_type, options.timeout_s) for model_type in todo]
        for count, done in enumerate(as_completed(running), 1):
            finding = done.result()
            elapsed = time.perf_counter() - started
            say(progress(finding, count, len(todo), left_s=elapsed / count * (len(todo) - count)))
            yield finding


def progress(finding: Finding, count: int, total: int, *, left_s: float) -> str:
    """Return the line that tells what was found last, and how long the rest will take."""
    what = finding.verdict if finding.difference is None else f"{finding.verdict}, {finding.difference:.1e} off"
    return f"[{count}/{total}] {finding.model_type}: {what} ({finding.seconds:.0f} s); about {left_s / 60:.0f} min left"


def run_one(model_type: str, timeout_s: float) -> Finding:
    """Try one model type in a process and a folder of its own."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as name:
        finding = _run_child(model_type, Path(name), timeout_s)
    return replace(finding, seconds=round(time.perf_counter() - started, 1), versions=versions())


def _run_child(model_type: str, folder: Path, timeout_s: float) -> Finding:
    own = {"HF_BUCKET_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--only", model_type, "--child", str(folder)]
    log = folder / "log"
    try:
        with log.open("wb") as output:
            subprocess.run(command, env=os.environ | own, stdout=output, stderr=output, timeout=timeout_s, check=True)
    except subprocess.TimeoutExpired:
        return Finding(model_type=model_type, verdict="failed", reason=f"it took more than {timeout_s:.0f} s")
    except subprocess.CalledProcessError as error:
        lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return Finding(
            model_type=model_type, verdict="failed", reason=lines[-1] if lines else f"exit status {error.returncode}"
        )
    return read(folder / "finding.jsonl")[model_type]


def run_child(model_type: str, folder: Path) -> int:
    """Try one model type here, and leave the finding in ``folder``."""
    import torch

    torch.set_num_threads(1)
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    append(examine(model_type, checkpoint), folder / "finding.jsonl")
    return 0


# --- results ---


def read(path: Path) -> dict[str, Finding]:
    """Return the last finding of every model type in a file of one JSON object per line; none without a file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    findings = (Finding(**json.loads(line)) for line in lines if line.strip())
    return {finding.model_type: finding for finding in findings}


def append(finding: Finding, path: Path) -> None:
    """Write one more line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(finding)) + "\n")


def write(findings: Sequence[Finding], path: Path) -> None:
    """Write the file anew, one line per model type."""
    aside = path.with_suffix(".new")
    aside.write_text("".join(json.dumps(asdict(finding)) + "\n" for finding in findings), encoding="utf-8")
    aside.replace(path)


def versions() -> str:
    """Return the packages a finding depends on."""
    return ", ".join(f"{package} {version(package)}" for package in PACKAGES)


def hardware() -> str:
    """Return the processor and how many cores of it this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} cores of {names[0] if names else platform.machine()}"


HEADINGS = {
    "same": "The logits are those of the unpadded model in torch, whichever bucket a row went through and whatever "
    "shared its batch.",
    "leaks": "torch's own logits change when the same row is padded, its padding masked. No bucket could give the "
    "unpadded answer, so hf_bucket refuses these models.",
    "refused": "Other models that hf_bucket refuses, or that transformers cannot build here.",
    "failed": "Something is wrong here.",
}


def report(findings: Sequence[Finding], *, total: int, where: str) -> str:
    """Return ``docs/architectures.md``."""
    groups = {verdict: [one for one in findings if one.verdict == verdict] for verdict in VERDICTS}
    counts = ", ".join(f"{len(group)} {verdict}" for verdict, group in groups.items() if group)
    runs = sorted(finding.runs for finding in findings if finding.runs) or [0]
    lines = [
        "# Architectures",
        "",
        f"Every model type that transformers can classify sequences with: {counts} (of {total}).",
        "",
        f"Each is a tiny model of random weights (standard deviation {STANDARD_DEVIATION}, seed {SEED}), compiled for",
        f"lengths {', '.join(map(str, EDGES))} and its maximum, in batches of {' and '.join(map(str, BATCH_SIZES))}.",
        "Rows of 1 token, and one under, exact and one over every length, go through every bucket that holds them,",
        f"alone and mixed, on both kinds of session: {runs[0]} to {runs[-1]} runs per type. A logit may differ from",
        f"torch's by {TOLERANCE:g} of the spread: how far the logits of one label lie apart over the rows.",
        "",
        "    python scripts/architectures.py",
        "",
        f"On {where}, one core per type, {sum(one.seconds for one in findings) / 60:.0f} minutes of one core in all.",
        *sorted({finding.versions for finding in findings}),
        "",
    ]
    return "\n".join(lines) + "".join(_section(verdict, group) for verdict, group in groups.items() if group)


def _section(verdict: str, findings: Sequence[Finding]) -> str:
    head, row = COLUMNS[verdict]
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row(finding)) for finding in findings)]
    table = "\n".join(f"| {line} |" for line in lines)
    return f"\n## {verdict.capitalize()}\n\n{HEADINGS[verdict]}\n\n{table}\n"


def _same(finding: Finding) -> list[str]:
    longest = "no limit" if finding.max_length is None else str(finding.max_length)
    numbers = [f"{finding.difference or 0:.1e}", f"{finding.spread or 0:.2f}", longest, f"{finding.seconds:.0f}"]
    return [finding.model_type, *numbers]


def _leaks(finding: Finding) -> list[str]:
    sides = [f"{finding.moved.get(side, float('nan')):.2g}" for side in ("right", "left")]
    return [finding.model_type, *sides, f"{finding.spread or 0:.2f}", f"{finding.seconds:.0f}"]


def _other(finding: Finding) -> list[str]:
    return [finding.model_type, finding.reason.replace("|", "\\|"), f"{finding.seconds:.0f}"]


COLUMNS: dict[str, tuple[list[str], Callable[[Finding], list[str]]]] = {
    "same": (["model type", "largest difference", "spread", "maximum", "seconds"], _same),
    "leaks": (["model type", "moved by padding on the right", "on the left", "spread", "seconds"], _leaks),
    "refused": (["model type", "reason", "seconds"], _other),
    "failed": (["model type", "reason", "seconds"], _other),
}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
