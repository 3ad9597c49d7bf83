"""Names and options: what resolves, what is refused, and what the refusal says."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import pytest

from truetune import registry
from truetune.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence


def falling(
    total: int,
    *,
    floor: float = 0.0,
    hold: int | None = None,
    pair: tuple[float, float] = (0.9, 0.95),
    kind: Literal["soft", "hard"] = "soft",
    exact: bool = False,
):
    """Falls."""
    return total, floor, hold, pair, kind, exact


def demanding(total: int, *, needed: float):
    """Has an option without default."""
    return total, needed


def knowing(total: int, *, plan: str, floor: float = 0.0):
    """Asks for what the program knows."""
    return total, plan, floor


TABLE = {"falling": falling, "demanding": demanding, "knowing": knowing}


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("own_parts")
    module.falling, module.number = falling, 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_parts", module)
    return module


def bound(**options):
    return registry.bind("schedule", TABLE, "falling", options)(7)


def test_a_name_of_the_table_and_a_name_of_the_user(own: ModuleType) -> None:
    assert registry.resolve("schedule", TABLE, "falling") is falling
    assert registry.resolve("schedule", TABLE, "own_parts:falling") is falling


def test_options_come_in_the_types_of_the_signature() -> None:
    total, floor, hold, pair, kind, exact = bound(floor=1, hold=None, pair=[1, 0.5], kind="hard", exact=True)
    assert (total, hold, kind, exact) == (7, None, "hard", True)
    assert type(floor) is float and floor == 1.0
    assert pair == (1.0, 0.5) and type(pair) is tuple and type(pair[0]) is float


def test_no_options_leave_the_defaults() -> None:
    assert bound() == falling(7)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"flor": 1}, 'has no option "flor" (did you mean "floor"?); use one of floor, hold, pair'),
        ({"total": 5}, 'has no option "total"'),
        ({"floor": "a"}, 'schedule.floor is "a", but must be a number'),
        ({"floor": True}, "schedule.floor is true, but must be a number"),
        ({"hold": 1.5}, "schedule.hold is 1.5, but must be an integer"),
        ({"pair": [1]}, "schedule.pair is [1], but"),
        ({"pair": [1, 2, 3]}, "must have at most 2 items, not 3"),
        ({"pair": 1}, "must be a list"),
        ({"kind": "sfot"}, "must be 'soft' or 'hard'"),
        ({"exact": 1}, "schedule.exact is 1, but must be true or false"),
        ({"floor": "a", "hold": "b", "x": 1}, "(and 2 more faults)"),
    ],
)
def test_a_wrong_option_is_one_sentence(options: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as caught:
        bound(**options)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_what_the_program_knows_reaches_whatever_asks_for_it_and_is_no_option() -> None:
    assert registry.bind("schedule", TABLE, "knowing", {"floor": 1}, plan="known")(7) == (7, "known", 1.0)
    assert registry.bind("schedule", TABLE, "falling", {}, plan="known")(7) == falling(7)
    with pytest.raises(UserError, match='has no option "plan"; use one of floor'):
        registry.bind("schedule", TABLE, "knowing", {"plan": "mine"}, plan="known")


def test_an_option_without_default_must_be_given() -> None:
    with pytest.raises(UserError, match=r'needs the option "needed"; add schedule\.needed='):
        registry.bind("schedule", TABLE, "demanding", {})
    assert registry.bind("schedule", TABLE, "demanding", {"needed": 2})(5) == (5, 2.0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "fallling",
            'unknown schedule "fallling" (did you mean "falling"?); use one of falling, demanding, knowing, or',
        ),
        ("own_parts:faling", '(did you mean "falling"?)'),
        ("own_parts:number", "is a int; name a function"),
        ("no_such_module_here:f", 'no module "no_such_module_here"'),
        ("own_parts:", "is not of the form module:attribute"),
        (".relative:f", "is not of the form module:attribute"),
    ],
)
def test_a_wrong_name_is_one_sentence(own: ModuleType, name: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        registry.resolve("schedule", TABLE, name)
    assert says in str(caught.value)


def test_a_fault_inside_the_users_module_is_not_hidden(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_broken.py").write_text("import no_such_module_here\n")
    (tmp_path / "own_raises.py").write_text("raise ValueError('mine')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError):
        registry.resolve("schedule", TABLE, "own_broken:f")
    with pytest.raises(ValueError, match="mine"):
        registry.resolve("schedule", TABLE, "own_raises:f")


def test_what_the_program_supplies_must_fit() -> None:
    with pytest.raises(UserError, match=r"must take \(groups, rate\) first"):
        registry.faults("optimizer", "x", demanding, {})
    with pytest.raises(UserError, match="shows no signature"):
        registry.faults("schedule", "x", type, {})


def test_names_are_checked_where_an_annotation_cannot_be_read() -> None:
    def lazy(total: int, *, many: Sequence[int] = ()) -> int:
        return total

    assert registry.faults("schedule", "lazy", lazy, {"many": [1]}) == {}
    assert set(registry.faults("schedule", "lazy", lazy, {"mny": [1]})) == {"mny"}


def test_any_optimizer_of_torch_can_be_named() -> None:
    import torch

    make = registry.bind("optimizer", {}, "torch.optim:SGD", {"momentum": 0.5, "nesterov": True})
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = make([{"params": [weight], "name": "weights", "peak": 0.1}], 0.1)
    assert optimizer.param_groups[0]["momentum"] == 0.5 and optimizer.param_groups[0]["lr"] == 0.1
