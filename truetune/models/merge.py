"""Adapters of one base added with weights, as one adapter or as a whole model, and read back.

    y = W x + sum_i w_i s_i B_i A_i x

Exact, whatever their ranks, scalings and modules are (``models.join``). What is no such sum is refused: DoRA divides
by a norm of the whole, and of modules trained in full there can be only one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraModel, PeftModel

from truetune.errors import UserError
from truetune.models.adapt import lora_layers
from truetune.models.adapter import base_of, note_base, provenance, require_base, shapes
from truetune.models.export import Export, compare, export_whole, logits, read_back, reload
from truetune.models.join import write_joined
from truetune.models.load import Loaded, explained, quiet

PROBE = (4, 64)
"""Documents and tokens of each, drawn at random, that logits are compared on: no data is at hand."""


def merge(loaded: Loaded, weights: Mapping[Path, float], target: Path, whole: bool) -> Export:
    """Write the sum of the adapters in the folders of ``weights`` over ``loaded``, in fp32, to ``target``.

    whole: the model with the sum in it, else one adapter. Raises UserError for adapters that can't be added.
    """
    _require_sums(weights, loaded)
    model = _summed(loaded, weights)
    attention = loaded.model.config._attn_implementation or "eager"
    tokens = torch.randint(
        loaded.model.config.get_text_config().vocab_size, PROBE, generator=torch.Generator().manual_seed(0)
    )
    probe: list[list[int]] = tokens.tolist()
    truth = logits(model, probe)
    if whole:
        return export_whole(model, attention, loaded, target, truth, probe)
    write_joined(model, dict.fromkeys(model.peft_config, 1.0), target)
    note_base(target, loaded, merged=[provenance(str(f)) | {"weight": w} for f, w in weights.items()])
    loaded.tokenizer.save_pretrained(target)
    got = read_back(lambda: PeftModel.from_pretrained(reload(loaded, loaded.folder, torch.float32), target), probe)
    return compare("adapter", target, truth, got, torch.float32)


def _require_sums(weights: Mapping[Path, float], loaded: Loaded) -> None:
    bases, layouts = set(), set()
    for folder in weights:
        require_base(folder, loaded)
        config = shapes(folder)
        bases.add(base_of(folder)[0])
        layouts.add(config.fan_in_fan_out)
        if config.use_dora:
            raise UserError(
                f"{folder} is a DoRA adapter, which is no sum that others can be added to; merge its run alone with: "
                "truetune export"
            )
        if config.modules_to_save:
            raise UserError(
                f"{folder} holds modules trained in full ({config.modules_to_save[0]}), of which a model has one; "
                "merge its run with: truetune export"
            )
    if len(bases) > 1:
        raise UserError(f"the adapters stand on different bases ({', '.join(sorted(bases))}); merge those of one base")
    if len(layouts) > 1:
        raise UserError("the adapters store their layers in different layouts; merge those of one kind of layer")


def _summed(loaded: Loaded, weights: Mapping[Path, float]) -> PeftModel:
    """The base with all adapters active, each scaled by its weight: PEFT's own computation of their sum."""
    names = [f"part{i}" for i in range(len(weights))]
    first, *rest = zip(names, weights, strict=True)
    with quiet(), explained(str(first[1])):
        model = PeftModel.from_pretrained(loaded.model, first[1], adapter_name=first[0])
        for name, folder in rest:
            model.load_adapter(folder, adapter_name=name)
    cast(LoraModel, model.base_model).set_adapter(names)
    for layer in lora_layers(model).values():
        for name, weight in zip(names, weights.values(), strict=True):
            if name in layer.scaling:
                layer.scaling[name] *= weight
    return model.eval()
