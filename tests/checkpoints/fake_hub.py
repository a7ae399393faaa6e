"""A server with the part of the Hub's HTTP interface that publishing a model uses.

huggingface_hub itself runs unchanged, with its uploads by Git LFS; those by Xet need a storage
server that is not simulated.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Repository:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    """What the server has: repositories by name, and uploaded LFS objects by hash."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: int = 0
    fails: bool = False  # answer a commit with 500


@contextmanager
def running() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, value: Any, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/tree/main|/revision/main)?", path):
            repository = self.hub.repositories.get(match[1])
            if repository is None:
                self.answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            elif "/tree/" in path:
                self.answer([self.entry(name, data) for name, data in repository.files.items()])
            else:
                siblings = [{"rfilename": name} for name in repository.files]
                info = {"id": match[1], "private": repository.private, "siblings": siblings, "sha": "0" * 40}
                self.answer(info)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            data = self.hub.repositories[match[1]].files[match[2]]
            self.answer(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit="0" * 40)
        else:
            self.answer({"error": f"not simulated: {self.path}"}, 501)

    do_HEAD = do_GET

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def do_PUT(self) -> None:
        data = self.read()
        self.hub.objects[hashlib.sha256(data).hexdigest()] = data
        self.answer({})

    def do_POST(self) -> None:
        body, path = self.read(), self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.hub.repositories:
                self.answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
                return
            is_private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(bool(is_private), {".gitattributes": b"*"})
            self.answer({"url": f"{self.hub.url}/{name}"})
        elif path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": file["path"], **self.mode(file["path"])} for file in files]})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = {"upload": {"href": f"{self.hub.url}/upload", "header": {}}}
            self.answer({"transfer": "basic", "objects": [{**item, "actions": upload} for item in objects]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self.commit(match[1], body)
        else:
            self.answer({"error": f"not simulated: {self.path}"}, 501)

    @staticmethod
    def mode(path: str) -> dict[str, Any]:
        return {"uploadMode": "lfs" if path.endswith(".safetensors") else "regular", "shouldIgnore": False}

    def commit(self, name: str, body: bytes) -> None:
        if self.hub.fails:
            self.answer({"error": "no space left for this account"}, 403)
            return
        files = self.hub.repositories[name].files
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits += 1
        url = f"{self.hub.url}/{name}/commit/{self.hub.commits:040x}"
        self.answer({"success": True, "commitOid": f"{self.hub.commits:040x}", "commitUrl": url})
