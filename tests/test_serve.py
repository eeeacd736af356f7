"""The server of ``segnext serve``: what it answers, takes and refuses."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from io import BytesIO

import numpy as np
import pytest
import small
import torch
import torch.nn.functional as F
from fastapi.testclient import TestClient
from PIL import Image

from segnext import load, save
from segnext.cli import main
from segnext.gradcam import heat_image, heat_map
from segnext.images import read_image
from segnext.predict import segment
from segnext.serve.app import HEADERS, PAGE, create_app
from segnext.serve.session import HELD, SHOWN_SIDE, Gone, Session, logits_at

CLASSES = ["sky", "<b>road</b>", "tree", "car", "person"]  # one with what a careless page would take for its own
LIMIT = 100_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    model = small.labelling(CLASSES)
    model.scale = (56, 40)
    save(model, path)
    return path


@pytest.fixture
def session(weights):
    return Session(weights, rank=None, short_side=None, device="cpu")


@pytest.fixture
def client(session):
    return TestClient(create_app(session, LIMIT), "http://127.0.0.1:8000", raise_server_exceptions=False)


def send(client: TestClient, data, name: str = "street.png", kind: str = "application/octet-stream"):
    return client.post("api/photos", params={"name": name}, content=data, headers={"Content-Type": kind})


def huge_png(side: int) -> bytes:
    """A file of a few bytes that says to be a picture of side x side pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(bytes(100))
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in (header, data))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize(("low", "size"), [((3, 5), (20, 33)), ((1, 1), (4, 7)), ((6, 2), (6, 2)), ((9, 7), (5, 3))], ids=str)
def test_scores_of_a_pixel_are_those_of_the_upsampled_logits(low, size):
    logits = torch.randn(1, 4, *low, dtype=torch.float64)
    expected = F.interpolate(logits, size, mode="bilinear")[0]
    found = [[logits_at(logits, x, y, size) for x in range(size[1])] for y in range(size[0])]
    torch.testing.assert_close(torch.stack([torch.stack(row, 1) for row in found], 1), expected)


@pytest.mark.parametrize("size", [(45, 70), (1, 1), (96, 64)], ids=str)
def test_a_photograph_gets_the_labels_of_segnext_predict(client, weights, tmp_path, size):
    path = tmp_path / "street.png"
    path.write_bytes(small.encoded(small.photo(*size)))
    answer = send(client, path.read_bytes())
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["height"], found["width"]) == size and found["original"] == [size[1], size[0]]
    labels = np.frombuffer(client.get(f"api/photos/{found['key']}/labels").content, np.uint8).reshape(size)
    expected = segment(load(weights), read_image(path)).numpy()
    assert (labels == expected).mean() > 0.999
    assert [label for label, _ in found["shares"]] == sorted(set(labels.flat), key=lambda label: -(labels == label).sum())
    assert sum(share for _, share in found["shares"]) == pytest.approx(1)
    mask = Image.open(BytesIO(client.get(f"api/photos/{found['key']}/mask.png").content))
    np.testing.assert_array_equal(np.asarray(mask), labels)
    shown = Image.open(BytesIO(client.get(f"api/photos/{found['key']}/photo").content))
    assert shown.size == size[::-1]
    names = [name for name, _ in found["seconds"]]
    stages = [f"encoder, stage {i}" for i in range(1, 5)]
    assert names == ["read the file", "resize, normalise", *stages, "decoder head", "labels"]
    assert all(seconds > 0 for _, seconds in found["seconds"])


def test_a_pixel_has_a_class_and_scores(client, session):
    found = send(client, small.encoded(small.photo(40, 56))).json()
    photo = session.photo(found["key"])
    logits = F.interpolate(photo.logits, (40, 56), mode="bilinear")[0]
    for x, y in [(0, 0), (55, 39), (17, 30)]:
        answer = client.get(f"api/photos/{found['key']}/pixel", params={"x": x, "y": y}).json()
        assert answer["class"] == photo.labels[y, x]
        expected = logits[:, y, x].softmax(0).sort(descending=True)
        assert [label for label, _ in answer["scores"]] == expected.indices.tolist()
        np.testing.assert_allclose([score for _, score in answer["scores"]], expected.values, rtol=1e-4)


@pytest.mark.parametrize("pixel", [{}, {"x": 50, "y": 20}], ids=["class", "region"])
@pytest.mark.parametrize("layer", ["stage3", "head"])
def test_the_heat_map_is_that_of_segnext_gradcam(client, session, layer, pixel):
    found = send(client, small.encoded(small.photo(40, 56))).json()
    photo = session.photo(found["key"])
    answer = client.get(f"api/photos/{found['key']}/gradcam", params={"class": 2, "layer": layer, **pixel})
    assert answer.status_code == 200 and re.fullmatch(r"gradcam;dur=[\d.]+", answer.headers["Server-Timing"])
    region = (50, 20) if pixel else None
    expected = heat_image(photo.image, heat_map(session.model, photo.image, 2, layer, region))
    difference = np.asarray(Image.open(BytesIO(answer.content))).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).mean() < 8  # JPEG


def test_one_thread_computes(client, session, monkeypatch):
    threads = []

    def telling(method):
        return lambda *arguments: threads.append(threading.current_thread().name) or method(*arguments)

    for name in ("add", "shares", "picture", "mask", "scores", "heat"):
        monkeypatch.setattr(session, name, telling(getattr(session, name)))
    key = send(client, small.encoded(small.photo(8, 8))).json()["key"]
    for path in ("photo", "mask.png", "pixel?x=0&y=0", "gradcam?class=0"):
        assert client.get(f"api/photos/{key}/{path}").status_code == 200
    assert threads == ["model_0"] * 6


def test_the_short_side_given_is_what_the_models_see(weights):
    session, sizes = Session(weights, rank=None, short_side=16, device="cpu"), []
    for model in (session.fast, session.model):
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    photo = session.add(small.encoded(small.photo(40, 56)), "street.png")
    assert sizes == [(16, 22)]
    session.heat(photo, 0, "stage4", None)
    assert len(sizes) > 1 and set(sizes) == {(16, 22)}


def test_the_models_see_as_much_of_a_large_photograph_as_is_shown(weights):
    session, sizes = Session(weights, rank=None, short_side=0, device="cpu"), []
    for model in (session.fast, session.model):
        model.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[2:])))
    photo = session.add(small.encoded(Image.new("RGB", (2 * SHOWN_SIDE, 32), "grey")), "long.png")
    session.heat(photo, 0, "stage4", None)
    assert len(sizes) > 1 and set(sizes) == {(16, SHOWN_SIDE)}


def test_a_large_photograph_is_shown_smaller(client):
    found = send(client, small.encoded(Image.new("RGB", (2 * SHOWN_SIDE, 300), "grey"))).json()
    assert (found["width"], found["height"], found["original"]) == (SHOWN_SIDE, 150, [2 * SHOWN_SIDE, 300])
    assert len(client.get(f"api/photos/{found['key']}/labels").content) == SHOWN_SIDE * 150


def test_a_photograph_is_turned_as_its_file_says(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = send(client, small.encoded(small.photo(16, 40), "JPEG", exif=exif)).json()
    assert (found["width"], found["height"]) == (16, 40)


def test_only_the_latest_photographs_are_held(session):
    data = small.encoded(small.photo(8, 8))
    keys = [session.add(data, "a").key for _ in range(HELD + 1)]
    assert len(set(keys)) == HELD + 1
    with pytest.raises(Gone, match="no longer held"):
        session.photo(keys[0])
    assert all(session.photo(key).key == key for key in keys[1:])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no picture", "holiday.jpg: not an image"),
        (small.encoded(small.photo(64, 64), "JPEG")[:900], "holiday.jpg: cannot be read as an image"),
        (b"", "the file is empty"),
        (small.encoded(small.photo(8, 8), "PPM"), "holiday.jpg: not an image, or of an unknown format"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "holiday.jpg: not an image"),
        (huge_png(12_000), "12000x12000 pixels, more than 100 million"),
        (huge_png(200_000), "million pixels"),
    ],
    ids=["text", "cut short", "empty", "PPM", "SVG", "many pixels", "a bomb"],
)
def test_a_broken_file_gets_a_message(client, data, says):
    answer = send(client, data, "holiday.jpg")
    assert answer.status_code == 400 and says in answer.json()["detail"]
    assert send(client, small.encoded(small.photo(8, 8))).status_code == 200  # and the next one is served


@pytest.mark.parametrize("told", [True, False], ids=["length told", "in pieces"])
def test_a_large_file_is_refused(client, told):
    pieces = (bytes(LIMIT // 4) for _ in range(5))
    answer = send(client, b"".join(pieces) if told else pieces)
    assert answer.status_code == 413 and answer.json()["detail"] == "the file is larger than 0.1 MB"


def test_a_client_that_leaves_is_no_error(client):
    """As a browser whose page is closed during an upload."""
    path = {"type": "http", "method": "POST", "path": "/api/photos", "query_string": b""}
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/octet-stream")]

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    asyncio.run(client.app({**path, "headers": headers}, receive, send))


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=a", "application/x-www-form-urlencoded"])
def test_what_another_sites_page_could_send_is_refused(client, kind):
    assert send(client, small.encoded(small.photo(8, 8)), kind=kind).status_code == 415


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example"])
def test_other_names_of_the_host_are_refused(client, host):
    assert client.get("/", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize(
    ("path", "query", "status", "says"),
    [
        ("pixel", {"x": 8, "y": 0}, 422, "the pixel 8,0 is not inside of a picture of 8x8"),
        ("pixel", {"x": -1, "y": 0}, 422, "not inside"),
        ("pixel", {"x": "left", "y": 0}, 422, "x: "),
        ("gradcam", {"class": 5}, 422, "there is no class 5; there are 5"),
        ("gradcam", {"class": -1}, 422, "there is no class -1"),
        ("gradcam", {"class": 0, "layer": "stage5"}, 422, "layer: "),
        ("gradcam", {"class": 0, "x": 1}, 422, "a pixel has x and y"),
        ("gradcam", {"class": 0, "x": 1, "y": 9}, 422, "not inside"),
    ],
)
def test_wrong_requests_get_a_sentence(client, path, query, status, says):
    key = send(client, small.encoded(small.photo(8, 8))).json()["key"]
    answer = client.get(f"api/photos/{key}/{path}", params=query)
    assert answer.status_code == status and says in answer.json()["detail"]


@pytest.mark.parametrize("path", ["photo", "labels", "mask.png", "pixel?x=0&y=0", "gradcam?class=0"])
def test_a_photograph_that_is_not_there(client, path):
    answer = client.get(f"api/photos/nothing/{path}")
    assert answer.status_code == 404 and "no longer held" in answer.json()["detail"]


def test_the_page_needs_nothing_from_elsewhere(client):
    page = client.get("/")
    assert page.status_code == 200 and {name: page.headers[name] for name in HEADERS} == HEADERS
    named = re.findall(r'(?:href|src)="([^"]+)"', page.text)
    assert {file.name for file in PAGE.iterdir()} == {"index.html", *named} - {"data:,"}
    for name in set(named) - {"data:,"}:
        answer = client.get(name)
        assert answer.status_code == 200 and "http" not in answer.text


def test_a_port_in_use(weights, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--weights", str(weights), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot be used: Address already in use; --port names another" in capsys.readouterr().err
    assert main(["serve", "--weights", str(weights), "--port", "70000"]) == 2
    assert "port 70000 cannot be used: ports end at 65535" in capsys.readouterr().err


def test_a_signal_may_come_as_soon_as_the_address_is_there(weights):
    command = [sys.executable, "-m", "segnext", "serve", "--weights", str(weights), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout.readline().startswith("http://127.0.0.1:")
    server.send_signal(signal.SIGINT)
    assert (*server.communicate(timeout=60), server.returncode) == ("ended\n", "", 0)


def test_the_mask_has_the_size_of_the_file(client, session):
    added = send(client, small.encoded(Image.new("RGB", (SHOWN_SIDE + 100, 10), "grey"))).json()
    assert (added["width"], added["original"]) == (SHOWN_SIDE, [SHOWN_SIDE + 100, 10])
    mask = Image.open(BytesIO(client.get(f"api/photos/{added['key']}/mask.png").content))
    assert mask.size == (SHOWN_SIDE + 100, 10)


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (torch.OutOfMemoryError("x"), 507, "the memory of cpu is too small; try a smaller --short-side"),
        (ValueError("x"), 500, "the server failed: ValueError"),
    ],
)
def test_failures_are_told_as_everything_else(client, session, monkeypatch, error, status, says):
    def fail(images):
        raise error

    monkeypatch.setattr(session.fast, "forward", fail)
    answer = send(client, small.encoded(Image.new("RGB", (30, 20), "grey")))
    assert (answer.status_code, answer.json()) == (status, {"detail": says})
