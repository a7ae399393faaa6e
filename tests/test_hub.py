"""Names on the Hub: one request, to a server of the test that answers as the Hub does."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from huggingface_hub import constants

from sinklm.hub import find_on_hub

ANSWERS = {  # status and X-Error-Code of the Hub
    "/owner/there/": (200, ""),
    "/owner/bare/": (404, "EntryNotFound"),
    "/owner/gated/": (403, "GatedRepo"),
    "/datasets/owner/data/": (200, ""),
}


class Hub(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.requests.append(self.path)
        found = (answer for start, answer in ANSWERS.items() if self.path.startswith(start))
        status, code = next(found, (404, "RepoNotFound"))
        self.send_response(status)
        headers = {"X-Error-Code": code, "X-Repo-Commit": "0" * 40, "ETag": '"1"', "Content-Length": "0"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Hub.requests.clear()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    yield server
    server.shutdown()
    server.server_close()


def write_cache(folder: Path, name: str) -> Path:
    """A snapshot as `huggingface_hub` writes it."""
    repository = folder / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_name_is_asked_for_once(hub):
    assert find_on_hub("owner/there") == "owner/there"
    assert find_on_hub("owner/bare") == "owner/bare"
    assert find_on_hub("owner/data", "dataset") == "owner/data"
    assert len(Hub.requests) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "owner/nope",
            "owner/nope: no such folder, and the Hugging Face Hub has no model of this name: check the name",
        ),
        (
            "owner/gated",
            "owner/gated: no such folder, and access to the model owner/gated .* is restricted: request it",
        ),
    ],
)
def test_a_name_that_the_hub_does_not_give_is_one_error(hub, name, message):
    with pytest.raises(FileNotFoundError, match=message):
        find_on_hub(name)
    assert len(Hub.requests) == 1


@pytest.mark.parametrize("name", ["./a", "/a/b", "a/b/c", "~/a", "a b/c", "runs/nope", "gpt2", "a/", "../a", ""])
def test_a_path_is_not_asked_for(hub, name):
    Path("runs").mkdir()
    with pytest.raises(FileNotFoundError, match=f"^{name}: no such folder; check the path"):
        find_on_hub(name)
    assert not Hub.requests


def test_a_mistyped_path_names_its_neighbours(hub):
    for name in ("vanilla", "learnable-sink", "learnable-sinks"):
        Path("runs", name).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"did you mean runs/learnable-sinks or runs/learnable-sink\?"):
        find_on_hub("runs/lernable-sinks")
    with pytest.raises(
        FileNotFoundError, match=r"rnus: no such folder; did you mean runs\?|a model on the Hugging Face"
    ):
        find_on_hub("rnus")


def test_without_the_hub_the_cache_is_used(hub, tmp_path, monkeypatch):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(
        FileNotFoundError, match="owner/there: no such folder, and the Hugging Face Hub cannot be reached"
    ):
        find_on_hub("owner/there")
    snapshot = write_cache(tmp_path / "cache", "owner/there")
    assert find_on_hub("owner/there") == str(snapshot)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find_on_hub("owner/there") == "owner/there"
    with pytest.raises(FileNotFoundError, match=r"owner/other: no such folder, and the cache .* unset HF_HUB_OFFLINE"):
        find_on_hub("owner/other")


def test_a_cached_model_may_have_a_name_without_an_owner(hub, tmp_path):
    write_cache(tmp_path / "cache", "gpt2")
    assert find_on_hub("gpt2") == "gpt2"
    assert not Hub.requests
