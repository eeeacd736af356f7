"""Image files of every kind, and label maps as pictures."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, features

from segnext.data.isaid import read_mask
from segnext.images import ImageError, normalise, read_image, read_labels, stored_image, write_png
from segnext.palette import generated_palette, legend, mask_image, overlay

RNG = np.random.default_rng(0)
PICTURE = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = PICTURE[..., 0]


def read(image: Image.Image, path: Path, **options) -> np.ndarray:
    """What read_image makes of an image written to a file: [H, W, 3]."""
    image.save(path, **options)
    found = read_image(path)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    return found.permute(1, 2, 0).numpy()


def sixteen_bit_png(path: Path, values: np.ndarray, colour_type: int) -> None:
    """PIL writes no 16-bit PNG with several channels: uint16 [H, W, C], colour type 2 (RGB) or 4 (grey and alpha)."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


@pytest.mark.parametrize("ending", ["png", "bmp", "tif", "webp", "ppm"])
def test_rgb_is_read_exactly(tmp_path, ending):
    options = {"lossless": True} if ending == "webp" else {}
    np.testing.assert_array_equal(read(Image.fromarray(PICTURE), tmp_path / f"a.{ending}", **options), PICTURE)


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, ending, orientation):
    shown = {
        1: lambda a: a,
        2: np.fliplr,
        3: lambda a: np.rot90(a, 2),
        4: np.flipud,
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
        8: np.rot90,
    }[orientation]
    corners = np.kron(np.array([[0, 80, 160], [255, 200, 40]], np.uint8), np.ones((16, 16), np.uint8))
    stored = np.stack([corners] * 3, -1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(Image.fromarray(stored), tmp_path / f"a.{ending}", exif=exif)
    np.testing.assert_allclose(found.astype(int), shown(stored).astype(int), atol=0 if ending == "png" else 6)


def test_other_exif_tags_may_be_odd(tmp_path):
    """ResolutionUnit, a number, as text: writing the tags again, which nobody needs, would fail."""
    entries = struct.pack("<HHII", 0x0112, 3, 1, 6) + struct.pack("<HHI4s", 0x0128, 2, 4, b"two\0")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    found = read(Image.new("RGB", (16, 8)), tmp_path / "a.jpg", exif=exif)
    assert found.shape == (16, 8, 3)


def test_a_transparent_grey_of_16_bits_is_white(tmp_path):
    values = np.array([[0, 500, 30000, 65535]], np.uint16)
    found = read(Image.fromarray(values), tmp_path / "a.png", transparency=500)
    assert found[0, :, 0].tolist() == [0, 255, 117, 255]


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "tif"])
def test_greyscale(tmp_path, ending):
    flat = np.full((9, 4), 77, np.uint8)
    np.testing.assert_array_equal(read(Image.fromarray(flat), tmp_path / f"a.{ending}"), np.full((9, 4, 3), 77))


def test_bilevel(tmp_path):
    np.testing.assert_array_equal(read(Image.fromarray(GREY > 128), tmp_path / "a.png")[..., 1], (GREY > 128) * 255)


def test_palette(tmp_path):
    image = Image.fromarray(PICTURE).quantize(16)
    np.testing.assert_array_equal(read(image, tmp_path / "a.png"), np.asarray(image.convert("RGB")))


def test_rgba_is_composited_on_white(tmp_path):
    alpha = np.linspace(0, 255, 35).reshape(5, 7, 1).round()
    found = read(Image.fromarray(np.concatenate([PICTURE, alpha], -1).astype(np.uint8)), tmp_path / "a.png")
    np.testing.assert_allclose(found, PICTURE * (alpha / 255) + 255 * (1 - alpha / 255), atol=1)


def test_grey_with_alpha_is_composited_on_white(tmp_path):
    image = Image.merge("LA", [Image.new("L", (3, 2), 100), Image.new("L", (3, 2), 51)])
    np.testing.assert_allclose(read(image, tmp_path / "a.png"), np.full((2, 3, 3), 100 * 0.2 + 255 * 0.8), atol=1)


def test_transparent_palette_entry_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    np.testing.assert_array_equal(read(image, tmp_path / "a.png", transparency=0)[0], [[255, 255, 255], [40, 50, 60]])


def test_cmyk(tmp_path):
    found = read(Image.new("CMYK", (16, 16), (255, 0, 255, 0)), tmp_path / "a.jpg")
    np.testing.assert_allclose(found.astype(int), np.broadcast_to([0, 255, 0], (16, 16, 3)), atol=3)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, ending):
    values = np.array([[0, 128, 129, 257, 32768, 65406, 65407, 65535]], np.uint16)
    found = read(Image.fromarray(values), tmp_path / f"a.{ending}")
    np.testing.assert_array_equal(found[0, :, 2], [0, 0, 1, 1, 128, 254, 255, 255])


@pytest.mark.parametrize("colour_type, channels", [(2, 3), (4, 2)], ids=["RGB", "grey and alpha"])
def test_16_bit_png_of_several_channels(tmp_path, colour_type, channels):
    values = RNG.integers(0, 65536, (4, 3, channels)).astype(np.uint16)
    if channels == 2:
        values[..., 1] = 65535
    sixteen_bit_png(tmp_path / "a.png", values, colour_type)
    found = read_image(tmp_path / "a.png").permute(1, 2, 0).numpy().astype(int)
    np.testing.assert_allclose(found, np.broadcast_to(values[..., : 3 if channels == 3 else 1] / 257, (4, 3, 3)), atol=1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_one_pixel(tmp_path, mode):
    assert read(Image.new(mode, (1, 1)), tmp_path / "a.png").shape == (1, 1, 3)


def test_animation_gives_its_first_picture(tmp_path):
    first, second = Image.new("L", (4, 4), 50), Image.new("L", (4, 4), 200)
    assert (read(first, tmp_path / "a.gif", save_all=True, append_images=[second]) == 50).all()


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "gif"])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 0.9])
def test_truncated_file_is_named(tmp_path, ending, kept):
    path = tmp_path / f"broken.{ending}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=f"broken.{ending}"):
        read_image(path)


@pytest.mark.parametrize("data", [b"just text", bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(100), b"\xff\xd8\xff" + bytes(100)])
def test_other_bytes_are_named(tmp_path, data):
    (tmp_path / "broken.png").write_bytes(data)
    with pytest.raises(ImageError, match="broken.png"):
        read_image(tmp_path / "broken.png")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(ImageError, match="absent.png: no such file"):
        read_image(tmp_path / "absent.png")
    with pytest.raises(ImageError, match=tmp_path.name):
        read_image(tmp_path)


def test_floating_point_image_is_refused(tmp_path):
    with pytest.raises(ImageError, match="a.tif.*unknown range"):
        read(Image.new("F", (2, 2)), tmp_path / "a.tif")


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("1", (3000, 1000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(ImageError, match="bomb.png.*more than 2 million pixels"):
        read_image(tmp_path / "bomb.png")


def test_normalise():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = [[-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]]
    torch.testing.assert_close(normalise(images).flatten(1), torch.tensor(expected))


def test_write_png_leaves_nothing_half_written(tmp_path):
    write_png(Image.new("L", (2, 2)), tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    with pytest.raises(OSError):
        write_png(Image.new("HSV", (2, 2)), tmp_path / "a.png")  # a mode that PNG has not
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_generated_palette_is_that_of_voc_after_black():
    palette = generated_palette(255)
    assert palette[:4] == [(128, 0, 0), (0, 128, 0), (128, 128, 0), (0, 0, 128)]
    assert palette[7] == (64, 0, 0) and palette[254] == (224, 224, 192)
    assert len(set(palette)) == 255 and (0, 0, 0) not in palette


def test_mask_image_keeps_labels_and_colours():
    labels = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    image = mask_image(labels, [(1, 2, 3), (4, 5, 6), (7, 8, 9)])
    assert image.mode == "P" and np.asarray(image).tolist() == labels.tolist()
    assert np.asarray(image.convert("RGB")).tolist() == [[[1, 2, 3], [4, 5, 6], [7, 8, 9], [0, 0, 0]]]


@pytest.mark.parametrize("alpha, expected", [(0.0, 200), (0.25, 175), (1.0, 100)])
def test_overlay_blends(alpha, expected):
    image = torch.full((3, 2, 2), 200, dtype=torch.uint8)
    found = overlay(image, torch.zeros(2, 2), [(100, 100, 100)], alpha)
    assert np.asarray(found).tolist() == [[[expected] * 3] * 2] * 2


@pytest.mark.parametrize("count", [1, 25, 26, 150])
def test_legend_shows_every_colour(count):
    palette = generated_palette(count)
    colours = {colour for _, colour in legend([f"class {i}" for i in range(count)], palette).getcolors(1 << 20)}
    assert set(palette) <= colours


def test_a_legend_has_each_colour_beside_its_name():
    names, palette = ["one", "two", "three"], generated_palette(3)
    rows = np.asarray(legend(names, palette))[6:-6]
    for row, name, colour in zip(np.split(rows, 3), names, palette, strict=True):
        alone = np.asarray(legend([name], [colour]))[6:-6]
        assert alone[10, 14].tolist() == list(colour)
        np.testing.assert_array_equal(row[:, : alone.shape[1]], alone)


def test_a_legend_has_letters_of_other_alphabets():
    """Where a font has none, boxes that are all alike."""
    drawn = [np.asarray(legend([name], [(0, 0, 0)])) for name in ("\u0436", "\u03b2", "\u00e9", "\u0142")]
    assert not any(np.array_equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


@pytest.mark.parametrize(
    "ending, options, name",
    [
        ("jpg", {}, "JPEG"),
        ("tif", {"compression": "jpeg"}, "TIFF with JPEG"),
        ("jp2", {}, "JPEG 2000"),
        pytest.param(
            "avif",
            {},
            "AVIF",
            marks=pytest.mark.skipif(not features.check("avif"), reason="this Pillow knows no AVIF"),
        ),
    ],
)
def test_masks_in_formats_that_change_labels_are_refused(tmp_path, ending, options, name):
    Image.fromarray(np.eye(16, dtype=np.uint8)).save(tmp_path / f"mask.{ending}", **options)
    with pytest.raises(ImageError, match=f"mask.{ending}.*a mask in {name} can have other labels than were stored"):
        read_labels(tmp_path / f"mask.{ending}")


def test_masks_in_tiff_that_loses_nothing_are_read(tmp_path):
    labels = RNG.integers(0, 9, (5, 7), dtype=np.uint8)
    for compression in (None, "tiff_lzw", "tiff_deflate"):
        Image.fromarray(labels).save(tmp_path / "mask.tif", compression=compression)
        assert np.array_equal(read_labels(tmp_path / "mask.tif"), labels)


def test_the_end_of_memory_is_told(tmp_path, monkeypatch):
    Image.fromarray(PICTURE).save(tmp_path / "a.png")

    def convert(*_):
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ImageError, match=r"a\.png: there is not enough memory"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_masks_of_few_bits_have_the_labels_that_are_stored(tmp_path, bits):
    """PIL stretches greys of 2 and 4 bits to 8."""
    labels = np.arange(64).reshape(4, 16) % min(2**bits, 16)
    packed = np.packbits(np.unpackbits(labels.astype(np.uint8)[..., None], axis=2)[..., -bits:].reshape(4, -1), axis=1)
    header = b"IHDR" + struct.pack(">IIBBBBB", 16, 4, bits, 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    chunks = (header, b"IDAT" + zlib.compress(rows), b"IEND")
    parts = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in chunks)
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    for read in (read_labels, read_mask):
        np.testing.assert_array_equal(read(tmp_path / "mask.png").numpy(), labels)


@pytest.mark.parametrize("format, most", [("P5", 1), ("P5", 3), ("P2", 3), ("P5", 300)])
def test_grey_values_that_are_stretched_are_refused(tmp_path, format, most):
    values = b"0 1\n" if format == "P2" else b"\0\1" if most < 256 else b"\0\0\0\1"
    (tmp_path / "mask.pgm").write_bytes(f"{format}\n2 1\n{most}\n".encode() + values)
    with pytest.raises(ImageError, match=f"a mask in PGM of values up to {most} is read as one up to 255"):
        read_labels(tmp_path / "mask.pgm")
    (tmp_path / "mask.pgm").write_bytes(b"P5\n2 1\n255\n\0\1")
    assert read_labels(tmp_path / "mask.pgm").tolist() == [[0, 1]]


@pytest.mark.parametrize("ending", ["tif", "png"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_images_and_masks_are_turned_alike(tmp_path, orientation, ending):
    values, exif = np.arange(24, dtype=np.uint8).reshape(4, 6), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(values).save(tmp_path / f"a.{ending}", exif=exif)
    turned = np.rot90(values, {3: 2, 6: -1, 8: 1}[orientation])
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{ending}")[0].numpy(), turned)
    np.testing.assert_array_equal(read_labels(tmp_path / f"a.{ending}").numpy(), turned)
    assert stored_image(tmp_path / f"a.{ending}").size == turned.shape[::-1]


def test_masks_of_fractions_are_refused(tmp_path):
    Image.fromarray(np.full((4, 5), 0.5, np.float32)).save(tmp_path / "mask.tiff")
    with pytest.raises(ImageError, match=r"mask\.tiff: a mask must have whole numbers"):
        read_labels(tmp_path / "mask.tiff")
