"""A trained model as one GGUF file with an Ollama ``Modelfile``, read back before anyone is told of it.

The file is read with the ``gguf`` package: every key and token must be as written, every weight within its type's
bound of the live one, and the logits computed from it are compared as those of every export are. What reads it in
the end is llama.cpp, whose tokens are compared with the live model's in ``tests/proof/test_gguf.py``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import truetune
from truetune.errors import UserError
from truetune.models.export import GGUF_FILE, MODELFILE, Export, live_logits, logits, merged_copy
from truetune.models.gguf.architecture import (
    ROPE_FACTORS,
    Spelling,
    architecture_of,
    describe,
    rope_factors,
    spellings,
)
from truetune.models.gguf.chat import begins_with_bos, measure, turn_end
from truetune.models.gguf.vocabulary import Vocabulary, read_vocabulary
from truetune.models.load import Loaded
from truetune.models.wrap import CausalLM


def _q8_0_error(weight: np.ndarray) -> np.ndarray:
    """Blocks of 32 share a scale d = max|w| / 127, kept in fp16: half a step, and 127 times the error of d."""
    blocks = np.abs(weight).reshape(-1, 32).max(axis=1, keepdims=True) / 127
    return np.broadcast_to(blocks * (0.5 + 127 * 2.0**-11) + 127 * 2.0**-24, (len(blocks), 32)).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class Precision:
    """How matrices are stored: type, llama.cpp's number for such a file, and what may be lost.

    error: largest difference of each weight, for an array of them; logits: bound relative to the largest logit.
    """

    type: Type
    file_type: gguf.LlamaFileType
    error: Callable[[np.ndarray], np.ndarray]
    logits: float


PRECISIONS = {
    "f32": Precision(Type.F32, gguf.LlamaFileType.ALL_F32, np.zeros_like, 1e-4),
    "f16": Precision(Type.F16, gguf.LlamaFileType.MOSTLY_F16, lambda w: np.abs(w) * 2.0**-11 + 2.0**-25, 1e-2),
    "bf16": Precision(Type.BF16, gguf.LlamaFileType.MOSTLY_BF16, lambda w: np.abs(w) * 2.0**-8, 1e-1),
    "q8_0": Precision(Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0, _q8_0_error, 2.5e-1),
}
"""Names for output.gguf. Norms and biases are always f32; rows that are no whole number of blocks are f16 in q8_0."""


def require_writable(loaded: Loaded) -> None:
    """Raise UserError, in seconds instead of after the run, for a model that no GGUF file can hold."""
    spellings(loaded.model, architecture_of(loaded.model.config))
    rope_factors(loaded.model.config, architecture_of(loaded.model.config))
    _vocabulary(loaded, loaded.model)


def export_gguf(
    model: CausalLM, loaded: Loaded, folder: Path, probe: Sequence[Sequence[int]], precision: str
) -> Export:
    """Write the model, adapters merged, with its tokenizer and chat template; read all of it back.

    precision: a name in ``PRECISIONS``. probe: documents as token ids.
    Raises UserError where llama.cpp could not compute or tokenise the same, or what was read back is not the model.
    """
    truth = live_logits(model, probe)
    whole = merged_copy(model.model, model.route.published).cpu()
    architecture = architecture_of(whole.config)
    vocabulary = _vocabulary(loaded, whole)
    file = folder / GGUF_FILE.format(precision)
    weights = _Weights(whole, spellings(whole, architecture), rope_factors(whole.config, architecture))
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture.name])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(loaded.source).stem)
    writer.add_file_type(PRECISIONS[precision].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    describe(writer, whole.config, architecture)
    _add_vocabulary(writer, vocabulary)
    _add_origin(writer, loaded)
    written = dict(writer.kv_data[0])
    _write(writer, weights, PRECISIONS[precision])
    _read_back(file, written, weights, PRECISIONS[precision])
    whole.to(model.model.device)  # type: ignore[arg-type]  # as in assembly: the signature is lost
    got = logits(whole, probe)  # its weights are now those of the file
    difference, bound = float((got - truth).abs().max()), PRECISIONS[precision].logits * float(truth.abs().max())
    note = _write_modelfile(folder, file, loaded, vocabulary)
    return Export(f"gguf-{precision}", str(folder), difference, bound, note)


def _vocabulary(loaded: Loaded, model: PreTrainedModel) -> Vocabulary:
    tokenizer = loaded.tokenizer
    size = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    return read_vocabulary(tokenizer, size, turn_end(tokenizer, loaded.stop_ids), begins_with_bos(tokenizer))


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_token_scores(vocabulary.scores)
    for kind, token in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{kind}_token_id", token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    if vocabulary.space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.space_prefix)


def _add_origin(writer: gguf.GGUFWriter, loaded: Loaded) -> None:
    writer.add_string("truetune.version", truetune.__version__)
    writer.add_string("truetune.base.sha256", loaded.digest)
    if loaded.tokenizer.chat_template:
        template = loaded.tokenizer.get_chat_template()
        writer.add_chat_template(template)
        writer.add_string("truetune.chat_template.sha256", hashlib.sha256(template.encode()).hexdigest())


class _Weights:
    """The weights of a model by the names and in the order of the file, one in memory at a time."""

    def __init__(self, model: PreTrainedModel, names: Mapping[str, Spelling], factors: np.ndarray | None) -> None:
        self._state = model.state_dict()
        self._names = {spelling.name: (name, spelling) for name, spelling in names.items()}
        self._factors = factors

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        if self._factors is not None:
            yield ROPE_FACTORS, self._factors
        for target, (name, spelling) in self._names.items():
            yield target, np.ascontiguousarray(spelling.spelled(self._state[name].numpy()))

    @torch.no_grad()
    def put(self, target: str, weight: np.ndarray) -> None:
        """Let the model compute with what the file holds."""
        if target in self._names:
            name, spelling = self._names[target]
            self._state[name].copy_(torch.from_numpy(spelling.read(weight).copy()))


def _stored_as(weight: np.ndarray, precision: Precision) -> Precision:
    if weight.ndim < 2:
        return PRECISIONS["f32"]
    whole = weight.shape[-1] % gguf.GGML_QUANT_SIZES[precision.type][0] == 0
    return precision if whole else PRECISIONS["f16"]


def _write(writer: gguf.GGUFWriter, weights: _Weights, precision: Precision) -> None:
    for name, weight in weights:
        kind = _stored_as(weight, precision).type
        if kind == Type.F16 and np.abs(weight).max() > np.finfo(np.float16).max:
            raise UserError(f"{name} has weights beyond the range of f16; write bf16 or f32")
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, weight.shape, weight.dtype, weight.size // block * size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, weight in weights:
            writer.write_tensor_data(gguf.quantize(weight, _stored_as(weight, precision).type))
    finally:
        writer.close()


def _read_back(file: Path, written: Mapping[str, gguf.GGUFValue], weights: _Weights, precision: Precision) -> None:
    """Put what the file holds into the model. Raises UserError where it is not what was written."""
    reader = gguf.GGUFReader(file)
    for key, value in written.items():
        field = reader.get_field(key)
        if field is None or not _same(field.contents(), value.value):
            _broken(f"the key {key}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, weight in weights:
        kind = _stored_as(weight, precision)
        tensor = tensors.pop(name, None)
        if tensor is None or tensor.tensor_type != kind.type:
            _broken(f"the tensor {name}")
        read = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        if not (np.abs(read - weight) <= kind.error(weight)).all():
            _broken(f"a weight of {name}")
        weights.put(name, read)
    if tensors:
        _broken(f"the tensor {min(tensors)}")


def _same(read: Any, written: Any) -> bool:
    if isinstance(written, float):
        return bool(np.float32(written) == np.float32(read))
    return bool(list(read) == list(written) if isinstance(written, Sequence) else read == written)


def _broken(what: str) -> NoReturn:
    raise UserError(f"the GGUF file does not read back as it was written ({what}); please report it")


def _write_modelfile(folder: Path, file: Path, loaded: Loaded, vocabulary: Vocabulary) -> str | None:
    """Write what ``ollama create`` reads; what its user must know."""
    tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
    lines = ["# Written by truetune, for: ollama create NAME -f Modelfile", f"FROM ./{file.name}"]
    note = None
    try:
        shape = measure(tokenizer, vocabulary.add_bos)
        lines.append(f'TEMPLATE """{shape.go()}"""')
        if shape.strips:
            note = "the chat template takes away the spaces around a message, which Ollama's leaves: send none"
    except UserError as reason:
        note = f"the Modelfile has no TEMPLATE, so Ollama guesses one: {reason}"
    lines += [f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}" for text in _stops(loaded, vocabulary)]
    if note:
        lines.insert(1, f"# Note: {note}")
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return note


def _stops(loaded: Loaded, vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.tokens[token] for token in sorted(loaded.stop_ids) if token < len(vocabulary.tokens)]
