"""A small hub on loopback: the routes of Hugging Face's that fetching a model takes, over folders of the test's own."""

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

import pytest


class Hub:
    """Repositories of files by commit, branches that name commits, and what was asked for.

    Attributes:
        fetched: Paths of the files that were asked for whole.
    """

    def __init__(self) -> None:
        self._commits: dict[tuple[str, str], dict[str, bytes]] = {}
        self._branches: dict[tuple[str, str], str] = {}
        self.fetched: list[str] = []

    def push(self, repository: str, folder: Path, branch: str = "main", **more: bytes) -> str:
        """Makes the files of `folder` the newest commit of a branch; returns the commit."""
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()} | more
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self._commits[repository, commit] = files
        self._branches[repository, branch] = commit
        return commit

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repository, (route, revision, *_) = "/".join(parts[2:4]), [*parts[4:6], "revision", "main"][:2]
            found = self._find(repository, revision)
            if isinstance(found, str):
                return 404, {"X-Error-Code": found}, b"{}"
            commit, files = found
            body: Any = {"id": repository, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            if route == "tree":
                body = [
                    {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                    for name, content in files.items()
                ]
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        if parts[2:3] == ["resolve"]:
            found = self._find("/".join(parts[:2]), parts[3])
            if isinstance(found, str):
                return 404, {"X-Error-Code": found}, b""
            (commit, files), name = found, "/".join(parts[4:])
            if name not in files:
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
            if method == "GET":
                self.fetched.append(name)
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{_etag(files[name])}"'}, files[name]
        return 404, {}, b""

    def _find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | str:
        """A commit and its files; or the code of an error."""
        if not any(repository == known for known, _ in self._commits):
            return "RepoNotFound"
        commit = self._branches.get((repository, revision), revision)
        files = self._commits.get((repository, commit))
        return "RevisionNotFound" if files is None else (commit, files)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def running(hub: Hub) -> Iterator[str]:
    """Answers HTTP requests on loopback; yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            # Whoever asks for a part wants a file's header; the whole is an answer to that too.
            method = "PART" if "Range" in self.headers else self.command
            status, headers, body = hub.answer(method, unquote(urlsplit(self.path).path))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def hub_of_this_process(cache: Path) -> Iterator[Hub]:
    """A running hub that `huggingface_hub` asks in this process, with a cache of its own; tests are offline otherwise."""
    from huggingface_hub import constants

    hub = Hub()
    with running(hub) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", url)
        patch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        yield hub
