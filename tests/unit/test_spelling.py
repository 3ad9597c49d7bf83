"""Recipes as they are written: what reads back, and what each fault says and where."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from truetune import spelling
from truetune.errors import UserError
from truetune.recipe import Recipe

REQUIRED = ["model.path=some/model", "data.source=python-docs"]


def shape(total: int, *, word: str = "", words: tuple[str, ...] = (), size: float | None = None):
    """A schedule of the user's own, whose options can hold any text."""
    return lambda step: 1.0


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("own_shapes")
    module.shape = shape  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_shapes", module)


def from_keys(*keys: str) -> Recipe:
    return spelling.read(None, [*REQUIRED, *keys])


def from_text(folder: Path, text: str, *keys: str, suffix: str = ".yaml") -> Recipe:
    path = folder / f"a{suffix}"
    path.write_text(text, encoding="utf-8")
    return spelling.read(str(path), [*REQUIRED, *keys])


# What reads.


@pytest.mark.parametrize("text", ["5e-4", "5E-4", "+5e-4", ".5e-3", "5.e-4", "0.0005", "500e-6"])
def test_a_float_needs_no_dot(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, f"optimizer:\n  rate: {text}\n").optimizer.rate == 5e-4
    assert from_keys(f"optimizer.rate={text}").optimizer.rate == 5e-4


def test_an_int_may_stand_for_a_float_and_have_underscores(tmp_path: Path) -> None:
    recipe = from_text(tmp_path, "adapter: {alpha: 64}\ntrain: {tokens: 1_000, clip: 2}\n")
    assert recipe.adapter.alpha == 64.0 and type(recipe.adapter.alpha) is float
    assert recipe.train.tokens == 1000 and recipe.train.clip == 2.0


@pytest.mark.parametrize("word", ["none", "null", "None", "~"])
def test_null_has_several_spellings(tmp_path: Path, word: str) -> None:
    assert from_text(tmp_path, f"train:\n  clip: {word}\n").train.clip is None
    assert from_keys(f"train.clip={word}").train.clip is None


def test_words_of_yaml_1_1_are_words_and_quotes_make_text(tmp_path: Path) -> None:
    text = 'data: {split: no}\nmodel: {revision: "123"}\noutput: {folder: "none"}\n'
    recipe = from_text(tmp_path, text)
    assert (recipe.data.split, recipe.model.revision, recipe.output.folder) == ("no", "123", "none")
    assert from_keys('model.revision="123"').model.revision == "123"


def test_paths_and_regexes_need_no_quotes_on_the_command_line() -> None:
    recipe = from_keys("adapter.targets=.*\\.(q|v)_proj$", "output.folder=C:\\a b: #c", "data.split=*x")
    assert recipe.adapter.targets == ".*\\.(q|v)_proj$"
    assert recipe.output.folder == "C:\\a b: #c" and recipe.data.split == "*x"
    assert from_keys("adapter.targets=[q_proj, v_proj]").adapter.targets == ["q_proj", "v_proj"]


def test_options_become_what_the_recipe_holds() -> None:
    recipe = from_keys("optimizer.betas=[0.8, 1]", "optimizer.weight_decay=0.1")
    assert recipe.optimizer.options == {"betas": (0.8, 1), "weight_decay": 0.1}


def test_the_command_line_wins_and_its_last_word_too(tmp_path: Path) -> None:
    assert from_text(tmp_path, "train: {steps: 5}\n", "train.steps=6", "train.steps=7").train.steps == 7


def test_toml_says_the_same_as_yaml(tmp_path: Path) -> None:
    toml = '[optimizer]\nrate = 5e-4\nbetas = [0.9, 0.95]\n[train]\nsteps = 1_000\n[schedule]\nname = "cosine"\n'
    yaml = "optimizer: {rate: 5e-4, betas: [0.9, 0.95]}\ntrain: {steps: 1000}\nschedule: {name: cosine}\n"
    assert from_text(tmp_path, toml, suffix=".toml") == from_text(tmp_path, yaml)


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n", "version: 1\n", "\ufefftrain:\n"])
def test_empty_files_and_sections_are_defaults(tmp_path: Path, text: str) -> None:
    assert from_text(tmp_path, text) == from_keys()


def test_nothing_is_interpolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/changed")
    assert from_keys("output.folder=$HOME/${HOME}/~").output.folder == "$HOME/${HOME}/~"


@pytest.mark.parametrize("name", spelling.ready())
def test_ready_recipes_read_and_say_what_they_are_for(name: str) -> None:
    spelling.read(name, REQUIRED)
    assert spelling.ready()[name].read_text(encoding="utf-8").startswith("# ")


def test_the_quick_start_needs_only_a_model() -> None:
    recipe = spelling.read("quickstart", ["model.path=m.gguf"])
    assert recipe.train.tokens == 42_000 and recipe.optimizer.rate == 3e-4
    assert recipe.adapter.lora_plus_ratio == 16.0 and recipe.schedule.warmup == 0.06


# What is refused: the text, its line, and what the sentence says.

BAD_YAML = [
    (
        "train:\n  stepps: 5\n",
        2,
        'unknown key "train.stepps" (did you mean "steps"?); use one of epochs, steps',
    ),
    ("train:\n  rate: 5\n", 2, 'unknown key "train.rate" (did you mean "optimizer.rate"?)'),
    ("trian: {steps: 5}\n", 1, 'unknown key "trian" (did you mean "train"?)'),
    ("train.steps: 5\n", 1, 'unknown key "train.steps"'),
    ("train:\n  steps: many\n", 2, 'train.steps is "many", but must be an integer'),
    ("train:\n  steps: 1.5\n", 2, "train.steps is 1.5, but must be an integer"),
    ("train:\n  steps: true\n", 2, "train.steps is true, but must be an integer"),
    ("train:\n  steps: 0\n", 2, "train.steps is 0, but must be greater than 0"),
    ("optimizer:\n  rate: -1e-4\n", 2, "must be greater than 0"),
    ("optimizer:\n  rate: .inf\n", 2, "must be a finite number"),
    ("optimizer:\n  rate: '3e-4'\n", 2, 'optimizer.rate is "3e-4", but must be a number'),
    ("optimizer:\n  betas: {a: 1}\n", 2, "optimizer.betas is"),
    ("adapter:\n  targets: [q, 3]\n", 2, 'adapter.targets is ["q", 3], but must be text'),
    ("adapter:\n  targets: 3\n", 2, "must be text or a list; put it in quotes"),
    ("output:\n  merged: yes\n", 2, 'output.merged is "yes", but must be true or false'),
    ("data:\n  format: mesages\n", 2, "'prompt-completion' or 'text' (did you mean \"messages\"?)"),
    ("model:\n  revision: 123\n", 2, "put it in quotes"),
    ("\ntrain: 5\n", 2, "train is a section; write its keys under it (epochs,"),
    ("device: gpu\n", 1, "must be 'auto', 'cpu' or 'cuda'"),
    ("train:\n  steps: 5\n  clip: 1\n  steps: 6\n", 4, "train.steps is given twice; keep one"),
    ("train:\n  epochs: 1\n  tokens: 5\n", 3, "both set the length of the run"),
    ("# c\ndata:\n  max_length: 4096\n", 3, "is above train.tokens_per_micro_batch (2048)"),
    ("version: 2\n", 1, "the recipe has version 2, but this Truetune reads 1; upgrade Truetune"),
    ("version: true\n", 1, "write version: 1, or leave it out"),
    ("version: '1'\n", 1, "write version: 1, or leave it out"),
    ("train:\n  steps: [5\n", 3, "mend this line of YAML"),
    ("train:\n\tsteps: 5\n", 2, "mend this line of YAML"),
    ("train: {steps: 5}\n---\ntrain: {}\n", 2, "mend this line of YAML"),
    ("a: &x [1]\nb: [*x, *x]\n", 1, "anchors (&) and aliases (*) are no part of a recipe"),
    ("train: {}\nb: *x\n", 2, "aliases"),
    ("train:\n  steps: !!python/object/apply:os.system [true]\n", 2, "tags (!) are no part of a recipe"),
    ("data:\n  source: !!str x\n", 2, "tags (!) are no part of a recipe"),
    ("train: " + "[" * 5000, 1, "nested too deeply"),
    ("- train\n", 1, "a recipe is made of keys"),
    ("? [a]\n: b\n", 1, "a key is one word"),
    ("train:\n  steps: \x00\n", 2, "is not allowed; remove it"),
    ("train:\n  seed: " + "9" * 5000 + "\n", 2, "train.seed is"),
    ("optimizer:\n  name: adamv\n", 2, 'unknown optimizer "adamv" (did you mean "adamw"?); use one of'),
    (
        "optimizer:\n  weight_decy: 1\n",
        2,
        'no option "weight_decy" (did you mean "weight_decay"?); use one of',
    ),
    ("optimizer:\n  rate: 1\n  betas: 1\n", 3, "optimizer.betas is 1, but must be a list"),
    (
        "schedule:\n  name: linear\n  decay: 1\n",
        3,
        'schedule "linear" has no option "decay"; use one of minimum',
    ),
    ("schedule:\n  name: own_shapes:shap\n", 2, '(did you mean "shape"?)'),
    ("train:\n  steps: x\n  stepps: 5\nadapter: {rank: 0}\n", 2, "(and 2 more faults)"),
]


@pytest.mark.parametrize(("text", "line", "says"), BAD_YAML)
def test_a_wrong_file_is_one_sentence_with_its_line(tmp_path: Path, text: str, line: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        from_text(tmp_path, text)
    message = str(caught.value)
    assert says in message
    assert message.startswith(f"{tmp_path / 'a.yaml'}:{line}: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("[train]\nstepps = 5\n", 2, '(did you mean "steps"?)'),
        ("[train]\nsteps = 5\nsteps = 6\n", 3, "mend this line of TOML"),
        ("[train]\nsteps = \n", 2, "mend this line of TOML"),
        ("train = {steps = 0}\n", 1, "must be greater than 0"),
        ("[data]\n[train]\nclip = 2024-01-01\n", 3, 'train.clip is "2024-01-01", but must be a number'),
        ("data.split = 3\n", 1, "data.split is 3, but must be text"),
        ('data.format = """\ntext', 2, "mend this line of TOML"),
        ("a = " + "[" * 5000, 1, "nested too deeply"),
    ],
)
def test_toml_faults_have_their_line_too(tmp_path: Path, text: str, line: int, says: str) -> None:
    with pytest.raises(UserError) as caught:
        from_text(tmp_path, text, suffix=".toml")
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path / 'a.toml'}:{line}: ")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("steps", '"steps" is not key=value'),
        ("=5", '"=5" is not key=value'),
        ("train..steps=5", "is not key=value"),
        ("train.steps=", "command line: train.steps= has no value; write train.steps=none"),
        ("train.steps=x", "command line: train.steps=x: train.steps is"),
        ("train.steps.more=5", "command line: train.steps.more=5: train.steps is"),
        ("steps=5", '(did you mean "train.steps"?)'),
        ("adapter.targets=[q", "command line: adapter.targets=[q: "),
        (
            "optimizer.momentm=1",
            'command line: optimizer.momentm=1: optimizer "adamw" has no option "momentm"',
        ),
    ],
)
def test_a_wrong_key_is_one_sentence(key: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        from_keys(key)
    assert says in str(caught.value)


def test_a_conflict_names_the_place_written_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^command line: train\.epochs=2: train\.epochs and train\.tokens both"):
        from_text(tmp_path, "train:\n  tokens: 5\n", "train.epochs=2")
    assert from_text(tmp_path, "train: {tokens: 5}\n", "train.epochs=2", "train.tokens=none").train.epochs == 2
    both = "train: {tokens_per_micro_batch: 512}\ndata: {max_length: 256}\n"
    with pytest.raises(UserError, match=r"^command line: train\.tokens_per_micro_batch=128: "):
        from_text(tmp_path, both, "train.tokens_per_micro_batch=128")


def test_a_missing_key_is_named_after_all_is_merged(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("data: {source: x}\n")
    with pytest.raises(UserError, match=r"model\.path is missing \(a Hugging Face folder.*add model\.path="):
        spelling.read(str(path))
    assert spelling.read(str(path), ["model.path=m"]).model.path == "m"
    with pytest.raises(UserError, match=r"^command line: model\.path is missing .*; and command line: data\.source is"):
        spelling.read(None)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"a: \xff\n")
    (tmp_path / "big.yaml").write_text("# " + "x" * spelling.MOST_BYTES)
    for given_, says in [
        (str(tmp_path / "mine.yaml"), "is not UTF-8 text"),
        (str(tmp_path / "big.yaml"), "more than any recipe"),
        (str(tmp_path / "mime.yaml"), 'did you mean "mine.yaml"?'),
        (str(tmp_path), "is a folder"),
        ("quikstart", 'no ready recipe "quikstart" (did you mean "quickstart"?)'),
        ("recipe.json", "a file that ends in .yaml, .yml, .toml"),
    ]:
        with pytest.raises(UserError) as caught:
            spelling.read(given_)
        assert says in str(caught.value)


def test_a_recipe_in_python_holds_data_only() -> None:
    with pytest.raises(UserError, match=r"optimizer\.hook is"):
        Recipe.model_validate(
            {
                "model": {"path": "m"},
                "data": {"source": "s"},
                "optimizer": {"name": "adamw", "hook": object()},
            }
        )


# What is written reads back.

text = st.text(min_size=1)
positive = st.floats(1e-12, 1e12)
share = st.floats(0.01, 0.99)
count = st.integers(1, 10**20)
SECTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "model": {"revision": st.none() | text, "precision": st.sampled_from(["auto", "fp32", "bf16"])},
    "data": {
        "split": text,
        "rows": st.none() | count,
        "max_length": st.integers(2, 4096),
        "cut_limit": share,
        "targets": st.sampled_from(["assistant", "last", "all"]),
        "weight_column": st.none() | text,
    },
    "evaluation": {"source": st.none() | text, "fraction": share, "samples": st.integers(0, 9)},
    "adapter": {
        "method": st.sampled_from(["lora", "full"]),
        "alpha": positive,
        "targets": text | st.lists(text),
    },
    "optimizer": {
        "name": st.just("adamw"),
        "rate": positive | count,
        "betas": st.tuples(share, share) | st.lists(share, min_size=2, max_size=2),
        "eps": positive,
    },
    "schedule": {
        "name": st.just("own_shapes:shape"),
        "warmup": positive,
        "warmup_from": st.floats(0, 0.99),
        "word": text,
        "words": st.lists(text),
        "size": st.none() | positive | count,
    },
    "train": {"steps": st.none() | count, "clip": st.none() | positive, "seed": st.integers(0, 2**63 - 1)},
    "output": {"folder": st.none() | text, "merged": st.booleans()},
}
WRITTEN_ALWAYS = {
    "model": {"path": text},
    "data": {"source": text},
    "schedule": {"name": st.just("own_shapes:shape")},
}


def without_conflicts(values: dict[str, Any]) -> dict[str, Any]:
    """The values less those that mean nothing beside others, and are refused."""
    if values["adapter"].get("method") == "full":
        values["adapter"] = {"method": "full"}
    if values["evaluation"].get("source") is not None:
        values["evaluation"].pop("fraction", None)
    return {**values, "train": {**values["train"], "tokens_per_micro_batch": 4096}}


recipes = st.fixed_dictionaries(
    {
        name: st.fixed_dictionaries(
            WRITTEN_ALWAYS.get(name, {}),
            optional={key: values for key, values in keys.items() if key not in WRITTEN_ALWAYS.get(name, {})},
        )
        for name, keys in SECTIONS.items()
    }
).map(lambda values: Recipe.model_validate(without_conflicts(values)))


@settings(max_examples=150, deadline=None)
@given(recipe=recipes)
def test_a_written_recipe_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> None:
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    spelling.write(recipe, path)
    assert spelling.read(str(path)) == recipe


def test_only_what_differs_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    spelling.write(from_keys("train.steps=5", "train.clip=none", "optimizer.betas=[0.9, 0.95]"), path)
    assert path.read_text() == (
        "version: 1\n"
        "model:\n  path: some/model\n"
        "data:\n  source: python-docs\n"
        "optimizer:\n  betas:\n  - 0.9\n  - 0.95\n"
        "train:\n  steps: 5\n  clip: null\n"
    )


def test_describe_knows_every_key_and_what_is_open() -> None:
    described = {d.key: d for d in spelling.describe("quickstart", ["optimizer.eps=1e-6"])}
    assert described["model.path"].value == "required" and not described["model.path"].written
    assert described["train.tokens"].value == "42000" and described["train.tokens"].written
    assert described["train.clip"].value == "1.0" and not described["train.clip"].written
    assert described["optimizer.eps"].value == "1e-06"
    declared = {f"{name}.{key}" for name, part in spelling.SECTIONS.items() for key in part.model_fields}
    assert declared <= described.keys()


# Lists of parts.

SOURCES = ["model.path=m", "data.sources=[{source: a, weight: 0.5}, {source: b}]"]


def test_several_sources_are_written_and_read(tmp_path: Path) -> None:
    recipe = spelling.read(None, SOURCES)
    assert [(part.source, part.weight) for part in recipe.data.sources] == [("a", 0.5), ("b", 1.0)]
    spelling.write(recipe, tmp_path / "a.yaml")
    assert spelling.read(str(tmp_path / "a.yaml")) == recipe
    other = spelling.read(str(tmp_path / "a.yaml"), ["data.sources=none", "data.source=c"])
    assert other.data.source == "c" and other.data.sources == ()
    shown = {d.key: d.value for d in spelling.describe(None, SOURCES)}
    assert shown["data.sources"] == '[{"source": "a", "weight": 0.5}, {"source": "b"}]'


def test_a_fault_in_a_list_of_parts_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model: {path: m}\ndata:\n  sources:\n    - source: a\n    - source: b\n      weigth: 2\n")
    with pytest.raises(
        UserError, match=r'a.yaml:6: unknown key "data.sources\[1\].weigth" \(did you mean "weight"\?\)'
    ):
        spelling.read(str(path))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["data.sources=[{source: a, weight: 0}]"], r"data.sources\[0\].weight is 0, but must be .* 0.001"),
        (["data.sources=[{weight: 1}]"], r"data.sources\[0\].source is missing \(python-docs, .*add"),
        (["data.sources=[a]"], r"data.sources\[0\] is a section; write its keys under it \(source, split"),
        (["data.sources=[{source: a}, {source: a}]"], r"data.sources has a \(train\) twice; name it once"),
        (["data.source=b", "data.sources=[{source: a}]"], "data.source and data.sources both say .* keep one"),
        (
            ["data.split=b", "data.sources=[{source: a}]"],
            "data.split means nothing with data.sources, .* write it there",
        ),
        (["data.sources=none"], "data.source is missing"),
    ],
)
def test_sources_that_do_not_go_together_are_told(keys: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        spelling.read(None, ["model.path=m", *keys])
