"""Repositories, against a small server that speaks as Hugging Face does."""

import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
EXTRA = {"README.md": b"read me", "flux1-dev.safetensors": b"not read", "vae/diffusion_pytorch_model.bin": b"not read"}


class FakeHub(BaseHTTPRequestHandler):
    """Lists and serves `files` of some repositories; `gated` ones list but do not serve."""

    repos: dict[str, dict[str, bytes]] = {}
    gated: set[str] = set()
    served: list[str] = []

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/"):
            repo = "/".join(path.split("/")[3:5])
            if repo not in self.repos:
                return self.answer(401, {"X-Error-Code": "RepoNotFound"}, b"")
            siblings = [{"rfilename": n, "size": len(data), "blobId": COMMIT} for n, data in self.repos[repo].items()]
            listing = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            return self.answer(200, {}, json.dumps(listing).encode())
        owner, name, _, _, file = path.removeprefix("/").split("/", 4)
        repo = f"{owner}/{name}"
        if repo in self.gated:
            return self.answer(403, {"X-Error-Code": "GatedRepo", "X-Repo-Commit": COMMIT}, b"")
        data = self.repos.get(repo, {}).get(file)
        if data is None:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"")
        return self.serve(repo, file, data, body)

    def serve(self, repo, file, data, body):
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        asked = self.headers.get("Range")
        if body:
            self.served.append(f"{repo}/{file}" + (" part" if asked else ""))
        if not asked:
            return self.answer(200, headers, data, body)
        first, last = asked.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last or len(data)) + 1]
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
        return self.answer(206, headers, part, body)

    def answer(self, status, headers, data, body=True):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


SCRIPT = """
import json, sys
import torch
torch.set_num_threads(1)
from fluxcanvas.flux_runtime import FluxError, inspect, load_flux

out = {}
def attempt(name, run):
    try:
        out[name] = run()
    except FluxError as error:
        out[name] = "refused: " + str(error)

progress = []
def load(source):
    flux = load_flux(source, device="cpu", progress=lambda what, part: progress.append((what, part)))
    return [flux.report.source, flux.text.encode("a cat").tokens.shape[1], flux.report.parameters]

for name, source in json.loads(sys.argv[1]).items():
    attempt("inspect " + name, lambda: inspect(source).text())
    if name != "remote only":
        attempt("load " + name, lambda: load(source))
out["progress"] = progress
print("RESULT" + json.dumps(out))
"""


def run(home: Path, endpoint: str, sources: dict, **environment) -> dict:
    env = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(sources)],
        env={**env, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "RESULT" in done.stdout, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


@pytest.fixture(scope="module")
def served(checkout, tmp_path_factory):
    """Everything once: first with the server, then with the same cache and no server."""
    demo = checkout / "demo" / "weights"
    files = {p.relative_to(demo).as_posix(): p.read_bytes() for p in sorted(demo.rglob("*")) if p.is_file()}
    FakeHub.repos = {
        "me/whole": {**files, **EXTRA},
        "me/gated": files,
        "me/remote": files,
        "me/other": {"a.safetensors": b"x", "b.safetensors": b"y"},
        "me/pickle": {"model_index.json": files["model_index.json"], "transformer/model.bin": b""},
    }
    FakeHub.gated, FakeHub.served = {"me/gated"}, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    home, endpoint = tmp_path_factory.mktemp("hub"), f"http://127.0.0.1:{server.server_port}"
    sources = {
        "whole": "me/whole", "gated": "me/gated", "none": "me/nothing", "other": "me/other",
        "file": "me/whole/x.safetensors", "remote only": "me/remote", "pickle": "me/pickle",
    }  # fmt: skip
    try:
        online = run(home, endpoint, sources)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    offline = run(home, endpoint, {"whole": "me/whole", "none": "me/nothing"}, HF_HUB_OFFLINE="1")
    return online, offline, list(FakeHub.served), files


def test_a_repository_loads_like_its_folder(served, demo):
    online, _, _, _ = served
    assert online["load whole"] == ["me/whole", demo.text.default_tokens, demo.report.parameters]


def test_only_what_is_read_is_downloaded(served):
    _, _, requests, files = served
    whole = {name.removeprefix("me/whole/") for name in requests if name.startswith("me/whole/") and "part" not in name}
    assert whole <= files.keys() and "vae/diffusion_pytorch_model.safetensors" in whole
    assert not whole & EXTRA.keys()


def test_inspect_reads_headers_only(served):
    online, _, requests, _ = served
    text = online["inspect remote only"]
    assert "FLUX.1 dev" in text and "missing" not in text and "not in it" not in text
    remote = [name for name in requests if name.startswith("me/remote/")]
    assert remote and all(name.endswith((" part", "config.json")) for name in remote)


def test_progress_of_the_download(served):
    parts = [part for what, part in served[0]["progress"] if what == "downloading me/whole"]
    assert parts == sorted(parts) and parts[0] == 0 and parts[-1] == 1 and len(parts) > 10


@pytest.mark.parametrize("verb", ["load", "inspect"])
def test_gated(served, verb):
    text = served[0][f"{verb} gated"]
    assert text.startswith("refused") and "https://huggingface.co/me/gated" in text and "hf auth login" in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none", "no public repository me/nothing"),
        ("other", "me/other/a.safetensors, me/other/b.safetensors"),
        ("file", "no file x.safetensors"),
        ("pickle", "refused"),
    ],
)
def test_refusals(served, name, words):
    assert served[0][f"load {name}"].startswith("refused") and words in served[0][f"load {name}"]


def test_offline_the_cache_serves(served):
    online, offline, _, _ = served
    assert offline["load whole"] == online["load whole"]
    assert "could not be reached" in offline["load none"] and "local file or folder" in offline["load none"]
