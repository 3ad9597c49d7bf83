"""A hub on this machine: what the real clients ask of the Hugging Face hub, answered from folders.

Only what ``snapshot_download`` and ``load_dataset`` need: facts of a repository, its list of files, and the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789" * 4
Repositories = Mapping[str, Path]
"""``models/owner/name`` or ``datasets/owner/name``, and the folder that holds its files."""

_API = re.compile(r"/api/((?:models|datasets)/[^/]+/[^/]+)(?:/(revision|tree|paths-info)/[^/]+)?(?:/(.*))?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


@contextmanager
def serving(repositories: Repositories, asked: list[str]) -> Iterator[str]:
    """The address of a hub with these repositories; its requests are added to ``asked``."""

    class Hub(_Hub):
        repositories_, asked_ = repositories, asked

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    repositories_: Repositories
    asked_: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

    def log_message(self, *_: Any) -> None:
        """Keep stderr to the tests."""

    def _answer(self, body: Any = None) -> None:
        path = unquote(urlsplit(self.path).path)
        whole = "recursive=true" in self.path.lower()
        self.asked_.append(f"{self.command} {path}")
        if found := _API.fullmatch(path):
            folder = self.repositories_.get(found[1])
            if folder:
                if found[2] == "tree":
                    return self._json(_tree(folder, found[3] or "", whole))
                return self._json(_facts(found[1], folder, body))
        elif found := _FILE.fullmatch(path):
            folder = self.repositories_.get(f"{found[1] or 'models/'}{found[2]}")
            if folder and (folder / found[3]).is_file():
                return self._send((folder / found[3]).read_bytes(), "application/octet-stream")
            if folder:
                return self._send(b"", "text/plain", 404, {"X-Error-Code": "EntryNotFound"})
        return self._send(b"{}", "application/json", 404, {"X-Error-Code": "RepoNotFound"})

    def _json(self, value: Any) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send(self, content: bytes, kind: str, status: int = 200, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        for name, value in (headers | dict(more or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _tree(folder: Path, under: str, whole: bool) -> list[dict[str, Any]]:
    """What lies in a folder of a repository; ``whole``: and in those below."""
    found = (folder / under).rglob("*") if whole else (folder / under).glob("*")
    return [_entry(folder, path) for path in sorted(found)]


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {
        "type": "file",
        "path": name,
        "size": path.stat().st_size,
        "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
    }


def _facts(name: str, folder: Path, body: Any) -> Any:
    """The paths that ``body`` asks for, else the repository."""
    if body:
        return [_entry(folder, folder / path) for path in body["paths"] if (folder / path).exists()]
    files = [entry["path"] for entry in _tree(folder, "", True) if entry["type"] == "file"]
    return {
        "id": name.partition("/")[2],
        "sha": COMMIT,
        "private": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": path} for path in files],
    }
