from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from kvq_formats.errors import ModelError, SidecarError
from kvq_runtime import hub

COMMIT = "1234567890abcdef1234567890abcdef12345678"

# Runs in its own process, because the client reads its environment when it is imported.
CLIENT = """
import json, sys
from huggingface_hub import constants
from kvq_formats.errors import KVQError
from kvq_runtime.models import load_model, resolve_model
from kvq_runtime.sidecars import find_sidecar

def ask(action, name):
    if action == "offline":
        constants.HF_HUB_OFFLINE = True
        return None
    try:
        if action == "sidecar":
            return {"path": str(find_sidecar(name))}
        resolved = resolve_model(name)
        record = resolved.record
        if action == "load":
            record = load_model(resolved).record
        return {"id": record.id, "revision": record.revision, "notes": resolved.notes}
    except KVQError as error:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}

print(json.dumps([ask(*question) for question in json.loads(sys.argv[1])]))
"""


def ask(home: Path, endpoint: str, questions: list[tuple[str, str]]) -> Any:
    keep = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(questions)],
        env={**keep, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "*"},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_real_client_against_a_small_hub(tiny_model_dir: Path, tmp_path: Path) -> None:
    root = tmp_path / "root" / "org"
    root.mkdir(parents=True)
    shutil.copytree(tiny_model_dir, root / "good")
    damaged = Path(shutil.copytree(tiny_model_dir, root / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    bare = Path(shutil.copytree(tiny_model_dir, root / "bare"))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    (root / "original").mkdir()
    (root / "original" / "consolidated.00.pth").write_bytes(b"")
    (root / "sidecar").mkdir()
    (root / "sidecar" / "kvq.safetensors").write_bytes(b"")
    home = tmp_path / "home"

    questions = [
        ("load", "org/good"),
        ("resolve", "org/good@main"),
        ("resolve", "org/gated"),
        ("resolve", "org/missing"),
        ("resolve", "org/original"),
        ("resolve", "org/good@lost"),
        ("load", "org/damaged"),
        ("load", "org/bare"),
        ("sidecar", "org/sidecar"),
        ("sidecar", "org/good"),
    ]
    offline_questions = [
        ("offline", ""),
        ("load", "org/good"),
        ("resolve", "org/other"),
        ("resolve", "org/bare"),
        ("sidecar", "org/sidecar"),
    ]
    with serve_hub(root.parent) as endpoint:
        answers = ask(home, endpoint, questions + offline_questions)

    good, branch, gated, missing, original, lost, broken, no_words, sidecar, no_sidecar = answers[
        : len(questions)
    ]
    assert good == branch == {"id": "org/good", "revision": COMMIT, "notes": []}
    assert gated["error"] == "ModelError"
    assert "licence at https://huggingface.co/org/gated" in gated["message"]
    assert "hf auth login" in gated["hint"]
    assert "there is no model org/missing" in missing["message"]
    assert original["hint"] == "use org/original-hf, if there is one"
    assert "no revision 'lost'" in lost["message"]
    assert "model.safetensors is damaged" in broken["message"]
    assert broken["hint"] == "hf download org/damaged --force-download"
    assert "has no tokenizer" in no_words["message"]
    assert (Path(sidecar["path"]) / "kvq.safetensors").exists()
    assert no_sidecar["error"] == "SidecarError"
    assert "org/good is not a sidecar" in no_sidecar["message"]

    # The same cache without a network: what is there still loads, what is not is said.
    _, again, unknown, half, known_sidecar = answers[len(questions) :]
    assert again == good
    assert "HF_HUB_OFFLINE" in unknown["message"]
    assert "org/good" in unknown["hint"]
    assert "the weights of org/bare" in half["message"]
    assert known_sidecar == sidecar


@pytest.mark.parametrize("name", ["org/name", "gpt2", "Qwen/Qwen3-0.6B", "a/b_c.d-e"])
def test_hub_ids(name: str) -> None:
    assert hub.is_hub_id(name)


@pytest.mark.parametrize("name", ["", ".", "..", "./org/name", "/abs", "~/m", "a/b/c", "a b", "a/"])
def test_not_hub_ids(name: str) -> None:
    assert not hub.is_hub_id(name)


def test_no_network_is_known_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_address(*args: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(hub, "getproxies", dict)
    assert not hub.is_reachable()
    # A proxy looks addresses up for us.
    monkeypatch.setattr(hub, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub.is_reachable()
    monkeypatch.setattr(hub, "getproxies", dict)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args: [])
    assert hub.is_reachable()


class Response:
    """What the errors of the client keep of an answer."""

    status_code = 503
    headers: dict[str, str] = {}  # noqa: RUF012
    request = None


def wrapped(cause: BaseException) -> OSError:
    """As transformers passes errors of the Hub on."""
    error = OSError("We couldn't load it.")
    error.__cause__ = cause
    return error


RESPONSE: Any = Response()


@pytest.mark.parametrize(
    ("cause", "message", "hint"),
    [
        (errors.GatedRepoError("no", response=RESPONSE), "accept a licence", "hf auth login"),
        (errors.RepositoryNotFoundError("no", response=RESPONSE), "no model org/m", "check"),
        (errors.RevisionNotFoundError("no", response=RESPONSE), "no revision 'v1'", "--revision"),
        (errors.HfHubHTTPError("no", response=RESPONSE), "HTTP 503", "try again later"),
        (errors.HFValidationError("no"), "neither a folder nor a Hub id", "MODEL is org/name"),
        (errors.LocalEntryNotFoundError("no"), "cannot be reached", "check the network"),
        (errors.OfflineModeIsEnabled("no"), "cannot be reached", "hf download org/m"),
        (ConnectionRefusedError(), "cannot be reached", "check the network"),
    ],
)
def test_known_failures_are_explained(
    cause: BaseException, message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for error in (cause, wrapped(cause), wrapped(wrapped(cause))):
        explained = hub.explain_hub_error(error, "org/m", revision="v1", raises=ModelError)
        assert isinstance(explained, ModelError)
        assert message in explained.message
        assert hint in (explained.hint or "")


def test_offline_says_so_and_names_what_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "cached_repositories", lambda: ["org/a", "org/b"])
    explained = hub.explain_hub_error(
        errors.LocalEntryNotFoundError("no"), "org/m", raises=SidecarError
    )
    assert isinstance(explained, SidecarError)
    assert "HF_HUB_OFFLINE" in explained.message
    assert "cached here: org/a, org/b" in (explained.hint or "")


def test_other_errors_keep_their_traceback() -> None:
    assert hub.explain_hub_error(ValueError("a bug"), "org/m") is None
    assert hub.explain_hub_error(OSError("a disk"), "org/m") is None


def test_a_missing_cache_holds_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_cache() -> None:
        raise errors.CacheNotFound("none", tmp_path)

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", no_cache)
    assert hub.cached_repositories() == []


@contextmanager
def serve_hub(root: Path) -> Iterator[str]:
    """Serve ``root/org/name`` folders as repositories; yields the address.

    ``org/gated`` is gated; each repository has the branch main at COMMIT.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(with_body=True)

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

        def _answer(self, *, with_body: bool) -> None:
            parts = unquote(self.path.split("?")[0]).strip("/").split("/")
            is_api = parts[0] == "api"
            if is_api:
                parts = parts[2:]
            repo_id, rest = "/".join(parts[:2]), parts[2:]
            folder = root / repo_id
            if repo_id == "org/gated":
                return self._send(403, {"X-Error-Code": "GatedRepo"})
            if not folder.is_dir():
                return self._send(401, {"X-Error-Code": "RepoNotFound"})
            if len(rest) > 1 and rest[1] not in ("main", COMMIT):
                return self._send(404, {"X-Error-Code": "RevisionNotFound"})
            files = sorted(folder.iterdir())
            if is_api:
                answer: object = {
                    "id": repo_id,
                    "sha": COMMIT,
                    "siblings": [{"rfilename": file.name} for file in files],
                }
                if rest[:1] == ["tree"]:
                    answer = [
                        {
                            "type": "file",
                            "path": file.name,
                            "size": file.stat().st_size,
                            "oid": "0" * 40,
                        }
                        for file in files
                    ]
                content = json.dumps(answer).encode()
                return self._send(200, {"Content-Type": "application/json"}, content)
            file = folder / "/".join(rest[2:])
            if not file.is_file():
                return self._send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            content = file.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            headers = {"ETag": etag, "X-Repo-Commit": COMMIT}
            return self._send(200, headers, content, with_body=with_body)

        def _send(
            self,
            status: int,
            headers: dict[str, str],
            content: bytes = b"",
            *,
            with_body: bool = True,
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if with_body:
                self.wfile.write(content)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
