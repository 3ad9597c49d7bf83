"""The tokens that end an answer, from wherever a model names them; what can be no token is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from truetune.errors import UserError
from truetune.models.load import stop_ids


def named(tokenizer: Any, generation: Any, config: Any) -> frozenset[int]:
    parts: list[Any] = [SimpleNamespace(eos_token_id=value) for value in (tokenizer, generation, config)]
    parts[2].get_text_config = lambda: parts[2]
    return stop_ids(*parts)


def test_all_that_are_named_stop() -> None:
    assert named(2, [2, 5], None) == {2, 5}
    assert named(None, None, 0) == {0}


@pytest.mark.parametrize("value", [-1, [3, -1], 2**31, 1.0, True, "</s>", [None]])
def test_what_is_no_token_is_one_sentence(value: Any) -> None:
    with pytest.raises(UserError, match=r"must be a token's number, from 0, or a list of them; correct config\.json"):
        named(1, value, None)
