"""Which modules are adapted, and which are trained in full beside: from the words of a recipe to full names."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truetune.errors import UserError
from truetune.models.coverage import adaptable
from truetune.models.precision import PRODUCTS


def in_full(model: PreTrainedModel, head: str, also: str | Sequence[str]) -> list[str]:
    """Full names of the modules that ``also`` names: "embeddings", "head", "norms", names or their ends, or regular
    expressions.

    Where the head is tied to the embeddings, they are one tensor: either word stands for it, by the name of the
    embeddings. Raises UserError for a word that names nothing, and for modules within each other.
    """
    modules = {n: m for n, m in model.named_modules() if n and any(True for _ in m.parameters())}
    embeddings = embeddings_name(model)
    groups = {
        "embeddings": [embeddings],
        "head": [embeddings if is_tied(model) else head],
        "norms": [n for n, m in modules.items() if _is_norm(m)],
    }
    found: dict[str, None] = {}
    for word in [also] if isinstance(also, str) else also:
        try:
            named = groups.get(word) or [n for n in modules if n.endswith("." + word) or re.fullmatch(word, n)]
        except re.error as error:
            raise UserError(f"adapter.also: {word!r} is no regular expression ({error}); correct it") from error
        if not named:
            raise UserError(
                f"adapter.also names {word!r}, which is no module with weights here; use embeddings, head, norms, or "
                f"one of {', '.join(sorted({n.rpartition('.')[2] for n in modules}))}"
            )
        found |= dict.fromkeys(embeddings if n == head and is_tied(model) else n for n in named)
    inner = next(((a, b) for a in found for b in found if b.startswith(a + ".")), None)
    if inner:
        raise UserError(f"adapter.also names {inner[1]}, which is within {inner[0]}; name one of them")
    return list(found)


def is_tied(model: PreTrainedModel | PeftModel) -> bool:
    """Whether output layer and embeddings are one tensor."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def embeddings_name(model: PreTrainedModel) -> str:
    return next(n for n, m in model.named_modules() if m is model.get_input_embeddings())


def _is_norm(module: nn.Module) -> bool:
    own = list(module.parameters(recurse=False))
    return not isinstance(module, PRODUCTS) and not list(module.children()) and all(p.ndim == 1 for p in own)


def adapted_linears(model: PreTrainedModel, head: str, targets: str | Sequence[str], full: Sequence[str]) -> list[str]:
    """Full names of the linear layers that ``targets`` names, none of which is within the modules of ``full``.

    targets: "all-linear" (every linear layer that the model calls, but the head and those of ``full``), a regular
    expression over full module names, or a list of module names or their ends. Raises UserError if they name nothing.
    """
    linears = called_linears(model)
    if targets == "all-linear":
        wanted = adaptable(model, [n for n in linears if n != head and not _within(n, full)])
    elif isinstance(targets, str):
        try:
            wanted = [n for n in linears if re.fullmatch(targets, n)]
        except re.error as error:
            raise UserError(f"adapter.targets is no regular expression ({error}); correct it") from error
    else:
        wanted = [n for n in linears if any(n == t or n.endswith("." + t) for t in targets)]
        lost = [t for t in targets if not any(n == t or n.endswith("." + t) for n in linears)]
        if lost:
            raise UserError(f"adapter.targets names {lost[0]!r}, which is no linear layer here; {_known(linears)}")
    if not wanted:
        raise UserError(f"adapter.targets matches no linear layer; {_known(linears)}")
    if refused := set(wanted) - {head} - set(adaptable(model, [n for n in wanted if n != head])):
        raise UserError(f"PEFT can't adapt {min(refused)!r} of this model as it is; leave it out of adapter.targets")
    tied = [head] if head in wanted and is_tied(model) and embeddings_name(model) in full else []
    if both := [n for n in wanted if _within(n, full)] + tied:
        raise UserError(f"adapter.targets and adapter.also both name {both[0]}; choose one of them for it")
    return wanted


def _within(name: str, modules: Sequence[str]) -> bool:
    return any(name == m or name.startswith(m + ".") for m in modules)


def _known(linears: list[str]) -> str:
    names = sorted({n.rsplit(".", 1)[-1] for n in linears})
    return f"the model has {', '.join(names[:12])}"


@torch.no_grad()
def forward_once(model: PreTrainedModel, hooks: Sequence[RemovableHandle]) -> None:
    """Run ``model`` on a few tokens, in evaluation mode, for the sake of ``hooks``, which are removed then."""
    training = model.training
    model.eval()
    try:
        model(input_ids=torch.arange(1, 9, device=model.device)[None], use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def called_linears(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers that a forward calls for a product. A layer whose weight is read directly is not one,
    nor is a router that answers with more."""
    called: list[str] = []
    hooks = [
        m.register_forward_hook(lambda _m, _a, out, name=name: called.append(name) if isinstance(out, Tensor) else None)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D)
    ]
    forward_once(model, hooks)
    return list(dict.fromkeys(called))


def shortest(wanted: list[str], model: nn.Module) -> list[str]:
    """Last parts of the names where these pick the same modules, as in PEFT's own configs; else the names."""
    short = sorted({n.rsplit(".", 1)[-1] for n in wanted})
    matched = {n for n, _ in model.named_modules() if n.rsplit(".", 1)[-1] in short}
    return short if matched == set(wanted) else sorted(wanted)
