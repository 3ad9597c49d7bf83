"""Groups of commands: what all of them do alike."""

from __future__ import annotations

import difflib
from typing import Any

import typer
from typer.core import TyperGroup

from truetune.errors import UserError, shortage


class _Commands(TyperGroup):
    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command; its line in a list of commands is whole, where click would cut it to fit one line."""
        command = super().get_command(ctx, cmd_name)
        if command is None:
            known = self.list_commands(ctx)
            meant = difflib.get_close_matches(cmd_name, known, n=1)
            guess = f"did you mean {meant[0]!r}? " if meant else ""
            raise UserError(f"there is nothing called {cmd_name}; {guess}choose among: {', '.join(known)}")
        if command.help:
            command.short_help = command.help.partition("\n")[0]
        return command

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            if what := shortage(error):
                error = UserError(f"{what}; close other programs, or use a smaller model")
            if not isinstance(error, UserError):
                raise
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None


def group(purpose: str) -> typer.Typer:
    """An empty group of commands with this line of help."""
    return typer.Typer(
        cls=_Commands,
        help=purpose,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"max_content_width": 120},
    )
