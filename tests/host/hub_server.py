"""A ModelScope hub on 127.0.0.1: the few endpoints that the SDK asks when it downloads."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlparse

MODEL = "team/tiny"


@dataclass
class Request:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


@dataclass
class Hub:
    """What the hub holds, how it misbehaves, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    repo: str = MODEL
    revisions: tuple[str, ...] = ("master",)
    token: str | None = None
    # file -> bytes sent before the connection is cut, once for each entry.
    cuts: dict[str, list[int]] = field(default_factory=dict)
    # file -> bytes sent before the rest waits for `go`.
    stalls: dict[str, int] = field(default_factory=dict)
    go: threading.Event = field(default_factory=threading.Event)
    # A file is sent only when so many files are asked for at the same time.
    meeting: threading.Barrier | None = None
    has_hashes: bool = True
    # file -> how many times its bytes are flipped on the way.
    corruptions: dict[str, int] = field(default_factory=dict)
    listed_size: dict[str, int] = field(default_factory=dict)
    listed_names: list[str] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    address: str = ""

    def asked_for(self, name: str) -> list[Request]:
        return [r for r in self.requests if r.query.get("FilePath") == name]

    def listing(self) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = [
            {
                "Name": name.rsplit("/", 1)[-1],
                "Path": name,
                "Type": "blob",
                "Size": self.listed_size.get(name, len(content)),
                "Sha256": hashlib.sha256(content).hexdigest() if self.has_hashes else "",
            }
            for name, content in self.files.items()
        ]
        rows += [
            {"Name": "x", "Path": name, "Type": "blob", "Size": 1, "Sha256": ""}
            for name in self.listed_names
        ]
        folders = {name.rsplit("/", 1)[0] for name in self.files if "/" in name}
        return rows + [{"Name": f, "Path": f, "Type": "tree", "Size": 0} for f in sorted(folders)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlparse(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        request = Request(unquote(url.path), query, {k.lower(): v for k, v in self.headers.items()})
        self.hub.requests.append(request)
        owner, name = self.hub.repo.split("/")
        bearer = self.headers.get("Authorization")
        if self.hub.token is not None and bearer != f"Bearer {self.hub.token}":
            return self._json(403, {"Code": 403, "Message": "no access", "Success": False})
        if query.get("Revision", "master") not in self.hub.revisions:
            return self._not_found()
        if request.path == f"/api/v1/datasets/{self.hub.repo}":
            return self._json(200, {"Code": 200, "Data": {"Id": 7, "Type": 4}, "Success": True})
        bases = (f"/api/v1/models/{owner}/{name}", f"/api/v1/datasets/{self.hub.repo}")
        listings = (*(f"{base}/repo/{end}" for base in bases for end in ("files", "tree")),)
        if request.path in (*listings, "/api/v1/datasets/7/repo/tree"):
            data = {"Files": self.hub.listing()}
            return self._json(200, {"Code": 200, "Data": data, "Success": True})
        if request.path in tuple(f"{base}/repo" for base in bases):
            return self._file(query["FilePath"])
        return self._not_found()

    def _not_found(self) -> None:
        self._json(404, {"Code": 10010205001, "Message": "not found", "Success": False})

    def _json(self, status: int, body: object) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def _file(self, name: str) -> None:
        content = self.hub.files.get(name)
        if content is None:
            self._not_found()
            return
        if self.hub.meeting is not None:
            self.hub.meeting.wait()
        start = 0
        if self.headers.get("Range"):
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-").split("-")[0])
        body = content[start:]
        if self.hub.corruptions.get(name, 0) > 0:
            self.hub.corruptions[name] -= 1
            body = bytes(byte ^ 0xFF for byte in body)
        self.send_response(206 if start else 200)
        if start:
            last = len(content) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cuts = self.hub.cuts.get(name, [])
        if cuts:
            self.wfile.write(body[: cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
            return
        stall = self.hub.stalls.get(name, len(body))
        self.wfile.write(body[:stall])
        if stall < len(body):
            self.wfile.flush()
            self.hub.go.wait(60)
            with contextlib.suppress(OSError):  # whoever asked may have gone
                self.wfile.write(body[stall:])


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve the hub on a free port of this machine for as long as the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
