"""The one exception that a user is meant to read: one sentence that ends with what to do."""

import re

_LONGEST = 2000
_ENDLESS = re.compile(r"(\S{200})\S{100,}(\S{60})")


class UserError(Exception):
    """Raised for every fault that the user can mend: input, recipe, files, machine.

    The command line prints its message alone, without a traceback, and exits with status 2. The message is one
    line of printable characters, whatever it quotes: no file can drive the terminal, or bury the advice at the end.
    """

    def __init__(self, message: str) -> None:
        line = _ENDLESS.sub(r"\1...\2", "".join(c if c.isprintable() else " " for c in message))
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
        super().__init__(line)
