import hashlib
import http.server
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled

from app.models import source as model_source
from app.models.loading import (
    base_reference,
    load_model,
    load_tokenizer,
    local_directory,
    model_fingerprint,
)
from app.models.source import resolve_model
from app.utils.errors import InputError
from app.utils.files import file_sha256

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WAYS = ("namespace/name", "local directory", "GGUF file", "pypi://")

NAMESPACES = {"api": (404, "EntryNotFound"), "gated": (403, "GatedRepo"), "broken": (503, "")}


def names_all_ways(error):
    return all(way in str(error.value) for way in WAYS) and "--model.name" in str(error.value)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve `hub/namespace/name/` as the Hub does, to an empty local cache, until `hub.close()`."""
    folder = tmp_path / "hub"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            namespace, name, _, revision, *inside = (self.path.strip("/").split("/") + [""] * 5)[:5]
            path = folder / namespace / name / inside[0]
            if namespace in NAMESPACES:
                self.answer(*NAMESPACES[namespace])
            elif not path.parent.is_dir():
                self.answer(401, "RepoNotFound")
            elif revision not in ("main", "v1", COMMIT):
                self.answer(404, "RevisionNotFound")
            elif not path.is_file():
                self.answer(404, "EntryNotFound")
            else:
                self.answer(200, "", path.read_bytes())

        do_HEAD = do_GET

        def answer(self, status, error, content=b""):
            self.send_response(status)
            self.send_header("X-Error-Code", error)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    point_hub_to(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)

    def close():
        server.shutdown()
        server.server_close()

    yield SimpleNamespace(path=folder, close=close)
    close()


def point_hub_to(monkeypatch, address, tmp_path):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        (["config.json"], None, r"lacks: config\.json\."),
        (["model.safetensors"], None, r"lacks: weights in model\.safetensors\."),
        (["tokenizer.json"], None, r"lacks: a tokenizer"),
        (["config.json", "model.safetensors"], None, r"lacks: config\.json; weights"),
        (["model.safetensors"], "pytorch_model.bin", "pickled weights, here pytorch_model.bin"),
        (["config.json"], "m.gguf", r"has the GGUF file m\.gguf"),
        ([], "adapter_config.json", "PEFT adapter"),
    ],
)
def test_directories_that_are_no_model(removed, added, message, tiny_model_dir):
    for name in removed:
        (tiny_model_dir / name).unlink()
    if added:
        (tiny_model_dir / added).write_text("{}")
    with pytest.raises(InputError, match=message) as error:
        resolve_model(str(tiny_model_dir))
    assert names_all_ways(error) or "PEFT" in message


@pytest.mark.parametrize(
    "name",
    ["", "gpt2", "./missing", "../missing/model", "/missing/model", "a/b/c", "~/missing", "a/b@"],
)
def test_no_such_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no existing path") as error:
        resolve_model(name)
    assert names_all_ways(error)


def test_bad_gguf_files(tmp_path):
    path = tmp_path / "model.gguf"
    other = tmp_path / "model.bin"
    other.write_bytes(b"GGUF")
    for name, message in ((path, "there is no file"), (other, "a file that is not a GGUF file")):
        with pytest.raises(InputError, match=message) as error:
            resolve_model(str(name))
        assert names_all_ways(error)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(InputError, match="wrong first bytes"):
        resolve_model(str(path))
    path.write_bytes(b"GGUF and rubbish")
    for digest in ("", "0" * 64):
        with pytest.raises(InputError, match=f"SHA-256 {file_sha256(path)}.* expects '{digest}'"):
            resolve_model(f"{path}#sha256={digest}")
    source = resolve_model(f"{path}#sha256={file_sha256(path).upper()}")
    assert source.kind == "gguf"
    assert model_fingerprint(source) == f"sha256:{file_sha256(path)}"


def test_package_names(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"does not name a \.gguf file"):
        resolve_model("pypi://toy==1.0/model.safetensors")
    with pytest.raises(InputError, match="without a checksum") as error:
        resolve_model("pypi://toy==1.0/model.gguf")
    assert names_all_ways(error)
    path = tmp_path / "model.gguf"
    monkeypatch.setattr(model_source, "fetch_package_file", lambda url: path)
    source = resolve_model("pypi://toy==1.0/model.gguf")
    assert source.kind == "pypi"
    place = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": path.name}
    assert source.load_args == place


def test_hub_model_online_then_offline(hub, tiny_model_dir, tiny_llama, monkeypatch, capfd):
    shutil.copytree(tiny_model_dir, hub.path / "some" / "model")
    source = resolve_model("some/model@v1")
    assert source.kind == "hub"
    assert source.load_args == {"pretrained_model_name_or_path": "some/model", "revision": COMMIT}
    assert model_fingerprint(source) == f"some/model@{COMMIT}"
    assert local_directory(source) is None
    assert base_reference(source) == ("some/model", COMMIT)
    ids = torch.arange(9)[None]
    expected = tiny_llama()(ids).logits
    assert torch.equal(load_model(source)(ids).logits, expected)
    load_tokenizer(source)
    assert capfd.readouterr().err.count("\n") == 1
    assert resolve_model("some/model").load_args == source.load_args
    assert capfd.readouterr().err == ""

    hub.close()
    with pytest.raises(InputError, match="cannot be reached"):
        resolve_model("some/other")
    offline = resolve_model(f"some/model@{COMMIT}")
    assert offline.load_args["local_files_only"]
    start = time.monotonic()
    model = load_model(offline)
    assert time.monotonic() - start < 5
    assert torch.equal(model(ids).logits, expected)
    assert model.name_or_path == "some/model"
    assert load_tokenizer(offline).pad_token == "<pad>"
    assert model_fingerprint(offline) == model_fingerprint(source)
    assert base_reference(offline) == base_reference(source)

    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--some--model/snapshots/*")
    (next(snapshot) / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no complete copy"):
        resolve_model(f"some/model@{COMMIT}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/model", r"has no such model.*model\.name='no/model'"),
        ("gated/model", "accept the model's terms"),
        ("broken/model", "cannot be reached"),
        ("some/model@v2", "has no revision 'v2'"),
        ("some/empty", r"has no config\.json of"),
    ],
)
def test_hub_refusals(hub, name, message):
    (hub.path / "some" / "empty").mkdir(parents=True)
    (hub.path / "some" / "model").mkdir()
    with pytest.raises(InputError, match=message):
        resolve_model(name)


def test_hub_model_with_pickled_weights_only(hub, tiny_model_dir):
    folder = hub.path / "some" / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_model(resolve_model("some/model"))


@pytest.mark.parametrize("offline", [False, True])
def test_without_the_hub_it_fails_soon(offline, tmp_path, monkeypatch):
    """Where nobody answers, and where nobody may be asked."""
    point_hub_to(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    start = time.monotonic()
    with pytest.raises(InputError, match="cannot be reached") as error:
        resolve_model("some/model")
    assert time.monotonic() - start < 15
    assert names_all_ways(error)
    assert isinstance(error.value.__cause__, OfflineModeIsEnabled) == offline
