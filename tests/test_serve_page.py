"""The page of ``segnext serve``, in a browser."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import small
from PIL import Image

from segnext import load, save
from segnext.images import read_image
from segnext.palette import generated_palette
from segnext.predict import segment

CLASSES = ["sky", "<b>road</b>", "tree", "car", "person"]  # one with what a careless page would take for its own


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    save(small.labelling(CLASSES), path)
    return path


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
    small.photo(96, 128).save(path)
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
        ("broken.jpg", small.encoded(small.photo(64, 64), "JPEG")[:900], "broken.jpg: cannot be read as an image"),
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
