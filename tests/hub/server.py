"""A hub on loopback: as much of the Hugging Face hub's HTTP as its client asks for to read.

Serves folders: ROOT/models/<owner>/<name>/… and ROOT/datasets/<owner>/<name>/…, each one commit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".parquet")  # kept as LFS: known by their SHA-256
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree)/([^/]+)(/.*)?)?$")
FILE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


class LoopbackHub(ThreadingHTTPServer):
    """The server; `faults` are [part of a path, kind, how often] and are used up.

    Kinds: a status ("429", "401", …); "reset" breaks the connection in the middle of a file;
    "wrong" gives other bytes of the same length.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.faults: list[list] = []
        self.asked: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fail(self, part: str, kind: str, times: int = 1) -> None:
        """Have the next `times` requests whose path holds `part` go wrong."""
        self.faults.append([part, kind, times])

    def fault(self, path: str, body: bool) -> str:
        for fault in self.faults:
            part, kind, times = fault
            if part in path and times > 0 and (body or kind.isdigit()):
                fault[2] -= 1
                return kind
        return ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, *arguments) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        fault = self.server.fault(path, body)
        if fault.isdigit():
            return self._error(int(fault), "GatedRepo" if fault in ("401", "403") else "")
        for pattern, answer in ((API, self._describe), (FILE, self._file)):
            if found := pattern.match(path):
                kind, name, *rest = found.groups()
                folder = self.server.root / (kind or "models") / name
                if not folder.is_dir():
                    return self._error(404, "RepoNotFound")
                return answer(folder, name, *rest, body=body, fault=fault)
        return self._error(404, "EntryNotFound")

    def _describe(self, folder, name, what, revision, below, body, fault) -> None:
        commit = commit_of(folder)
        if revision not in (None, "main", commit):
            return self._error(404, "RevisionNotFound")
        files = [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
        if what == "tree":
            return self._send(json.dumps(files).encode(), body, {"X-Repo-Commit": commit})
        siblings = [{"rfilename": f["path"], "size": f["size"], "blobId": f["oid"]} for f in files]
        about = {"id": name, "modelId": name, "sha": commit, "siblings": siblings}
        about |= {"private": False, "gated": False, "disabled": False, "tags": [], "likes": 0}
        return self._send(json.dumps(about).encode(), body)

    def _file(self, folder, name, revision, path, body, fault) -> None:
        commit = commit_of(folder)
        if revision not in ("main", commit):
            return self._error(404, "RevisionNotFound")
        if not (folder / path).is_file():
            return self._error(404, "EntryNotFound")
        content, entry = (folder / path).read_bytes(), _entry(folder, folder / path)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{entry["oid"]}"'}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"'}
            headers |= {"X-Linked-Size": str(len(content))}
        if fault == "wrong":
            content = bytes(byte ^ 1 for byte in content)
        return self._send(content, body, headers, reset=fault == "reset")

    def _send(self, content: bytes, body: bool, headers=None, reset=False) -> None:
        self.send_response(200)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content[: len(content) // 2] if reset else content)
        if body and reset:  # RST instead of FIN
            self.wfile.flush()
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        if status == 429:
            self.send_header("Retry-After", "0")
        self.send_header("Content-Length", "0")
        self.end_headers()


def commit_of(folder: Path) -> str:
    """A repository's commit: 40 digits that depend on its files."""
    digest = hashlib.sha1()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()


def _entry(folder: Path, path: Path) -> dict:
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry = {"type": "file", "path": str(path.relative_to(folder)), "oid": blob}
    entry["size"] = len(content)
    if path.suffix in LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serving(root: Path) -> Iterator[LoopbackHub]:
    """Serve `root` while the block runs."""
    server = LoopbackHub(root)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
