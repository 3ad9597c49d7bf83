"""Runs commands of the command line one after another in this process, with every audited event of it on record.

    python watched.py LOG COMMANDS        COMMANDS: a JSON list of lists of arguments

Each line of LOG is a JSON list: the event and its arguments as text; ``["exit", status]`` ends each command. Events
in ``FORBIDDEN`` raise as well, so that nothing is unpickled and nobody is called. What native code does by itself
(safetensors writes files so) is not audited: compare folders too.
"""

from __future__ import annotations

import json
import os
import sys

FORBIDDEN = {
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.gethostbyaddr",
    "socket.sendto",
    "socket.sendmsg",
    "os.system",
}
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree"}
PROCESSES = {"subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def watch(log: int) -> None:
    def hook(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
        if writes or event in FORBIDDEN | CHANGES | PROCESSES:
            record(log, event, *map(os.fspath if writes else str, arguments[:1] if writes else arguments))
        if event in FORBIDDEN:
            raise RuntimeError(f"{event} is forbidden here")

    sys.addaudithook(hook)


def record(log: int, *parts: object) -> None:
    os.write(log, (json.dumps(parts, default=str) + "\n").encode())


def main() -> None:
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(log)
    from truetune.cli import app

    for arguments in json.loads(sys.argv[2]):
        try:
            app(arguments, prog_name="truetune")
        except SystemExit as end:
            record(log, "exit", end.code)


if __name__ == "__main__":
    main()
