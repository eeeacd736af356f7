"""Hosted weights: fetched from a server on localhost, cached, and every way in which that can fail."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import golden
import pytest
import torch

import segnext
from segnext import WeightsError, hosted


def assert_golden(network: torch.nn.Module) -> None:
    torch.testing.assert_close(network.state_dict(), golden.model(torch.float32).state_dict(), rtol=0, atol=0)


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder; below /short/ it promises more bytes than it sends."""

    def log_message(self, *args) -> None: ...

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if not self.path.startswith("/short/"):
            return super().do_GET()
        content = (Path(self.directory) / self.path.removeprefix("/short/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])


class Site:
    """Weights on localhost, and the folder that fetched ones are kept in."""

    def __init__(self, server: ThreadingHTTPServer, folder: Path, cache: Path) -> None:
        self.server, self.folder, self.cache = server, folder, cache
        self.url = f"http://localhost:{server.server_port}"
        whole = folder / "model.pth"
        torch.save({"state_dict": golden.state_dict()}, whole)
        self.content = whole.read_bytes()
        self.name = f"model-{hashlib.sha256(self.content).hexdigest()[:8]}.pth"
        whole.rename(folder / self.name)

    def cached(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.cache.iterdir()} if self.cache.exists() else {}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    (tmp_path / "site").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("localhost", 0), lambda *args: Handler(*args, directory=str(tmp_path / "site")))
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield Site(server, tmp_path / "site", tmp_path / "torch" / "hub" / "checkpoints")
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_fetch(site, monkeypatch, scheme):
    base = site.url if scheme == "http" else site.folder.as_uri()
    monkeypatch.setitem(hosted.HOSTED, "ade20k-t", f"{base}/{site.name}")
    assert_golden(segnext.load("ade20k-t"))
    assert site.cached() == {site.name: site.content}
    (site.folder / site.name).unlink()
    assert_golden(segnext.load("ade20k-t"))  # from the cache
    assert len(site.server.requests) == (1 if scheme == "http" else 0)


def test_fetch_an_encoder(site, monkeypatch):
    monkeypatch.setitem(hosted.HOSTED, "imagenet-t", f"{site.url}/{site.name}")
    encoder = segnext.SegNeXt(golden.CONFIG).backbone
    segnext.load_encoder(encoder, "imagenet-t")
    torch.testing.assert_close(encoder.state_dict(), golden.model(torch.float32).backbone.state_dict(), rtol=0, atol=0)


def test_a_damaged_cached_file_is_fetched_again(site, monkeypatch):
    monkeypatch.setitem(hosted.HOSTED, "ade20k-t", f"{site.url}/{site.name}")
    site.cache.mkdir(parents=True)
    (site.cache / site.name).write_bytes(site.content[:-100])
    assert_golden(segnext.load("ade20k-t"))
    assert site.cached() == {site.name: site.content}


@pytest.mark.parametrize("cached", [False, True], ids=["empty cache", "damaged cache"])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("{url}/model-00000000.pth", r"wrong content: its SHA-256 begins with \w{8}, not 00000000"),
        ("{url}/short/{name}", r"the download ended after \d+ of \d+ bytes"),
        ("{url}/nowhere/{name}", "HTTP Error 404"),
        ("http://localhost:1/{name}", "Connection refused"),
        ("http://host.invalid/{name}", "cannot fetch http://host.invalid/"),
        ("file:///nowhere/{name}", "No such file"),
    ],
    ids=["wrong hash", "truncated", "not found", "refused", "no such host", "no such file"],
)
def test_failed_downloads(site, monkeypatch, place, message, cached):
    (site.folder / "model-00000000.pth").write_bytes(site.content)
    url = place.format(url=site.url, name=site.name)
    monkeypatch.setitem(hosted.HOSTED, "ade20k-t", url)
    if cached:
        site.cache.mkdir(parents=True)
        (site.cache / url.rsplit("/", 1)[1]).write_bytes(b"damaged")
    with pytest.raises(WeightsError, match=message) as caught:
        segnext.load("ade20k-t")
    assert url in str(caught.value) and "\n" not in str(caught.value)
    assert site.cached() == {}


def test_fetch_needs_no_tqdm(site):
    code = f"""import sys; sys.modules["tqdm"] = sys.modules["tqdm.auto"] = None; import segnext
segnext.hosted.HOSTED["ade20k-t"] = "{site.url}/{site.name}"
segnext.load("ade20k-t")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert site.cached() == {site.name: site.content}


def test_hosted_names():
    assert list(hosted.HOSTED) == [f"{data}-{size}" for data in ("ade20k", "imagenet") for size in "tsbl"]
    site = "https://download.openmmlab.com/mmsegmentation/v0.5/"
    run = "segnext_mscan-t_1x16_512x512_adamw_160k_ade20k"
    assert hosted.HOSTED["ade20k-t"] == f"{site}segnext/{run}/{run}_20230210_140244-05bd8466.pth"
    assert hosted.HOSTED["imagenet-l"] == f"{site}pretrain/segnext/mscan_l_20230227-cef260d4.pth"
