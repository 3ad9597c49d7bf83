import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from truetune.report import card
from truetune.report.card import markdown


@pytest.fixture
def written(make_run):
    """written(config file name, ...) -> (front matter, body)."""

    def write(config="adapter_config.json", **how):
        folder = make_run(**how)
        target = folder / "adapter"
        target.mkdir()
        if config:
            (target / config).write_text("{}")
        text = card(folder, target).read_text(encoding="utf-8")
        _, front, body = text.split("---\n", 2)
        return yaml.safe_load(front), body

    return write


def code(body: str) -> str:
    return re.search(r"```python\n(.*?)```", body, re.S)[1]


def test_an_adapter(written):
    front, body = written()
    assert front == {
        "base_model": "acme/tiny-chat",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "tags": ["truetune", "lora"],
    }
    for text in (
        "# python-docs-lora",
        "A LoRA adapter for acme/tiny-chat, trained on python-docs with Truetune 0.1.0.",
        "| Loss (nats per target token) | 3.587 | 2.882 |",
        "changed by \u221219.7\u00a0%, measured on 5,020 target tokens",
        "| Target tokens | 100,240 (36.9\u00a0%) | 5,020 (37.5\u00a0%) |",
        "| Peak learning rate | 0.0005 |",
        "| held | packing | perturbed neighbour changes the loss by 0, bound 0 |",
        "| within bound | merged | 0.00031 | 0.001 |",
        "| torch | 2.13.0+cpu |",
    ):
        assert text in body
    assert "AutoPeftModelForCausalLM" in code(body) and "apply_chat_template" in code(body)
    assert "**Warning:**" not in body and "/home/someone" not in body


def test_a_whole_model_trained_on_bare_text(written):
    def bare(facts):
        facts["data"]["train"]["template"] = None
        facts["recipe"]["adapter"] = {"method": "full"}
        facts["data"]["train"]["source"] = "acme/stories"
        return facts

    front, body = written("config.json", facts=bare)
    assert (front["library_name"], front["base_model_relation"]) == ("transformers", "finetune")
    assert front["tags"] == ["truetune"] and front["datasets"] == ["acme/stories"]
    assert "AutoModelForCausalLM" in code(body) and "apply_chat_template" not in code(body)
    assert "| Method | every weight |" in body and "Rank" not in body


@pytest.mark.parametrize("source", ["./models/tiny", "/home/someone/models/tiny", "tiny", "C:\\models\\tiny"])
def test_a_folder_is_no_base_model_on_the_hub(written, source):
    def local(facts):
        facts["model"] |= {"source": source, "license": None}
        return facts

    front, body = written(facts=local)
    assert not {"base_model", "base_model_relation", "license"} & set(front)
    assert "tiny, trained on" in body and "/home/someone" not in body


def test_the_card_of_the_run_folder_leads_to_its_first_export(make_run):
    folder = make_run()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    body = card(folder, folder).read_text()
    assert 'path = "adapter"' in code(body) and "A LoRA adapter for" in body


def test_what_is_wrong_is_said_first(written):
    def differing(facts):
        facts["exports"][1]["passed"] = False
        return facts | {"status": "interrupted"}

    _, body = written(failing=("packing",), facts=differing, steps=31)
    head = body.split("## How to load it")[0]
    assert "> **Warning:** Interrupted at step 31 of 70;" in head
    assert "> **Warning:** The check “packing” failed: perturbed neighbour" in head
    assert "> **Warning:** The export “merged” does not give the trained model's logits." in head
    assert "| **failed** | packing |" in body and "Not quoted: the check" in body


def test_a_card_without_any_facts(written):
    front, body = written(config=None, facts=None, steps=0)
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert "has no run.json" in body and "How to load it" not in body
    assert "| Loss (nats per target token) | 3.587 | not recorded |" in body


def test_hostile_rows_stay_text(written):
    front, body = written(hostile=True)
    assert set(front) == {
        "base_model",
        "base_model_relation",
        "library_name",
        "pipeline_tag",
        "license",
        "tags",
    }
    parser = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    kinds = set()
    for token in parser.parse(body):
        kinds |= {token.type, *(child.type for child in token.children or ())}
    assert not kinds & {"html_inline", "html_block", "image", "link_open", "code_inline", "em_open", "s_open"}
    rows = [line for line in body.splitlines() if line.startswith("| Source")]
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 4, "no new cell"
    assert not re.search(r"https?://|www\.", body), "nothing that a renderer would make a link of"


@pytest.mark.parametrize("text", ["a*b*_c_", "`x` <b> & [y](z) ![i](j)", "# no\n- heading", "$x$ ~~s~~ a|b @you"])
def test_markdown_shows_the_very_text(text):
    inline = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(f"x {markdown(text)}")[1]
    assert {child.type for child in inline.children} <= {"text", "text_special"}
    assert "".join(child.content for child in inline.children) == "x " + " ".join(text.split())


def test_the_code_in_the_card_runs(make_run, monkeypatch, capsys):
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = make_run()
    words = Tokenizer(models.WordLevel({"<eos>": 0, "Your": 1, "question": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
    )
    base, adapter = folder / "base", folder / "adapter"
    LlamaForCausalLM(config).save_pretrained(base)
    tuned = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    tuned.save_pretrained(adapter)
    for target in (base, adapter):
        tokenizer.save_pretrained(target)
        monkeypatch.chdir(target)
        body = card(folder, target).read_text()
        exec(compile(code(body).replace("max_new_tokens=96", "max_new_tokens=2"), "card", "exec"), {})
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert len(capsys.readouterr().out.splitlines()) == 2
