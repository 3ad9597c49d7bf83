"""The model as transformers loads it, and the adapter upon it as PEFT does."""

from __future__ import annotations

from typing import Any

from protocol import Side

PACKAGES = ("torch", "transformers", "peft")


def load(side: Side) -> Any:
    """The model with everything in place to be trained: frozen weights in ``side.stored``, trained ones in fp32."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(side.job["model"], dtype=side.stored)
    if side.job["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, side.job["adapter"], is_trainable=True)
    model.train()
    return model


def trained(model: Any) -> list[Any]:
    return [p for p in model.parameters() if p.requires_grad]
