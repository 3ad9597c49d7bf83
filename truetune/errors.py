"""The one exception that a user is meant to read: one sentence that ends with what to do."""

import errno
import re

_LONGEST = 2000
_ASKED = re.compile(r"(?:tried to allocate|tensor of) ([\d.]+ \w+)", re.IGNORECASE)
_SHORT = ("DefaultCPUAllocator: ", "CUBLAS_STATUS_ALLOC_FAILED", "Cannot allocate memory")
"""What torch says where it has no error of its own for it: its CPU allocator, cuBLAS, a file that can't be mapped."""
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


def shortage(error: BaseException) -> str | None:
    """That memory ran out, and for what, if that is what ``error`` says; None for any other error."""
    said = str(error)
    if isinstance(error, OSError):
        out = error.errno == errno.ENOMEM
    else:  # torch's error for GPUs and for our allocator is known by its name, since torch need not be imported here
        named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        out = named or (isinstance(error, RuntimeError) and any(words in said for words in _SHORT))
    if not out:
        return None
    asked = _ASKED.search(said)
    where = "the GPU's memory" if any(words in said for words in ("CUDA", "CUBLAS", "HIP")) else "memory"
    return f"{where} ran out" + (f" when {asked[1]} were asked for" if asked else "")
