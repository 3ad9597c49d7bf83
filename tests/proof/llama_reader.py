"""Reads a GGUF file with llama.cpp, in a process and an environment of its own: JSON in, JSON out.

Given ``file``, ``texts``, ``prompts`` (token ids) and ``count``, it tokenises the texts and continues the prompts
greedily, ``count`` tokens each, with keys and values kept in fp32. For every token it says by how much its logit was
above the next.
"""

import json
import sys

import numpy as np
from llama_cpp import Llama


def continued(model: Llama, prompt: list[int], count: int) -> tuple[list[int], list[float]]:
    model.reset()
    model.eval(prompt)
    tokens, leads = [], []
    for _ in range(count):
        logits = model.scores[model.n_tokens - 1]
        best = np.sort(logits)[-2:]
        tokens.append(int(logits.argmax()))
        leads.append(float(best[1] - best[0]))
        model.eval(tokens[-1:])
    return tokens, leads


def main() -> None:
    job = json.load(sys.stdin)
    model = Llama(
        job["file"], n_ctx=512, logits_all=True, n_threads=1, type_k=0, type_v=0, flash_attn=False, verbose=False
    )
    texts = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    begun = model.tokenize(b"a", add_bos=True, special=True)
    chosen = [continued(model, prompt, job["count"]) for prompt in job["prompts"]]
    json.dump({"texts": texts, "begun": begun, "chosen": chosen}, sys.stdout)


if __name__ == "__main__":
    main()
