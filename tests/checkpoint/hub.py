"""A hub of one model, on this machine: the HTTP that `huggingface_hub` speaks, for those who test against it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """What is served under which name, and what was asked for."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.revisions = {"main": COMMIT, COMMIT: COMMIT, "v1": COMMIT}
        self.gated = False  # whether the files are kept from those without a token
        self.fetched: list[str] = []  # the files that were sent
        self.extra: list[str] = []  # names of files that are only said to be there
        self.url = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        """Serve, as long as the block runs, at `url`."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *parts: _Handler(self, *parts))
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def files(self) -> dict[str, Path]:
        """What the repository holds."""
        return {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: Hub, *parts: Any) -> None:
        self.hub = hub
        super().__init__(*parts)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: pytest's output is for other things."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        hub = self.hub
        if path.startswith("api/models/"):
            name, _, rest = path.removeprefix("api/models/").partition("/")
            owner, (name, _, rest) = name, rest.partition("/")
            if f"{owner}/{name}" != hub.name:
                return self.refuse(401, "RepoNotFound", "Invalid username or password.")
            kind, _, revision = rest.partition("/")
            commit = hub.revisions.get(revision or "main")
            if commit is None:
                return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return self.reply(self.listing() if kind == "tree" else self.info(commit))
        if not path.startswith(f"{hub.name}/resolve/"):
            return self.refuse(404, "RepoNotFound", "Repository not found")
        revision, _, file = path.removeprefix(f"{hub.name}/resolve/").partition("/")
        found = hub.files().get(file)
        if found is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if hub.gated and "authorization" not in self.headers:
            return self.refuse(403, "GatedRepo", f"Access to model {hub.name} is restricted.")
        return self.send_file(file, found)

    do_HEAD = do_GET  # noqa: N815 - the names of http.server

    def info(self, commit: str) -> object:
        siblings = [{"rfilename": name} for name in [*self.hub.files(), *self.hub.extra]]
        return {"_id": "1", "id": self.hub.name, "modelId": self.hub.name, "sha": commit, "private": False,
                "gated": "manual" if self.hub.gated else False, "tags": [], "siblings": siblings}  # fmt: skip

    def listing(self) -> object:
        files = self.hub.files()
        entries = [(name, path.stat().st_size) for name, path in files.items()] + [(name, 1) for name in self.hub.extra]
        return [
            {"type": "file", "path": name, "size": size, "oid": hashlib.sha1(name.encode()).hexdigest()}
            for name, size in entries
        ]

    def send_file(self, name: str, path: Path) -> None:
        data = path.read_bytes()
        tag, part = hashlib.sha256(data).hexdigest(), self.headers.get("range")
        self.send_response(206 if part else 200)
        if part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            self.send_header("Content-Range", f"bytes {first}-{min(int(last), len(data) - 1)}/{len(data)}")
            data = data[int(first) : int(last) + 1]
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.hub.fetched.append(f"{name}, in part" if part else name)
            self.wfile.write(data)

    def reply(self, value: object, status: int = 200, **headers: str) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, text in headers.items():
            self.send_header(key.replace("_", "-"), text)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def refuse(self, status: int, code: str, message: str) -> None:
        self.reply({"error": message}, status, X_Error_Code=code, X_Error_Message=message)
