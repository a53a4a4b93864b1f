"""A recipe says what it means, or one line says which line of it does not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_bucket.errors import RecipeError
from hf_bucket.glue import GLUE_TASKS
from hf_bucket.recipe import KEYS, Calibration, Evaluation, Key, Recipe, read_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
NAMES = [name for key in KEYS for name in (key.name, *(inner.name for inner in key.keys))]
Read = Callable[[str], Recipe]

quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads a text as the recipe ``x.yaml``."""
    monkeypatch.chdir(tmp_path)

    def read_text(text: str) -> Recipe:
        path = Path("x.yaml")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return read_recipe(path)

    return read_text


def complaint(read: Read, text: str) -> str:
    """The message of the recipe error that a text raises; nothing for a recipe."""
    try:
        read(text)
    except RecipeError as error:
        return str(error)
    return ""


values = st.recursive(
    st.sampled_from(
        ["64", "-1", "1.5", "true", "null", "auto", "'x'", "!!python/name:os.system", "*a", "&a b", "2020-01-01"]
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
    max_leaves=5,
)
lines = st.builds("{}{}: {}".format, st.sampled_from(["", "  "]), st.sampled_from([*NAMES, "<<", "? [a]", ""]), values)
texts = (
    st.text(max_size=40) | st.lists(lines, max_size=6).map("\n".join) | st.text("[]{}:-\n \"'&*!|>%\\U8F", max_size=30)
)


@quick
@given(text=texts)
def test_any_text_is_a_recipe_or_a_recipe_error_with_a_place(text: str, read: Read) -> None:
    assert re.match(r"x\.yaml(:\d+: | cannot be read)|$", complaint(read, text))


@quick
@given(text=texts)
def test_whatever_follows_a_model_never_raises_anything_else(text: str, read: Read) -> None:
    assert re.match(r"x\.yaml(:\d+: | cannot be read)|$", complaint(read, f"model: x\n{text}"))


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_one(path: Path) -> None:
    assert read_recipe(path).model
    assert not re.search(r"[:\s]/\w", path.read_text(encoding="utf-8")), "a path of somebody's machine"


def test_the_shipped_recipes_say_what_their_names_say() -> None:
    mrpc, sst2, auto = (read_recipe(RECIPES / f"{name}.yaml") for name in ("mrpc-64-128", "sst2-64-128", "auto"))
    assert mrpc.buckets == sst2.buckets == (64, 128)
    assert mrpc.evaluate is not None
    assert sst2.evaluate is not None
    assert (mrpc.evaluate.glue, sst2.evaluate.glue) == ("mrpc", "sst2")
    assert (auto.buckets, auto.n_buckets) == ("auto", 6)
    assert auto.calibration is not None
    assert auto.calibration.file is not None


def test_what_is_left_out_is_what_writing_the_defaults_says(read: Read) -> None:
    written = read(
        "model: a/b\nbuckets: auto\nn_buckets: 8\ntask: text-classification\noverflow: error\n"
        "mode: shared\nprovider: auto"
    )
    assert read("model: a/b") == written == Recipe(path=Path("elsewhere.yaml"), model="a/b")


def test_what_sections_leave_out_is_filled_in(read: Read) -> None:
    found = read("model: x\ncalibration: {file: texts.csv}\nevaluate: {glue: rte}")
    assert found.calibration == Calibration(file=Path("texts.csv"), split="train", column="text")
    assert found.evaluate == Evaluation(glue="rte", split="validation", rounds=3)


def test_every_key_arrives(read: Read) -> None:
    found = read(
        "model: m\ntask: sentiment-analysis\nrevision: '7'\nbuckets: auto\nbatch_sizes: [1, 4]\nn_buckets: 5\n"
        "calibration: {dataset: d, config: c, split: s, column: a, pair_column: b}\noverflow: truncate\nmode: static\n"
        "provider: P\noutput: out/put\nevaluate: {glue: mnli, split: validation_matched, data_dir: data, rounds: 9,\n"
        "  label_order: [b, a]}\n"
    )
    assert found == Recipe(
        path=Path("x.yaml"),
        model="m",
        revision="7",
        batch_sizes=(1, 4),
        n_buckets=5,
        calibration=Calibration(dataset="d", config="c", split="s", column="a", pair_column="b"),
        overflow="truncate",
        mode="static",
        provider="P",
        output=Path("out/put"),
        evaluate=Evaluation(
            glue="mnli", split="validation_matched", data_dir=Path("data"), rounds=9, label_order=("b", "a")
        ),
    )
    assert found.path == Path("x.yaml")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("64", (64,)),
        ("[128, 64]", (128, 64)),
        ("[[1, 64], [8, 128]]", ((1, 64), (8, 128))),
        ("pow2", "pow2"),
        ("'auto'", "auto"),
        ("!!int '64'", (64,)),
        ("&a [64, 128]", (64, 128)),
    ],
)
def test_buckets_are_written_in_every_form_make_ladder_takes(written: str, expected: object, read: Read) -> None:
    assert read(f"model: x\nbuckets: {written}").buckets == expected


def test_an_alias_stands_for_what_it_names(read: Read) -> None:
    assert read("model: &m a/b\nrevision: *m").revision == "a/b"


def test_a_byte_order_mark_is_no_part_of_a_key(read: Read) -> None:
    assert read("\ufeffmodel: x").model == "x"


WRONG = {
    "unknown-key": (
        "model: x\n\nbucket_sizes: 1",
        r"x\.yaml:3: bucket_sizes is not a key of a recipe; expected one of model, buckets, .*, evaluate "
        r"\(did you mean buckets\?\)$",
    ),
    "unknown-key-unlike-any": ("model: x\nzzz: 1", r"x\.yaml:2: zzz is not a key of a recipe; .* evaluate$"),
    "unknown-inner-key": (
        "model: x\nevaluate:\n  glue: rte\n  round: 2",
        r"x\.yaml:4: round is not a key of evaluate; expected one of glue, split, data_dir, rounds, label_order \(did",
    ),
    "merge-key": ("model: x\n<<: {mode: static}", r"x\.yaml:2: << is not a key"),
    "key-that-is-a-list": ("model: x\n? [a]\n: 1", r"x\.yaml:2: a list is not a key"),
    "empty-key": ("model: x\n'': 1", r"x\.yaml:2: the text '' is not a key"),
    "doubled-key": (
        "model: x\nmode: static\nmode: shared",
        r"x\.yaml:3: mode is given twice, first in line 2; keep one",
    ),
    "doubled-inner-key": (
        "model: x\nevaluate:\n  glue: rte\n  glue: rte",
        r"x\.yaml:4: glue is given twice, .* line 3",
    ),
    "no-model": ("\nbuckets: 64", r"x\.yaml:2: a recipe needs the key model; add model: <text>"),
    "no-glue": ("model: x\nevaluate:\n  rounds: 2", r"x\.yaml:3: evaluate needs the key glue; add glue: cola \| sst2"),
    "number-for-text": (
        "model: x\nrevision: 12345",
        r"x\.yaml:2: revision must be text, got the number '12345'; put it in q",
    ),
    "nothing-for-text": ("model:", r"x\.yaml:1: model must be text, got nothing; or leave the key out"),
    "blank-text": ("model: ' '", r"x\.yaml:1: model must be text, got the text ' '"),
    "list-for-text": ("model: [a]", r"x\.yaml:1: model must be text, got a list"),
    "boolean-for-text": (
        "model: x\nprovider: off",
        r"x\.yaml:2: provider must be text, got the boolean 'off'; put it in",
    ),
    "date-for-text": ("model: x\nrevision: 2020-01-01", r"x\.yaml:2: .* got the date '2020-01-01'; put it in quotes"),
    "foreign-tag": (
        "model: !!python/name:os.system x",
        r"x\.yaml:1: model .* got a value tagged 'tag:yaml.org,2002:pyt",
    ),
    "tagged-mapping": ("!!python/object:os.x {model: x}", r"x\.yaml:1: a recipe is a mapping .* got a value tagged"),
    "tagged-list": ("model: !!str [a]", r"x\.yaml:1: model must be text, got a value tagged 'tag:yaml.org,2002:str'"),
    "tagged-list-that-holds-itself": ("model: x\nn_buckets: &a !!int [*a]", r"x\.yaml:2: n_buckets .* a value tagged"),
    "tagged-list-of-aliases-without-end": (  # their repr would have ten million items
        "model: !!str [&a0 [x], " + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)) + "]",
        r"x\.yaml:1: model must be text, got a value tagged",
    ),
    "nul-in-a-path": (
        'model: x\noutput: "~x\\0y"',
        r"x\.yaml:2: output holds '.x00', which no name or path can; write",
    ),
    "surrogate-in-a-path": ('model: x\noutput: "~\\ud800"', r"x\.yaml:2: output holds '.ud800', which no name or path"),
    "wrong-choice": (
        "model: x\noverflow: trunctate",
        r"x\.yaml:2: overflow must be one of error, truncate, window, dynamic, got 'trunctate'; write ",
    ),
    "wrong-task": (
        "model: x\ntask: ner",
        r"x\.yaml:2: task must be one of text-classification, sentiment-.* got 'ner'",
    ),
    "wrong-glue": (
        "model: x\nevaluate: {glue: mrcp}",
        r"x\.yaml:2: glue must be one of cola.* \(did you mean mrpc\?\)",
    ),
    "choice-that-is-a-number": (
        "model: x\nmode: 1",
        r"x\.yaml:2: mode must be one of shared, static, auto, got the number '1'",
    ),
    "text-for-section": (
        "model: x\nevaluate: mrpc",
        r"x\.yaml:2: evaluate must be a mapping with keys of glue, split, ",
    ),
    "text-for-count": (
        "model: x\nn_buckets: six",
        r"x\.yaml:2: n_buckets must be a whole number of at least 1, got the t",
    ),
    "fraction-for-count": ("model: x\nn_buckets: 1.5", r"x\.yaml:2: n_buckets must be .* got the number '1.5'"),
    "label-order": (
        "model: x\nevaluate: {glue: rte, label_order: a}",
        r"x\.yaml:2: label_order must be a list of texts such as \[negative, positive\], got the text 'a'",
    ),
    "zero-count": ("model: x\nevaluate: {glue: rte, rounds: 0}", r"x\.yaml:2: rounds must be .* at least 1, got 0"),
    "octal-count": ("model: x\nn_buckets: 010", r"x\.yaml:2: n_buckets must be .* got the number '010'"),
    "count-of-many-digits": (
        f"model: x\nn_buckets: {'9' * 5000}",
        r"x\.yaml:2: n_buckets must be .* got the number '99",
    ),
    "one-batch-size": (
        "model: x\nbatch_sizes: 8",
        r"x\.yaml:2: batch_sizes must be a list of .* \[1, 8\], got the number",
    ),
    "text-batch-size": ("model: x\nbatch_sizes:\n- 1\n- a", r"x\.yaml:4: batch_sizes must be .* got the text 'a'"),
    "no-batch-size": ("model: x\nbatch_sizes: []", r"x\.yaml:2: batch_sizes: batch_sizes is empty"),
    "doubled-batch-size": ("model: x\nbuckets: 64\nbatch_sizes: [1, 1]", r"x\.yaml:3: batch_sizes: .* more than once"),
    "wrong-preset": (
        "model: x\nbuckets: atuo",
        r"x\.yaml:2: buckets must be auto, pow2, .*'atuo' \(did you mean auto\?\)",
    ),
    "text-bucket": ("model: x\nbuckets:\n- 64\n- long", r"x\.yaml:4: buckets must be auto, .* got the text 'long'"),
    "mapping-for-buckets": ("model: x\nbuckets: {a: 1}", r"x\.yaml:2: buckets must be auto, .* got a mapping"),
    "nested-too-far": ("model: x\nbuckets: [[[1]]]", r"x\.yaml:2: buckets must be auto, .* got a list"),
    "no-bucket": ("model: x\nbuckets: []", r"x\.yaml:2: buckets: buckets is empty"),
    "negative-bucket": ("model: x\nbuckets: -64", r"x\.yaml:2: buckets: a bucket's length must be .* got -64"),
    "doubled-bucket": ("model: x\nbuckets: [64, 64]", r"x\.yaml:2: buckets: bucket b1_s64 is given more than once"),
    "mixed-buckets": ("model: x\nbuckets: [64, [1, 128]]", r"x\.yaml:2: buckets: buckets mixes lengths and"),
    "triple-bucket": ("model: x\nbuckets: [[1, 2, 3]]", r"x\.yaml:2: buckets: a bucket pair is \(batch_size, length\)"),
    "pairs-and-batch-sizes": (
        "model: x\nbatch_sizes: [1]\nbuckets: [[1, 2]]",
        r"x\.yaml:3: buckets: buckets given as .* drop batch_sizes",
    ),
    "count-without-auto": ("model: x\nbuckets: 64\nn_buckets: 4", r"x\.yaml:3: n_buckets is for buckets: auto"),
    "calibration-of-nothing": (
        "model: x\ncalibration: {column: a}",
        r"x\.yaml:2: .* either file or dataset, got neither",
    ),
    "calibration-of-both": ("model: x\ncalibration: {file: a, dataset: b}", r"x\.yaml:2: .* file or dataset, got both"),
    "split-of-a-file": (
        "model: x\ncalibration: {file: a, split: b}",
        r"x\.yaml:2: calibration: split is a part of a data",
    ),
    "unknown-home": (
        "model: x\noutput: ~nobody-at-all/x",
        r"x\.yaml:2: output must be a path, got '~nobody-at-all/x': ",
    ),
    "empty": ("", r"x\.yaml:1: a recipe is a mapping of keys such as model: or buckets:, got nothing"),
    "comment-only": ("# nothing\n", r"x\.yaml:1: a recipe is a mapping .* got nothing"),
    "list": ("\n- a", r"x\.yaml:2: a recipe is a mapping .* got a list"),
    "text": ("model", r"x\.yaml:1: a recipe is a mapping .* got the text 'model'"),
    "itself": ("&a [*a]", r"x\.yaml:1: a recipe is a mapping .* got a list"),
    "syntax": ("model: x\nbuckets: [64", r"x\.yaml:\d: the file is no YAML: while parsing a flow sequence, expected"),
    "two-colons": (
        "model: x\nmode: a: b",
        r"x\.yaml:2: the file is no YAML: mapping values are not allowed here; mend",
    ),
    "two-documents": ("model: x\n---\nmodel: y", r"x\.yaml:2: the file is no YAML: expected a single document"),
    "unknown-alias": ("model: *x", r"x\.yaml:1: the file is no YAML: found undefined alias 'x'"),
    "control-character": ("model: x\nmode: \x07", r"x\.yaml:2: the file is no YAML: character .* not allowed"),
    "escape-beyond-unicode": ('model: x\nmode: "\\UFFFFFFFF"', r"x\.yaml:2: the file is no YAML that can be read"),
    "bottomless": ("model: x\nbuckets: " + "[" * 5000, r"x\.yaml:2: the file is no YAML that can be read: .*recursion"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_its_line(text: str, message: str, read: Read) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        read(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.yaml cannot be read \(.*No such file"):
        read_recipe(tmp_path / "nowhere.yaml")


def test_a_folder_and_bytes_that_are_no_utf8_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9")
    for path in (tmp_path, tmp_path / "latin.yaml"):
        with pytest.raises(RecipeError, match=re.escape(f"{path} cannot be read")):
            read_recipe(path)


def test_the_tasks_of_glue_are_those_of_the_evaluation() -> None:
    section = next(key for key in KEYS if key.name == "evaluate")
    assert section.keys[0] == Key(name="glue", required=True, values=tuple(task.name for task in GLUE_TASKS))
