"""``truetune inspect``: what a run would be trained on, found without the model's weights and without training.

Rows are chosen, rendered, cut and ordered by the code that a run uses; tokenizer and configs suffice for that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import truetune
from truetune.assembly import require_room
from truetune.data.chat import Renderer
from truetune.data.dataset import require_sound
from truetune.errors import UserError
from truetune.inspection import measure, shown
from truetune.inspection.advice import warnings
from truetune.inspection.facts import Inspection
from truetune.inspection.page import write_page
from truetune.inspection.terminal import write
from truetune.inspection.walk import Walk, walk
from truetune.models.load import Outline, outline, skeleton
from truetune.recipe import Recipe
from truetune.rows import build_renderer, choose_rows

__all__ = ["Inspection", "inspect", "write", "write_page"]


def inspect(recipe: Recipe, wanted: Sequence[int] = ()) -> Inspection:
    """What the recipe would train on; ``wanted`` are the numbers of training rows to show instead of the usual ones.

    Data that a run refuses as a whole is described all the same, with ``refused`` set. Raises UserError for what
    cannot be read or rendered.
    """
    begun = time.monotonic()
    sides = choose_rows(recipe)
    model = outline(recipe.model.path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code)
    renderer = build_renderer(recipe, model.tokenizer, model.stop_ids)
    train, held_out = ([walk(choice, renderer, recipe.data.weight_column) for choice in side] for side in sides)
    notes, refused = _judged(recipe, [*train, *held_out], renderer, model)
    parts, left = measure.parts(recipe, train, held_out, renderer)
    found = Inspection(
        truetune=truetune.__version__,
        model=recipe.model.path,
        max_length=recipe.data.max_length,
        parts=parts,
        begin=measure.begin(train, model.tokenizer),
        template=measure.chat_template(train, renderer),
        lengths=measure.lengths(train, renderer),
        left=left,
        plan=measure.plan(recipe, train),
        shown=tuple(row for choice in shown.choose(train, wanted) for row in shown.show(*choice, renderer)),
        warnings=(),
        refused=refused,
        seconds=time.monotonic() - begun,
    )
    return replace(found, warnings=(*notes, *warnings(found)))


def _judged(recipe: Recipe, walks: Sequence[Walk], renderer: Renderer, model: Outline) -> tuple[list[str], str | None]:
    """What a run on this data would tell, and the sentence with which it would end before its first step."""
    vocabulary, notes = model.config.get_text_config().vocab_size, []
    try:
        for side in walks:
            require_sound(side.rows, side.account, side.targets, renderer, recipe.data.cut_limit)
        for side in walks:
            note = require_room(
                side.rows.name,
                side.extremes,
                vocabulary,
                model.config,
                lambda: skeleton(model.config, recipe.model.trust_remote_code),
            )
            notes += [note] if note else []
    except UserError as fault:
        return notes, str(fault)
    return notes, None
