"""A server on this machine that answers what `huggingface_hub` asks about one model."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit


@contextmanager
def serve_model(folder: Path, name: str, revisions: list[str], commit: str) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as a model with one commit. Yields the address, and the downloaded files."""
    downloaded: list[str] = []
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    known = {*revisions, "main", commit}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(urlsplit(self.path).path)
            if parts.startswith(f"/api/models/{name}/"):
                kind, _, revision = parts.removeprefix(f"/api/models/{name}/").partition("/")
                tree = [
                    {"type": "file", "path": file, "size": len(content), "oid": _etag(content)}
                    for file, content in files.items()
                ]
                info = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
                self.answer(revision, json.dumps(tree if kind == "tree" else info).encode())
            elif parts.startswith(f"/{name}/resolve/"):
                revision, _, file = parts.removeprefix(f"/{name}/resolve/").partition("/")
                if self.command == "GET" and file in files:
                    downloaded.append(file)
                self.answer(revision, files.get(file), "EntryNotFound")
            else:
                self.answer("main", None, "RepoNotFound")

        def answer(self, revision: str, content: bytes | None, error: str = "RevisionNotFound") -> None:
            if revision not in known:
                content, error = None, "RevisionNotFound"
            self.send_response(200 if content is not None else 404)
            if content is None:
                self.send_header("X-Error-Code", error)
            else:
                self.send_header("ETag", f'"{_etag(content)}"')
                self.send_header("X-Repo-Commit", commit)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content or b"")

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloaded
    finally:
        server.shutdown()
        server.server_close()


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
