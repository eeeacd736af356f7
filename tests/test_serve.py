"""The page of ``segnext serve``: what its server takes and refuses, and the page itself in a browser."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

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
from segnext.palette import generated_palette
from segnext.predict import segment
from segnext.serve.app import HEADERS, PAGE, create_app
from segnext.serve.session import HELD, SHOWN_SIDE, Gone, Session, logits_at

CLASSES = ["sky", "<b>road</b>", "tree", "car", "person"]  # one with what a careless page would take for its own
LIMIT = 100_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A small model whose random weights are large enough for several classes to occur."""
    model = small.model(num_classes=len(CLASSES))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    model.classes = CLASSES
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save(model, path)
    return path


@pytest.fixture
def session(weights):
    return Session(weights, rank=None, short_side=None, device="cpu")


@pytest.fixture
def client(session):
    return TestClient(create_app(session, LIMIT), "http://127.0.0.1:8000", raise_server_exceptions=False)


def patches(height: int, width: int, seed: int = 0) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((8, 8, 1), np.uint8))[:height, :width])


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


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
    path.write_bytes(encoded(patches(*size)))
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
    found = send(client, encoded(patches(40, 56))).json()
    photo = session.photo(found["key"])
    logits = F.interpolate(photo.logits, (40, 56), mode="bilinear")[0]
    for x, y in [(0, 0), (55, 39), (17, 30)]:
        answer = client.get(f"api/photos/{found['key']}/pixel", params={"x": x, "y": y}).json()
        assert answer["class"] == photo.labels[y, x]
        expected = logits[:, y, x].softmax(0).sort(descending=True)
        assert [label for label, _ in answer["scores"]] == expected.indices.tolist()
        np.testing.assert_allclose([score for _, score in answer["scores"]], expected.values, rtol=1e-4)


@pytest.mark.parametrize("pixel", [{}, {"x": 30, "y": 20}], ids=["class", "region"])
@pytest.mark.parametrize("layer", ["stage3", "head"])
def test_the_heat_map_is_that_of_segnext_gradcam(client, session, layer, pixel):
    found = send(client, encoded(patches(40, 56))).json()
    photo = session.photo(found["key"])
    answer = client.get(f"api/photos/{found['key']}/gradcam", params={"class": 2, "layer": layer, **pixel})
    assert answer.status_code == 200 and re.fullmatch(r"gradcam;dur=[\d.]+", answer.headers["Server-Timing"])
    region = (30, 20) if pixel else None
    expected = heat_image(photo.image, heat_map(session.model, photo.image, 2, layer, region))
    difference = np.asarray(Image.open(BytesIO(answer.content))).astype(int) - np.asarray(expected).astype(int)
    assert np.abs(difference).mean() < 8  # JPEG


def test_a_large_photograph_is_shown_smaller(client):
    found = send(client, encoded(Image.new("RGB", (2 * SHOWN_SIDE, 300), "grey"))).json()
    assert (found["width"], found["height"], found["original"]) == (SHOWN_SIDE, 150, [2 * SHOWN_SIDE, 300])
    assert len(client.get(f"api/photos/{found['key']}/labels").content) == SHOWN_SIDE * 150


def test_a_photograph_is_turned_as_its_file_says(client):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = send(client, encoded(patches(16, 40), "JPEG", exif=exif)).json()
    assert (found["width"], found["height"]) == (16, 40)


def test_only_the_latest_photographs_are_held(session):
    data = encoded(patches(8, 8))
    keys = [session.add(data, "a").key for _ in range(HELD + 1)]
    assert len(set(keys)) == HELD + 1
    with pytest.raises(Gone, match="no longer held"):
        session.photo(keys[0])
    assert all(session.photo(key).key == key for key in keys[1:])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"no picture", "holiday.jpg: not an image"),
        (encoded(patches(64, 64), "JPEG")[:900], "holiday.jpg: cannot be read as an image"),
        (b"", "the file is empty"),
        (encoded(patches(8, 8), "PPM"), "holiday.jpg: not an image, or of an unknown format"),
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "holiday.jpg: not an image"),
        (huge_png(12_000), "12000x12000 pixels, more than 100 million"),
        (huge_png(200_000), "million pixels"),
    ],
    ids=["text", "cut short", "empty", "PPM", "SVG", "many pixels", "a bomb"],
)
def test_a_broken_file_gets_a_message(client, data, says):
    answer = send(client, data, "holiday.jpg")
    assert answer.status_code == 400 and says in answer.json()["detail"]
    assert send(client, encoded(patches(8, 8))).status_code == 200  # and the next one is served


@pytest.mark.parametrize("told", [True, False], ids=["length told", "in pieces"])
def test_a_large_file_is_refused(client, told):
    pieces = (bytes(LIMIT // 4) for _ in range(5))
    answer = send(client, b"".join(pieces) if told else pieces)
    assert answer.status_code == 413 and answer.json()["detail"] == "the file is larger than 0.1 MB"


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=a", "application/x-www-form-urlencoded"])
def test_what_another_sites_page_could_send_is_refused(client, kind):
    assert send(client, encoded(patches(8, 8)), kind=kind).status_code == 415


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
    key = send(client, encoded(patches(8, 8))).json()["key"]
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


# In a browser.


def chromium(playwright) -> str:
    """A Chromium: the system's, or Playwright's own."""
    names = ("chromium", "chromium-browser", "google-chrome", playwright.chromium.executable_path)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("there is no Chromium (apt install chromium, or playwright install chromium)")
    return found


@pytest.fixture(scope="module")
def address(weights):
    """That of `segnext serve` in a process of its own; it is interrupted in the end, which is no failure."""
    command = [sys.executable, "-m", "segnext", "serve", "--weights", str(weights), "--port", "0", "--megabytes", "1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = server.stdout.readline()
    yield re.match(r"http://127\.0\.0\.1:\d+", line).group()
    server.send_signal(signal.SIGINT)
    _, errors = server.communicate(timeout=30)
    assert (server.returncode, errors) == (0, "")


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(playwright), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, which afterwards must have asked nobody else and had no error of its own."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    errors, elsewhere = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:")) or elsewhere.append(request.url))
    page.goto(address)
    yield page
    page.close()
    assert (errors, elsewhere) == ([], [])


def open_photo(page, path: Path) -> None:
    page.set_input_files("#file", path)
    page.wait_for_selector("#results:not([hidden])")


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "street.png"
    path.write_bytes(encoded(patches(96, 128)))
    return path


def pixel(page, x: int, y: int) -> np.ndarray:
    code = f"[...document.getElementById('picture').getContext('2d').getImageData({x}, {y}, 1, 1).data]"
    return np.array(page.evaluate(code)[:3])


def picture(page) -> list[int]:
    return page.evaluate("(c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data])(picture)")


def click_pixel(page, x: int, y: int) -> None:
    box = page.locator("#picture").bounding_box()
    page.mouse.click(box["x"] + (x + 0.5) * box["width"] / 128, box["y"] + (y + 0.5) * box["height"] / 96)
    page.locator("#place", has_text=f"{x}, {y}: ").wait_for()


def test_page_shows_the_overlay_and_its_legend(page, photo, weights):
    open_photo(page, photo)
    assert page.title() == page.locator("#model").inner_text() == "SegNeXt"  # of none of the paper's sizes
    labels = segment(load(weights), read_image(photo)).numpy()
    names = page.locator("#legend label").all_inner_texts()
    counts = np.bincount(labels.ravel(), minlength=5)
    expected = [f"{CLASSES[i]} {100 * counts[i] / labels.size:.1f}%" for i in np.argsort(-counts, kind="stable") if counts[i]]
    assert [" ".join(name.split()) for name in names] == expected
    assert len(expected) > 1

    palette = np.array(generated_palette(5))
    for opacity in (0, 0.25, 1):
        page.locator("#opacity").fill(str(opacity))
        for x, y in [(3, 3), (60, 70), (127, 95)]:
            original = np.asarray(Image.open(photo))[y, x]
            mixed = (1 - opacity) * original + opacity * palette[labels[y, x]]
            np.testing.assert_allclose(pixel(page, x, y), mixed, atol=40 * (1 - opacity) + 1)  # JPEG beneath


def test_page_hides_and_shows_classes(page, photo, weights):
    open_photo(page, photo)
    page.locator("#opacity").fill("1")
    labels = segment(load(weights), read_image(photo)).numpy()
    palette = np.array(generated_palette(5), np.uint8)
    everything = np.array(picture(page)).reshape(96, 128, 4)[..., :3]
    assert (everything == palette[labels]).all(-1).mean() > 0.999
    page.locator("#legend input").first.uncheck()
    first = np.bincount(labels.ravel()).argmax()
    fewer = np.array(picture(page)).reshape(96, 128, 4)[..., :3]
    assert (fewer == palette[labels]).all(-1)[labels != first].mean() > 0.999
    assert (fewer == palette[labels]).all(-1)[labels == first].mean() < 0.1
    page.locator("#none").click()
    assert not page.locator("#legend input:checked").count()
    assert (np.array(picture(page)).reshape(96, 128, 4)[..., :3] == palette[labels]).all(-1).mean() < 0.1
    page.locator("#all").click()
    assert (np.array(picture(page)).reshape(96, 128, 4)[..., :3] == everything).all()


def test_page_tells_a_pixels_class_and_draws_its_heat_map(page, photo, weights):
    open_photo(page, photo)
    plain = picture(page)
    click_pixel(page, 40, 50)
    labels = segment(load(weights), read_image(photo)).numpy()
    assert page.locator("#place").inner_text() == f"40, 50: {CLASSES[labels[50, 40]]}"
    rows = page.locator("#scores tr").all_inner_texts()
    assert len(rows) == 5 and rows[0].startswith(CLASSES[labels[50, 40]])
    scores = [float(re.search(r"\d\.\d+", row).group()) for row in rows]
    assert scores == sorted(scores, reverse=True) and sum(scores) == pytest.approx(1, abs=0.003)

    with page.expect_response("**/gradcam*") as answer:
        page.locator("#scores button").first.click()
    page.wait_for_selector("#hide:not([hidden])")
    assert answer.value.url.endswith(f"/gradcam?class={labels[50, 40]}&layer=stage4")
    assert picture(page) != plain
    assert f"Grad-CAM of {CLASSES[labels[50, 40]]}" in page.locator("#times").inner_text()

    page.locator("#region").check()
    page.locator("#layer").select_option("head")
    with page.expect_response("**/gradcam*") as answer:
        page.locator("#scores button").last.click()
    assert "layer=head&x=40&y=50" in answer.value.url and answer.value.ok
    page.locator("#hide").click()
    assert "Grad-CAM" not in page.locator("#times").inner_text()
    for line in ("read the file", "encoder, stage 4", "decoder head", "together"):
        assert line in page.locator("#times").inner_text()


def test_page_takes_what_is_dropped(page, photo):
    drop = """data => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(data)], "dropped.png", { type: "image/png" }));
        document.getElementById("drop").dispatchEvent(new DragEvent("drop", { dataTransfer: files, bubbles: true }));
    }"""
    page.evaluate(drop, list(photo.read_bytes()))
    page.wait_for_selector("#results:not([hidden])")
    assert page.locator("#size").inner_text() == "128 x 96 pixels"
    with page.expect_download() as download:
        page.locator("#mask").click()
    assert Image.open(download.value.path()).size == (128, 96)


def test_page_tells_of_broken_and_large_files_and_goes_on(page, photo, tmp_path):
    open_photo(page, photo)
    for name, data, says in [
        ("broken.jpg", encoded(patches(64, 64), "JPEG")[:900], "broken.jpg: cannot be read as an image"),
        ("letter.txt", b"Dear", "letter.txt: not an image, or of an unknown format"),
        ("large.png", bytes(1_000_001), "large.png is larger than 1 MB."),
    ]:
        (tmp_path / name).write_bytes(data)
        page.set_input_files("#file", tmp_path / name)
        page.locator("#message", has_text=says).wait_for()
        assert page.locator("#picture").is_visible()  # the one before is still there
    open_photo(page, photo)
    page.locator("#message").wait_for(state="hidden")


def test_page_says_when_the_server_is_gone(page, photo):
    page.route("**/api/photos*", lambda route: route.abort())
    page.set_input_files("#file", photo)
    page.locator("#message", has_text="The server does not answer; is it still running?").wait_for()
