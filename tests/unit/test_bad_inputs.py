"""Bad input of every kind through the command line: one sentence, status 2, and no folder left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from folders import chats, keys, tokenizer, write_model, write_rows
from typer.testing import CliRunner

from truetune.cli import app


class Place:
    """An empty folder with a copy of the tiny model in ``model``, its data in ``data.jsonl``, and a run in ``out``."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model, self.data, self.out = (
            folder,
            folder / "model",
            folder / "data.jsonl",
            folder / "out",
        )
        shutil.copytree(model, self.model)
        write_rows(self.data, chats())

    def train(self, *more: str) -> list[str]:
        """The command line of a run, ``more`` overriding."""
        return ["train", *keys(self.model, self.data, self.out, *more)]

    def config(self, **changes: Any) -> None:
        file = self.model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    def rows(self, *rows: Any) -> list[str]:
        """Train on these rows alone; a string is written as it is."""
        lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
        self.data.write_text("\n".join(lines) + "\n")
        return self.train()

    def asking(self, *turns: tuple[str, Any]) -> list[str]:
        """A third row with these turns."""
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        return self.rows(*chats(2), row)


Case = tuple[str, Callable[[Place], Iterable[str] | None], str]
"""A name, what is done to the place (and the command line, if it is not the plain run), what the sentence says."""


def removed(place: Place, name: str) -> None:
    (place.model / name).unlink()


def truncated(place: Place) -> None:
    file = place.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_tensor(place: Place) -> None:
    from safetensors.torch import load_file, save_file

    file = place.model / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})


def of_another_shape(place: Place) -> None:
    place.config(intermediate_size=64)


def pickled(place: Place) -> None:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")


def encoder(place: Place) -> None:
    from transformers import BertConfig, BertLMHeadModel

    size = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    BertLMHeadModel(BertConfig(vocab_size=len(tokenizer()), **size)).save_pretrained(place.model)


def text_to_text(place: Place) -> None:
    place.config(model_type="t5", architectures=["T5ForConditionalGeneration"])


def unknown_tokens(place: Place) -> None:
    words = tokenizer()
    words.add_tokens(["What is"])
    words.save_pretrained(place.model)


def too_few_positions(place: Place) -> None:
    shutil.rmtree(place.model)
    write_model(place.model, "gpt2", n_positions=24)


def without_template_and_end(place: Place) -> None:
    words = tokenizer(template=None)
    words.eos_token = None
    removed(place, "chat_template.jinja")
    words.save_pretrained(place.model)


def not_gguf(place: Place) -> list[str]:
    file = place.folder / "model.gguf"
    file.write_bytes(b"this is text, not a model" * 9)
    return place.train(f"model.path={file}")


def half_a_gguf(place: Place) -> list[str]:
    file = place.folder / "model.gguf"
    file.write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x07" * 40)
    return place.train(f"model.path={file}")


def occupied(place: Place) -> None:
    place.out.mkdir()
    (place.out / "precious.txt").write_text("mine")


def below_a_file(place: Place) -> list[str]:
    return place.train(f"output.folder={place.data}/out")


def no_run(place: Place) -> list[str]:
    (place.folder / "plain").mkdir()
    return ["train", "--resume", f"{place.folder}/plain"]


def only_a_recipe(place: Place) -> list[str]:
    from truetune import spelling

    folder = place.folder / "hollow"
    folder.mkdir()
    spelling.write(spelling.read(None, place.train()[1:]), folder / "recipe.yaml")
    return ["train", "--resume", str(folder)]


def broken_facts(place: Place) -> list[str]:
    only_a_recipe(place)
    (place.folder / "hollow" / "run.json").write_text('{"format": 1, ')
    return ["report", f"{place.folder}/hollow"]


def empty_folder(place: Place) -> list[str]:
    (place.folder / "nothing").mkdir()
    return place.train(f"data.source={place.folder}/nothing")


def recipe_of_another_kind(place: Place) -> list[str]:
    (place.folder / "recipe.json").write_text("{}")
    return ["train", f"{place.folder}/recipe.json"]


def long_answers(place: Place) -> list[str]:
    rows = [{"prompt": f"Say {i}", "completion": "word " * (60 if i % 4 else 4)} for i in range(40)]
    return place.rows(*rows)


def long_questions(place: Place) -> list[str]:
    return place.rows(*({"prompt": "why? " * 200, "completion": f"{i}"} for i in range(40)))


CASES: list[Case] = [
    # the model
    ("no model folder", lambda p: shutil.rmtree(p.model), "neither a model folder nor a GGUF file; correct model.path"),
    ("no config", lambda p: removed(p, "config.json"), "has no config.json, .*; correct model.path"),
    (
        "config is no JSON",
        lambda p: (p.model / "config.json").write_text('{"model_type": ') and None,
        "can't load .*config",
    ),
    (
        "config without a type",
        lambda p: (p.model / "config.json").write_text("{}") and None,
        "can't load .*; name a folder",
    ),
    ("weights truncated", truncated, "can't load .*; name a folder"),
    ("weights not there", lambda p: removed(p, "model.safetensors"), "can't load .*; name a folder"),
    ("weights pickled", pickled, "can't load .*; name a folder"),
    ("weights lack a tensor", without_a_tensor, "lacks 1 weights .*up_proj.*; get the complete model"),
    ("weights of another shape", of_another_shape, r"of shape \[32, 48\] where its config asks for \[32, 64\]; get"),
    ("no tokenizer", lambda p: removed(p, "tokenizer.json"), "can't load .*; name a folder"),
    (
        "broken tokenizer",
        lambda p: (p.model / "tokenizer.json").write_text("{}") and None,
        "can't load .*; name a folder",
    ),
    ("an encoder", encoder, "no causal language model; "),
    ("text to text", text_to_text, "can't load .* as a causal language model"),
    ("quantised", lambda p: p.config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantised weights"),
    (
        "tokens that the model does not know",
        unknown_tokens,
        r"row \d+ .*has token \d+, but the model has \d+; use the tokenizer of",
    ),
    ("more tokens than positions", too_few_positions, "the model has 24 positions; set data.max_length to 24"),
    ("neither template nor eos", without_template_and_end, "neither a chat template nor an eos token, .*; set one"),
    ("not a GGUF file", not_gguf, "can't load .*model.gguf"),
    ("half a GGUF file", half_a_gguf, "can't load .*model.gguf"),
    ("no GGUF file", lambda p: p.train("model.path=gone.gguf"), "no file gone.gguf; correct model.path"),
    (
        "hub id without a network",
        lambda p: p.train("model.path=nobody/nothing"),
        "no folder nobody/nothing here, .*; check the path",
    ),
    ("hub data without a network", lambda p: p.train("data.source=nobody/nothing"), "could not be had from the hub"),
    # the data
    ("no data file", lambda p: p.data.unlink(), "there is no data at .*; "),
    ("empty file", lambda p: p.rows(""), "has no rows; "),
    ("bad JSON", lambda p: p.rows(*chats(2), '{"messages": ['), r"data\.jsonl:3 is not JSON"),
    ("one row", lambda p: p.rows(*chats(1)), "has a single row, so none .*; name another evaluation.source"),
    ("equal rows", lambda p: p.rows(*chats(1) * 3), "has only equal rows, .*; name another evaluation.source"),
    ("unknown columns", lambda p: p.rows(*({"q": "x", "a": str(i)} for i in range(9))), "rename the columns"),
    ("another column later", lambda p: p.rows(*chats(3), {"text": "x"}), "row 3 .*column messages is missing; "),
    ("unknown role", lambda p: p.asking(("human", "x")), "role 'human'; use one of system"),
    ("content is no string", lambda p: p.asking(("user", ["x"]), ("assistant", "y")), "is a list; give a string"),
    ("a format that rows are not", lambda p: p.train("data.format=alpaca"), "every row of alpaca needs instruction"),
    ("a bad row by its number in the file", lambda p: p.asking(("human", "x")), r"data\.jsonl: row \d+ \(the first"),
    ("no assistant", lambda p: p.asking(("user", "x")), "has no assistant turn"),
    ("every target cut", long_questions, "would cut 100.0% of the target tokens"),
    ("too much cut", long_answers, r"would cut \d+\.\d% of the target tokens .*; set data.max_length to \d+"),
    ("folder without data", empty_folder, "holds no data that can be read; give a folder"),
    ("no such split", lambda p: p.train("data.split=tset"), "has no split 'tset'; choose among: train"),
    ("no evaluation source", lambda p: p.train("evaluation.source=gone.jsonl"), "no data at 'gone.jsonl'.*; "),
    # the recipe
    ("row above micro batch", lambda p: p.train("data.max_length=4096"), "raise the latter"),
    ("unknown key", lambda p: p.train("train.stepps=3"), 'did you mean "steps"'),
    ("wrong type", lambda p: p.train("train.steps=soon"), "must be an integer"),
    ("unknown optimizer", lambda p: p.train("optimizer.name=adamwx"), 'did you mean "adamw"'),
    ("an optimizer that is none", lambda p: p.train("optimizer.name=operator:contains"), "is no torch.optim.Optimizer"),
    ("option of another schedule", lambda p: p.train("schedule.decay=0.1"), 'schedule.*"?decay'),
    ("unknown targets", lambda p: p.train("adapter.targets=[q_prjo]"), "names 'q_prjo', which is no linear layer"),
    ("targets that match nothing", lambda p: p.train("adapter.targets=x.*"), "matches no linear layer; "),
    ("DoRA on the head", lambda p: p.train("adapter.targets=[lm_head]", "adapter.dora=true"), "leave it out"),
    ("no adapter to continue", lambda p: p.train("adapter.path=gone"), "neither an adapter nor a run that exported"),
    ("targets are no regex", lambda p: p.train("adapter.targets=(q"), "no regular expression .*; correct it"),
    ("no CUDA", lambda p: p.train("device=cuda"), "sees no CUDA device; set device=auto"),
    ("no recipe", lambda p: ["train", f"{p.folder}/gone.yaml"], "there is no file .*gone.yaml"),
    ("recipe of another kind", recipe_of_another_kind, r"ends in \.yaml, \.yml, \.toml"),
    # folders
    ("occupied", occupied, "already holds something; name another output.folder"),
    ("below a file", below_a_file, "name another output.folder"),
    ("resume no run", no_run, "is not the folder of a run"),
    ("resume only a recipe", only_a_recipe, "is no run folder .*; name one"),
    ("report of broken facts", broken_facts, "run.json is not valid JSON .*; "),
    ("generate from nothing", lambda p: ["generate", f"{p.folder}/gone", "--prompt", "x"], "neither a model folder"),
    ("generate from a folder", lambda p: ["generate", str(p.folder.parent), "--prompt", "x"], "has no config.json"),
    ("export no run", lambda p: ["export", str(p.model)], "is no run folder .*; name one"),
    ("report of nothing", lambda p: ["report", f"{p.folder}/gone"], "is no run folder .*; name one"),
]


@pytest.mark.parametrize(("spoil", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_one_sentence_and_nothing_left(
    spoil: Callable[[Place], Iterable[str] | None],
    says: str,
    tmp_path: Path,
    my_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRUETUNE_CACHE", str(tmp_path / "cache"))
    place = Place(tmp_path, my_model)
    arguments = spoil(place) or place.train()
    there = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    result = CliRunner().invoke(app, list(arguments))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 2
    assert re.fullmatch(r"error: \S[^\n]+(; |, but must )[^\n]+[\w/)]\n", result.stderr), result.stderr
    assert re.search(says, result.stderr), result.stderr
    assert not re.search(r"Traceback|  |<class", result.stderr), result.stderr
    told = [line.split()[0] for line in result.stdout.splitlines()]
    assert told == ["reading", "loading", "tokenising"][: len(told)], "only what was begun"
    left = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}
    assert left == there and (place.out.exists() == any(place.out in p.parents for p in there))
