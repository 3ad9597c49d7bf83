"""A small random copy of a model, on which a property of its kind is tried at no cost.

It has every kind of layer, and windows and limits of positions shorter than the documents it is tried on.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from truetune.models.load import quiet

LIMIT, ROOM = 8, 64
"""Positions of a copy whose limit is to be crossed, and of one whose limit is not."""
_BEGIN = "original_max_position_embeddings"
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")


def positions_of(config: PreTrainedConfig) -> int | None:
    """How many positions a config promises, or None where it says nothing."""
    text = config.get_text_config()
    found = (getattr(text, name, None) for name in _POSITIONS)
    return next((int(n) for n in found if n), None)


def scaling_of(config: PreTrainedConfig) -> list[dict[str, object]]:
    """The parameters of rotary positions: one dict, or one for each kind of layer."""
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [part for part in rope.values() if isinstance(part, dict)]
    return parts or ([rope] if rope else [])


def small_copy(model: PreTrainedModel, *, cross: bool = True, table: bool = False) -> PreTrainedModel:
    """A random fp32 copy of ``model`` on the CPU, with a vocabulary of 64, in evaluation mode and with eager attention.

    cross: rotary scaling begins at ``LIMIT`` positions, so that documents of the trial cross it; else they do not.
    table: a table of positions has ``LIMIT`` rows too.
    """
    config = copy.deepcopy(model.config)
    layers = config.num_hidden_layers
    keep = _one_of_each(getattr(config, "layer_types", None), layers)
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == layers:
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)
    config.vocab_size = 64
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, None)
    for name, value in list(vars(config).items()):
        if isinstance(value, int) and name in ("sliding_window", "attention_chunk_size"):
            setattr(config, name, 5)
        elif isinstance(value, int) and name.endswith("intermediate_size"):
            setattr(config, name, 64)
    limit = LIMIT if cross else ROOM
    if table or scaling_of(config):
        for name in _POSITIONS:
            if getattr(config, name, None):
                setattr(config, name, limit)
    # Some configs state where scaling begins beside its other parameters, some among them.
    if getattr(config, _BEGIN, None):
        setattr(config, _BEGIN, limit)
    for part in scaling_of(config):
        if _BEGIN in part:
            part[_BEGIN] = limit
    config._attn_implementation = "eager"
    small = type(model)(config).float().eval()
    with torch.no_grad():
        for p in small.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return small


def scaling_begins(config: PreTrainedConfig) -> int | None:
    """Documents longer than this are what changes a rotary scaling that follows the longest one; None without any."""
    found = [part.get(_BEGIN) for part in scaling_of(config)] + [getattr(config, _BEGIN, None)]
    stated = [n for n in found if isinstance(n, int)]
    return min(stated) if stated else positions_of(config)


def takes_more_positions(model: PreTrainedModel) -> bool:
    """Whether models like ``model`` run beyond their config's positions: computed ones do, tables do not."""
    with torch.random.fork_rng(devices=[]), quiet(), torch.no_grad():
        small = small_copy(model, table=True)
        try:
            small(input_ids=torch.arange(LIMIT + 4)[None], use_cache=False)
        except (IndexError, RuntimeError, ValueError):  # of a table that is too short
            return False
    return True


def _one_of_each(types: list[str] | None, layers: int) -> list[int]:
    """Indices of at least two layers that hold every kind of layer, in order."""
    if not types:
        return list(range(min(2, layers)))
    first = {kind: types.index(kind) for kind in types}
    keep = sorted(first.values())
    return keep if len(keep) > 1 else list(range(min(2, layers)))
