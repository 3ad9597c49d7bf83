"""Recipe -> the optimizer: its rule, over which parameters, at which rates, and what goes around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer

from truetune import registry
from truetune.errors import UserError
from truetune.models.wrap import CausalLM
from truetune.optim import EMA, KINDS, MUP, OPTIMIZERS, Growth, Mechanic, NaP, Rule, kinds_of, parameter_groups
from truetune.recipe import Recipe


def build_optimizer(recipe: Recipe, model: CausalLM) -> Optimizer:
    """The recipe's rule over the model's trained parameters; of what it does not take, AdamW."""
    chosen = recipe.optimizer
    optimizer = registry.bind("optimizer", OPTIMIZERS, chosen.name, chosen.options)
    rule = registry.resolve("optimizer", OPTIMIZERS, chosen.name)
    finder = "optimizer.mechanic" if chosen.mechanic else f'optimizer "{chosen.name}"'
    if (chosen.mechanic or getattr(rule, "finds_rate", False)) and "rate" not in chosen.model_fields_set:
        raise UserError(f"{finder} finds its rate, and optimizer.rate multiplies it; set it to 1")
    takes = getattr(rule, "takes", None)
    if (takes is None or getattr(rule, "probes", False)) and chosen.takes is not None:
        raise UserError(f'optimizer.takes means nothing with optimizer "{chosen.name}", which takes all; remove it')
    if "vectors" in (chosen.takes or ()) and "vectors" not in (takes or KINDS):
        raise UserError(f'optimizer.takes has vectors, but optimizer "{chosen.name}" is for matrices; take it out')
    kinds = kinds_of(model.model, model.head.weight)
    rest = {name for name in model.trainable() if kinds[name] not in (chosen.takes or takes or KINDS)}
    others = {name for name in model.trainable() if kinds[name] != "matrices"}
    if chosen.rest_rate is not None and not rest:
        _require_two_rates(chosen.name, rule, others)
    ratio = recipe.adapter.lora_plus_ratio if isinstance(model.model, PeftModel) else 1.0
    wide = {name for name in model.trainable() if kinds[name] in ("matrices", "head")}
    apart = rest or (others if chosen.rest_rate is not None else ())
    groups = parameter_groups(
        model.trainable().items(), chosen.rate, ratio, apart, chosen.rest_rate, *_width(recipe, model, wide), bool(rest)
    )
    hidden = [p for name, p in model.trainable().items() if kinds[name] == "matrices"]
    return _around(_built(optimizer, groups, recipe), recipe, hidden)


def _require_two_rates(name: str, rule: object, others: set[str]) -> None:
    """Raise UserError where a second rate means nothing to a rule that takes all; others: what is no matrix."""
    finds = getattr(rule, "finds_rate", False)
    if finds or not others:
        why = f'with optimizer "{name}", which finds one rate for all' if finds else "where only matrices are trained"
        raise UserError(f"optimizer.rest_rate means nothing {why}; remove it")


def _width(recipe: Recipe, model: CausalLM, wide: set[str]) -> tuple[set[str], float]:
    """muP's slower tensors, of ``wide``, and by how much they are so. Raises UserError where its rates do not hold."""
    chosen = recipe.optimizer
    if chosen.mup_width is None:
        return set(), 1.0
    if chosen.name not in MUP:
        raise UserError(
            f'optimizer.mup_width means nothing with optimizer "{chosen.name}", whose steps are not of the size of the '
            f"rate; use one of {', '.join(MUP)}"
        )
    if model.head.weight is model.hf.get_input_embeddings().weight:
        raise UserError(
            "optimizer.mup_width is for models whose head has a weight of its own, since one that is tied to the "
            "embedding learns at one rate and muP wants two; remove it"
        )
    return wide, model.head.weight.shape[-1] / chosen.mup_width


def _around(rule: Optimizer, recipe: Recipe, hidden: Sequence[Tensor]) -> Optimizer:
    """The rule with what the recipe puts around it; hidden: the trained matrices."""
    chosen, train = recipe.optimizer, recipe.train
    _require_fit(rule, recipe)
    if chosen.mechanic:
        rule = Mechanic(rule)
    if chosen.nap:
        rule = NaP(rule, hidden)
    if chosen.ema is not None:
        rule = EMA(rule, chosen.ema)
    return rule if train.clip_growth is None else Growth(rule, train.clip_growth)


def _require_fit(rule: Optimizer, recipe: Recipe) -> None:
    """Raise UserError for what means nothing around ``rule``."""
    chosen, train = recipe.optimizer, recipe.train
    name = f'optimizer "{chosen.name}"'
    if getattr(rule, "probes", False):
        _require_no_gradients(name, recipe)
    averages, finds, sees = (getattr(rule, trait, False) for trait in ("averages_weights", "finds_rate", "sees_loss"))
    clipping = {"train.clip": train.clip, "train.clip_growth": train.clip_growth}
    key = next((key for key, value in clipping.items() if value is not None), None)
    if sees and key:
        raise UserError(f"{name} holds each gradient against its loss, so it must not be clipped; set {key}=none")
    own = "finds its own rate" if finds else "takes its rate from the loss" if sees else None
    own = "keeps an average of its weights" if averages else own
    if chosen.mechanic and own:
        raise UserError(f"optimizer.mechanic means nothing with {name}, which {own}; remove it")
    if chosen.ema is not None and averages:
        raise UserError(f"optimizer.ema means nothing with {name}, which keeps an average of its own; remove it")
    if chosen.nap and (chosen.mechanic or averages):
        other = "optimizer.mechanic" if chosen.mechanic else name
        raise UserError(
            f"optimizer.nap means nothing with {other}, which goes by how far weights are from where they began; "
            "remove one"
        )


def _require_no_gradients(name: str, recipe: Recipe) -> None:
    """Raise UserError for a key that is about gradients, or weights found again only nearly."""
    chosen, train = recipe.optimizer, recipe.train
    keys: dict[str, object] = {
        "train.clip": train.clip,
        "train.clip_growth": train.clip_growth,
        "train.activation_memory": train.activation_memory,
        "train.filtered_loss": train.filtered_loss,
        "adapter.dropout": recipe.adapter.dropout,
        "optimizer.mechanic": chosen.mechanic,
        "optimizer.ema": chosen.ema,
        "optimizer.nap": chosen.nap,
    }
    if key := next((key for key, value in keys.items() if value), None):
        mend = f"set {key}=none" if key.startswith("train.") and keys[key] is not True else "remove it"
        raise UserError(f"{key} means nothing with {name}, which takes no gradients and drops nothing; {mend}")
    if recipe.model.weights == "bf16":
        raise UserError(
            f"model.weights=bf16 does not go with {name}, which moves all weights to and fro and must find them again; "
            "set model.weights=fp32"
        )


def _built(optimizer: Callable[..., Optimizer], groups: list[dict[str, Any]], recipe: Recipe) -> Optimizer:
    name = f'optimizer "{recipe.optimizer.name}"'
    try:
        built = optimizer(groups, recipe.optimizer.rate)
    except (ValueError, TypeError) as error:
        raise UserError(f"{name}: {error}; correct the options under optimizer") from error
    if not isinstance(built, Optimizer) or not all("peak" in group for group in built.param_groups):
        raise UserError(
            f"{name} is no torch.optim.Optimizer over the groups that it was given; subclass it, and hand them on"
        )
    low = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
    if low and not isinstance(built, Rule):
        raise UserError(
            f"{name} would round what it does to bf16 weights to the nearest, and so lose small updates; make it a "
            "truetune.optim.Rule, or set model.weights=fp32"
        )
    return built
