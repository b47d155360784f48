"""A stand-in of the hub's HTTP interface, in this process: repositories of small files, commits, downloads."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REVISION = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """repositories: files by path, by "models/owner/name". commits: the header of each. readonly: refuse all writes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.commits: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.readonly = False

    @property
    def endpoint(self) -> str:
        """Address to give to huggingface_hub."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers while the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub, parts = self.server, urlsplit(self.path).path.strip("/").split("/")
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.readonly:
            return self._answer(403, {"error": "You don't have the rights to create a repository"})
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            hub.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            kind = asked.get("type") or "model"
            hub.repositories.setdefault(f"{kind}s/{name}", {})
            prefix = "" if kind == "model" else f"{kind}s/"
            return self._answer(200, {"url": f"{hub.endpoint}/{prefix}{name}", "id": name, "name": name})
        if parts[1:] == ["validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        key = "/".join(parts[1:4])
        if key not in hub.repositories:
            return self._answer(404, {"error": "Repository not found"})
        if parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": files})
        assert parts[4] == "commit", self.path
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "header":
                hub.commits.append(entry["value"])
            else:
                assert entry["key"] == "file", entry["key"]
                value = entry["value"]
                hub.repositories[key][value["path"]] = base64.b64decode(value["content"])
        address = f"{hub.endpoint}/{'/'.join(parts[2:4])}/commit/{REVISION}"
        return self._answer(200, {"success": True, "commitOid": REVISION, "commitUrl": address})

    def do_GET(self) -> None:
        hub, parts = self.server, unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":
            files = hub.repositories.get("/".join(parts[1:4]))
            if files is None:
                return self._answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            if "tree" in parts:
                entries = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
                return self._answer(200, entries)
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            return self._answer(200, {"id": "/".join(parts[2:4]), "sha": REVISION, "siblings": siblings})
        data = hub.repositories.get("models/" + "/".join(parts[:2]), {}).get("/".join(parts[4:]))
        if data is None:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": REVISION}
        return self._answer(200, data, headers)

    do_HEAD = do_GET  # noqa: N815 (http.server says so)

    def _answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
