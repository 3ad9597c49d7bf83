"""What is kept of each row where rows are told of one by one: a few dozen bytes, whatever its length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from truetune.data import formats, near
from truetune.data.chat import REASONS, Rendered, Renderer
from truetune.data.formats import Example, Preference, Text
from truetune.data.sources import canonical

TRAITS = np.dtype(
    [
        ("length", np.uint32),
        ("documents", np.uint32),
        ("turns", np.uint32),
        ("fate", np.uint8),
        ("silent", np.bool_),
        ("bare", np.bool_),
        ("digest", np.uint64),
        ("bands", np.uint32, near.BANDS),
    ]
)
"""length: tokens before truncation; documents: made of the row; turns: trained ones; fate: why there is no document, a
place in ``REASONS`` from 1, or 0; silent: one of its answers is empty; bare: a conversation without a system turn;
digest: equal for rows that say the same; bands: of what it says (``near.bands``)."""


def table(rows: Sequence[tuple[Example, Rendered]], renderer: Renderer) -> np.ndarray:
    """``TRAITS`` [rows]."""
    found = np.zeros(len(rows), TRAITS)
    for entry, (given, rendered) in zip(found, rows, strict=True):
        entry["length"], entry["documents"] = rendered.length, len(rendered.documents)
        entry["fate"] = 0 if rendered.dropped is None else 1 + REASONS.index(rendered.dropped)
        if rendered.dropped is None:
            answers = formats.answers(renderer.chosen(given))
            entry["turns"], entry["silent"] = len(answers), not all(map(str.strip, answers))
        chat = renderer.as_chat(given)
        entry["bare"] = chat is not None and chat.messages[0]["role"] not in ("system", "developer")
        entry["digest"] = _digest(given)
    found["bands"] = near.bands([said(given) for given, _ in rows])
    return found


def said(given: Example) -> str:
    """What an example says, without what the system turns tell the model: the text by which rows are compared."""
    assert not isinstance(given, Preference)  # which the renderer refuses
    if isinstance(given, Text):
        return f"{given.prompt or ''}\n{given.completion}"
    return "\n".join(str(m.get("content") or "") for m in given.messages if m["role"] not in ("system", "developer"))


def _digest(given: Example) -> int:
    """Equal for rows that say the same, whatever further columns they have."""
    assert not isinstance(given, Preference)
    text = {"text": [given.prompt, given.completion]} if isinstance(given, Text) else {"turns": given.messages}
    return int.from_bytes(hashlib.blake2b(canonical(text), digest_size=8).digest(), "little")
