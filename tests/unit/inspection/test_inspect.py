"""``truetune inspect`` on small data: its figures are those of a run, and faults of the data are seen."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from folders import CHATML, chats, invoke, write_model, write_rows

from truetune import inspection
from truetune.data import chat, rendering
from truetune.data.chat import Renderer
from truetune.errors import UserError
from truetune.inspection import Inspection
from truetune.models.load import load, outline
from truetune.rows import build_renderer, build_stream, choose_rows, tokenized
from truetune.spelling import read

Row = dict[str, Any]


def turn(*contents: str, system: str | None = None) -> Row:
    told = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return {"messages": told + [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]}


def keys(model: Path, data: Path, *more: str) -> list[str]:
    held = data.with_name("held.jsonl")
    other = [f"evaluation.source={held}"] if held.exists() else []
    return [f"model.path={model}", f"data.source={data}", "data.max_length=128", "evaluation.rows=6", *other, *more]


def inspect(model: Path, data: Path, *more: str, rows: tuple[int, ...] = ()) -> Inspection:
    return inspection.inspect(read(None, keys(model, data, *more)), rows)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows that are dropped, cut, empty, doubled; beside them rows to hold out."""
    write_rows(tmp_path / "held.jsonl", chats(50)[40:])
    rows = [
        *chats(40),
        turn("What is it? " * 40, "Too late."),
        turn("Why?", "Because. " * 60),
        turn("Say nothing.", ""),
        turn("What is 3 and 3?", "It is 6, of course.", "And again?", "Still 6, of course."),
        turn("Who are you, and what is your name?", "A model.", system="Be brief."),
        turn("Who are you, and what is your name?", "A model.", system="Be brief."),
    ]
    return write_rows(tmp_path / "mixed.jsonl", rows)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("too_long", ["truncate", "drop", "split"])
def test_figures_are_those_of_a_run(
    my_model: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch, moved: bool, too_long: str
) -> None:
    more = ("data.cut_limit=1",) if too_long == "truncate" else (f"data.too_long={too_long}",)
    if moved:
        monkeypatch.setattr(rendering, "PORTION", 7)
        monkeypatch.setattr(rendering, "SOON", 0.0)
        monkeypatch.setattr(rendering, "LONG", 0.0)
        monkeypatch.setattr(rendering, "cores", lambda: 2)
    found = inspect(my_model, mixed, *more)
    recipe = read(None, keys(my_model, mixed, *more))
    model = outline(str(my_model))
    renderer = build_renderer(recipe, model.tokenizer, model.stop_ids)
    for part, choice in zip(found.parts, [c for side in choose_rows(recipe) for c in side], strict=True):
        report = tokenized(recipe, [choice], renderer).report
        assert part.report == report
        assert {reason: tally.count for reason, tally in part.dropped.items()} == report.dropped
        assert part.truncated.count == report.truncated
    train = found.parts[0]
    assert sum(n for _, _, n in found.lengths.bars) == train.report.rows and {40, 41} <= set(train.truncated.first)
    assert 42 in train.silent.first and found.plan and found.plan.tokens == train.report.tokens
    assert found.template and found.template.digest == renderer.template_digest
    if too_long == "truncate":
        own = next(limit for limit in found.lengths.limits if limit.max_length == 128)
        assert (own.rows, own.targets) == (train.truncated.count, train.report.targets_cut)
        assert train.dropped[chat.CUT_AWAY].first == [40]
        assert train.turns.ends == {"<|im_end|>": train.turns.turns - train.turns.cut}


def test_outline_is_what_load_has(my_model: Path) -> None:
    light, whole = outline(str(my_model)), load(str(my_model))
    assert light.stop_ids == whole.stop_ids and light.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
    assert light.config.to_dict() == whole.model.config.to_dict()


def test_no_weight_is_loaded(my_model: Path, my_data: Path, tmp_path: Path) -> None:
    light = tmp_path / "light"
    light.mkdir()
    for file in my_model.iterdir():
        if file.suffix != ".safetensors":
            (light / file.name).symlink_to(file)
    assert inspect(light, my_data).parts[0].report.documents > 50


def test_shown_tokens_say_what_becomes_of_them(my_model: Path, mixed: Path) -> None:
    found = inspect(my_model, mixed, "data.cut_limit=1", rows=(43, 41, 40))
    talk, cut, dropped = found.shown

    def of(kind: str, row: inspection.facts.Shown) -> str:
        return "".join(token.text for token in row.tokens if token.kind == kind)

    assert of("trained", talk) == "It is 6, of course.<|im_end|>Still 6, of course.<|im_end|>"
    assert of("context", talk) == "What is 3 and 3?And again?"
    assert of("template", talk).startswith("<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n")
    text = "".join(token.text for token in talk.tokens)
    assert text.startswith("<|im_start|>user\nWhat is 3 and 3?<|im_end|>\n<|im_start|>assistant\nIt is 6")
    kinds = [token.kind for token in cut.tokens]
    assert kinds[:128].count("cut") == 0 and set(kinds[128:]) == {"cut"} and cut.length > 128
    assert (talk.cut, cut.cut) == (0, sum(token.kind == "cut" for token in cut.tokens) - 1), (
        "but the new line at the end"
    )
    assert dropped.fate == chat.CUT_AWAY and {t.kind for t in dropped.tokens} == {"cut"}


def test_the_usual_rows_are_first_longest_shortest_and_one_per_drop(my_model: Path, mixed: Path) -> None:
    shown = inspect(my_model, mixed, "data.cut_limit=1").shown
    assert [row.why for row in shown] == ["first", "longest", "shortest", f"dropped: {chat.CUT_AWAY}"]
    lengths = [row.length for row in shown]
    assert max(lengths[:3]) == lengths[1] and min(lengths[:3]) == lengths[2]


def test_a_row_that_is_not_there_is_refused(my_model: Path, my_data: Path) -> None:
    with pytest.raises(UserError, match=r"row 4000 is not among .* --row 0"):
        inspect(my_model, my_data, rows=(4000,))


def test_duplicates_and_overlap(my_model: Path, tmp_path: Path) -> None:
    long = "What does the function do, which sorts the list of names by their length and then by the alphabet, {}?"
    rows = [*chats(20), turn(long.format("please"), "It sorts."), turn(long.format("pray"), "It sorts.")]
    rows += [chats(20)[4] | {"id": 7}, chats(20)[4] | {"id": 8}]
    held = [
        chats(20)[5] | {"id": 1},
        turn(long.format("kindly"), "It sorts."),
        turn("Something else altogether?", "Yes."),
    ]
    files = write_rows(tmp_path / "a.jsonl", rows), write_rows(tmp_path / "b.jsonl", held)
    found = inspect(my_model, files[0], f"evaluation.source={files[1]}")
    copies, overlap = (part.copies for part in found.parts)
    assert copies.exact.first == [22, 23] and copies.near.first == [21]
    assert overlap.rows == 3 and overlap.exact.first == [0] and overlap.near.first == [1]
    assert any("2 of 3 held-out rows are also trained on (1 exactly, 1 nearly)" in w for w in found.warnings)
    assert any("repeat an earlier one exactly: 2 rows (22, 23)" in w for w in found.warnings)
    near = next(pair for pair in copies.examples if pair.row == 21)
    assert near.other == 20 and 0.8 <= near.similarity < 1 and "pray" in near.text and "please" in near.other_text


def test_several_sources_have_tables_of_their_own_and_are_compared_with_each_other(
    my_model: Path, tmp_path: Path
) -> None:
    long = "What does the function do, which sorts the list of names by their length and then by the alphabet, {}?"
    named = {
        "a.jsonl": [*chats(20), turn(long.format("please"), "It sorts.")],
        "b.jsonl": [
            *chats(40)[20:],
            chats(20)[4] | {"id": 1},
            turn(long.format("pray"), "It sorts."),
            turn("Who?", ""),
        ],
        "held.jsonl": [*chats(50)[40:], chats(40)[30] | {"id": 1}, chats(20)[7] | {"id": 1}],
    }
    for name, rows in named.items():
        write_rows(tmp_path / name, rows)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {my_model}}}\n"
        f"data: {{max_length: 128, sources: [{{source: {tmp_path / 'a.jsonl'}}}, "
        f"{{source: {tmp_path / 'b.jsonl'}, weight: 0.5}}]}}\n"
        f"evaluation: {{source: {tmp_path / 'held.jsonl'}}}\n"
    )
    asked = read(str(recipe), [])
    found = inspection.inspect(asked)
    a, b, held = found.parts
    assert [(p.name, p.weight, p.report.rows) for p in found.parts] == [
        ("a.jsonl", 1, 21), ("b.jsonl", 0.5, 23), (str(tmp_path / "held.jsonl"), None, 12)
    ]  # fmt: skip
    assert (a.copies.exact.count, a.copies.near.count) == (0, 0)
    assert b.copies.exact.first == [20] and b.copies.near.first == [21] and b.silent.first == [22]
    assert {(pair.row, pair.source, pair.other) for pair in b.copies.examples} == {
        (20, "a.jsonl", 4),
        (21, "a.jsonl", 20),
    }
    assert held.copies.exact.first == [10, 11]
    assert {(pair.row, pair.source, pair.other) for pair in held.copies.examples} == {
        (10, "b.jsonl", 10), (11, "a.jsonl", 7)
    }  # fmt: skip
    model = outline(str(my_model))
    train = tokenized(asked, choose_rows(asked)[0], build_renderer(asked, model.tokenizer, model.stop_ids))
    assert found.plan and found.plan.tokens == build_stream(asked, train.lengths).tokens
    assert sum(n for _, _, n in found.lengths.bars) == 44
    assert {(row.source, row.why) for row in found.shown} >= {("a.jsonl", "first"), ("b.jsonl", "first")}
    chosen = inspection.inspect(asked, [22]).shown
    assert [(row.source, row.row) for row in chosen] == [("b.jsonl", 22)]
    assert any(
        "answers are empty in 1 row (22) of the training side of b.jsonl" in warning for warning in found.warnings
    )
    told = invoke("inspect", str(recipe)).stdout
    assert "training of b.jsonl" in told and "0.5" in told and "row 0 of a.jsonl" in told


def test_positions_are_judged_as_a_run_judges_them(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40}))
    data = write_rows(tmp_path / "rows.jsonl", [*chats(20), turn("Why?", "Because. " * 6)])
    found = inspect(model, data)
    run = invoke("train", *keys(model, data), "--dry-run")
    assert run.exit_code == 0 and found.refused is None
    assert any("more than the 40 positions of the model's config" in warning for warning in found.warnings)


def test_a_broken_mask_is_shown(my_model: Path, my_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is broken as in users' reports: the question is learned, and the end is not."""
    right = inspect(my_model, my_data)
    assert not right.parts[0].turns.endless.count and not any("stop token" in w for w in right.warnings)
    real = chat.Renderer._cover

    def early(self: Renderer, *arguments: Any) -> tuple[int, int]:
        first, last = real(self, *arguments)
        return first - 4, last - 1

    monkeypatch.setattr(chat.Renderer, "_cover", early)
    broken = inspect(my_model, my_data)
    trained = "".join(token.text for token in broken.shown[0].tokens if token.kind == "trained")
    assert "assistant" in trained and "<|im_end|>" not in trained
    assert broken.parts[0].turns.endless.count == broken.parts[0].report.documents
    assert any("do not end in a trained stop token" in w for w in broken.warnings)
    assert "<|im_end|>" not in broken.parts[0].turns.ends


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([turn(f"{'What is it? ' * 12} {i}", "x") for i in range(30)], "of the training tokens are targets"),
        ([turn("What?", "This.") | {"id": i} for i in range(30)], "all training rows say the same"),
        ([turn(f"What is {i}?", "") for i in range(30)], "answers are empty in"),
    ],
)
def test_warnings(my_model: Path, tmp_path: Path, rows: list[Row], says: str) -> None:
    found = inspect(my_model, write_rows(tmp_path / "rows.jsonl", rows), "data.max_length=400")
    assert any(says in warning for warning in found.warnings), found.warnings


@pytest.mark.parametrize(
    ("template", "system", "says"),
    [
        (CHATML, "", ""),
        (
            "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML,
            "Be kind.",
            "adds a system prompt",
        ),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML, "", ""),
        (None, "", "no chat template"),
        (CHATML.replace("<|im_end|>", "<end>"), "", "trained stop token"),
    ],
)
def test_the_template_is_told(my_data: Path, tmp_path: Path, template: str | None, system: str, says: str) -> None:
    found = inspect(write_model(tmp_path / "model", template=template), my_data, "data.max_length=256")
    assert found.template and found.template.system == system and found.template.own == (template is not None)
    told = [warning for warning in found.warnings if "micro-batches" not in warning]
    assert len(told) == bool(says) and all(says in warning for warning in told)


def test_the_command_in_the_terminal_as_json_and_as_a_page(my_model: Path, mixed: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    arguments = keys(my_model, mixed, "data.cut_limit=1")
    result = invoke("inspect", *arguments, "--page", str(page))
    assert result.exit_code == 0 and "⟦It is 0, of course.<|im_end|>⟧" in result.output
    assert "<- max_length" in result.output and page.is_file()
    told = json.loads(invoke("inspect", *arguments, "--json", "--row", "3").stdout)
    again = asdict(inspect(my_model, mixed, "data.cut_limit=1", rows=(3,)))
    assert told | {"seconds": 0} == json.loads(json.dumps(again | {"seconds": 0}))


def test_refused_data_is_shown_and_refused_as_a_run_does(my_model: Path, mixed: Path) -> None:
    arguments = keys(my_model, mixed)
    result = invoke("inspect", *arguments)
    run = invoke("train", *arguments, "--dry-run")
    assert result.exit_code == run.exit_code == 2 and "Lengths" in result.stdout
    assert result.stderr == run.stderr and "would cut" in run.stderr


def test_rows_that_are_too_long_are_refused_as_a_run_does(my_model: Path, mixed: Path) -> None:
    arguments = [*keys(my_model, mixed), "data.too_long=error"]
    result, run = invoke("inspect", *arguments), invoke("train", *arguments, "--dry-run")
    assert result.exit_code == run.exit_code == 2 and "calls an error" in run.stderr
    assert result.stderr.splitlines()[-1] == run.stderr.splitlines()[-1]


def test_weights_are_shown(my_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row | {"weight": 0.5} for row in chats(30)])
    row = inspect(my_model, data).shown[0]
    assert {t.weight for t in row.tokens if t.kind == "trained"} == {0.5}
    assert {t.weight for t in row.tokens if t.kind != "trained"} == {1.0}


def test_a_bad_row_is_one_sentence(my_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [*chats(20), {"messages": "no"}])
    result = invoke("inspect", *keys(my_model, data))
    assert result.exit_code == 2 and "row 20" in result.stderr and not result.stdout
