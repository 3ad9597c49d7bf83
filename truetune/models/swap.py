"""Parts of a model computed by our kernels: RMS norms, gated feed-forward layers and rotary positions, where proven.

A part is known by its shape, never by its name: a module with one vector of weights and an epsilon may be an RMS norm,
one with three linear layers and an activation a gated feed-forward. One of each kind is tried: outputs and gradients
must differ from float64's at most twice as much as those of the module's own code, in the dtype of training. What is
proven gets a subclass of its own class, so that parameters, names, saving and copies stay as they were. Attention
layers keep their author's code but for the function that turns queries and keys (``models.rotary``).

It is tried where it will run. A device on which an operation has nothing but its reference keeps the author's code: a
CPU without the compiled kernels, a GPU for which ours was not chosen (``kernels.triton.choices``).

Left out: what has other arguments than its input, layer norms, experts.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import permutations, product
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from truetune.kernels.gated import gated
from truetune.kernels.linear import linears
from truetune.kernels.native.pointwise import ACTIVATIONS
from truetune.kernels.proof import no_worse, readout, within
from truetune.kernels.rms_norm import rms_norm
from truetune.models.rotary import forward_with_rotary
from truetune.models.together import Together, of_one_input

Context = Callable[[], contextlib.AbstractContextManager]
TOKENS = 16
"""Of the input that a part is tried on."""
SAME = 1e-6
"""Relative difference in float64 below which two computations are the same function; some norms are always in fp32."""


class Swapped:
    """Marks the classes that are made here; ``plain`` is the class that the model's author wrote."""

    plain: type[nn.Module]


class _Way(NamedTuple):
    """How a module may be computed: ``compute(module, x)`` for x [..., width]."""

    width: int
    compute: Callable[[Any, Tensor], Tensor]


def swap(model: nn.Module, autocast: Context) -> int:
    """Let parts of ``model`` compute through our kernels where these win; how many do.

    autocast: the context that the model is trained in.
    """
    turning: dict[type[nn.Module], type[nn.Module] | None] = {}
    proven: dict[str, type[nn.Module] | None] = {}
    count, device = 0, next(model.parameters()).device
    for module in model.modules():
        plain = type(module)
        if isinstance(module, Swapped):
            continue
        if plain not in turning:
            forward = forward_with_rotary(plain, device)
            turning[plain] = subclass(plain, forward) if forward else None
        made = turning[plain]
        if not made and (ways := _ways(module, device)):
            kind = _kind(module)
            if kind not in proven:
                proven[kind] = _proven(module, ways, autocast, device)
            made = proven[kind]
        if made:
            module.__class__ = made
            count += 1
    return count


def swap_linears(model: PreTrainedModel, head: str, autocast: Context) -> int:
    """Let linear layers that are trained, but for the output layer ``head`` and LoRA's factors, compute by our
    products, those of one input at once; how many they are."""
    if not linears.has_equal(model.device):
        return 0
    left = {model.get_submodule(head)}.union(*(m.modules() for m in model.modules() if isinstance(m, LoraLayer)))
    trained = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and m.weight.requires_grad}
    chosen: dict[str, Any] = {n: m for n, m in trained.items() if m not in left}
    if not chosen:
        return 0
    with autocast():
        groups = of_one_input(model)
    for module in chosen.values():
        module.__class__, module.together = _OurLinear, None
    for names in groups:
        layers = [chosen[name] for name in names if name in chosen]
        together = Together(layers, _linears)
        for layer in layers:
            layer.together = together
    return len(chosen)


def _linears(x: Tensor, layers: Sequence[Any]) -> tuple[Tensor, ...]:
    return linears(x, [layer.weight for layer in layers], [layer.bias for layer in layers])


class _OurLinear(Swapped, nn.Linear):
    plain = nn.Linear
    together: Together | None

    def forward(self, x: Tensor) -> Tensor:
        return self.together.output(self, x) if self.together else _linears(x, [self])[0]


@contextlib.contextmanager
def unswapped(model: nn.Module) -> Iterator[None]:
    """Every part computed by its author's code, for a while: the reference of the checks."""
    swapped = [(module, type(module)) for module in model.modules() if isinstance(module, Swapped)]
    for module, made in swapped:
        module.__class__ = cast(Any, made).plain
    try:
        yield
    finally:
        for module, made in swapped:
            module.__class__ = made


def _ways(module: nn.Module, device: torch.device) -> list[_Way]:
    """Ways in which the module may be computed on ``device``, by its shape."""
    children = dict(module.named_children())
    own = dict(module.named_parameters(recurse=False))
    if not children and own.keys() == {"weight"} and own["weight"].ndim == 1 and rms_norm.has_equal(device):
        eps = [name for name, value in vars(module).items() if isinstance(value, float)]
        width = len(own["weight"])
        return [_Way(width, partial(_norm, eps=name, offset=offset)) for name, offset in product(eps, (0.0, 1.0))]
    linear = {name: child for name, child in children.items() if isinstance(child, nn.Linear | Conv1D | LoraLayer)}
    rest = [child for name, child in children.items() if name not in linear]
    if own or len(linear) != 3 or any(next(child.parameters(), None) is not None for child in rest):
        return []
    if not gated.has_equal(device):
        return []
    found = []
    for names, activation in product(permutations(linear), ACTIVATIONS):
        gate, up, down = (_sizes(linear[name]) for name in names)
        if gate == up and down == gate[::-1]:
            found.append(_Way(gate[0], partial(_feed_forward, names=names, activation=activation)))
    return found


def _norm(module: Any, x: Tensor, *, eps: str, offset: float) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, module.weight.dtype))
    return rms_norm(wide, module.weight, getattr(module, eps), offset)[0]


def _feed_forward(module: Any, x: Tensor, *, names: tuple[str, ...], activation: Any) -> Tensor:
    gate, up, down = (getattr(module, name) for name in names)
    if torch.is_autocast_enabled(x.device.type) and x.dtype == torch.float32:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once for both, which keep it for their gradients
    return cast(Tensor, down(gated(gate(x), up(x), activation)))


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    first, second = cast(Tensor, base.weight).shape
    return (first, second) if isinstance(base, Conv1D) else (second, first)


def _kind(module: nn.Module) -> str:
    """Equal for modules that compute alike, whatever their weights."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, bool | int | float | str)}
    shapes = [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in module.named_parameters()]
    return f"{type(module).__module__} {module!r} {plain} {shapes}"


def _proven(module: nn.Module, ways: list[_Way], autocast: Context, device: torch.device) -> type[nn.Module] | None:
    """The class of the first way that is the module's function, and as near to it as the module's own code."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for way in ways:
            x = torch.randn(1, TOKENS, way.width) * torch.logspace(-3, 1, TOKENS)[:, None]  # small ones show an epsilon
            x = x.to(device)
            made = _made(type(module), way)
            try:
                exact = copy.deepcopy(module).double()
                truth = _observe(exact, x.double(), type(module))
                if not within(_observe(exact, x.double(), made), truth, [SAME] * len(truth)):
                    continue
                with autocast():
                    own, ours = (_observe(copy.deepcopy(module), x, kind) for kind in (type(module), made))
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
                return None  # it is not called so, and is left as it is
            if ours[0].dtype == own[0].dtype and no_worse(ours, own, truth):
                return made
    return None


def _made(plain: type[nn.Module], way: _Way) -> type[nn.Module]:
    def forward(self: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return plain.forward(self, x, *args, **kwargs) if args or kwargs else way.compute(self, x)

    return subclass(plain, forward)


def subclass(plain: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """``plain``, which may be made here itself, with another forward, marked as ``Swapped``."""
    if issubclass(plain, Swapped):
        return type(plain.__name__, (plain,), {"forward": forward})
    return type(plain.__name__, (Swapped, plain), {"plain": plain, "forward": forward})


def _observe(module: nn.Module, x: Tensor, kind: type[nn.Module]) -> list[Tensor]:
    """As a module of class ``kind``: output, and gradients of input and parameters for a fixed readout of it."""
    module.__class__ = kind
    module.eval().zero_grad()  # dropout, which is a layer's own, would differ from call to call
    x = x.clone().requires_grad_()
    out = module(x)
    readout(out).backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [out.detach(), cast(Tensor, x.grad), *(g.clone() for g in gradients)]
