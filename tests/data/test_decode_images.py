"""Images of every kind: modes, rotation, 16 bits, damage, bombs."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from small_sets import encode, picture

from speedk.data import decode as module
from speedk.data.decode import Unreadable, decode, open_image, to_array
from speedk.data.part import Part
from speedk.errors import DataError


class Listed(Part):
    """A part from a list of bytes."""

    def __init__(self, images):
        self.title, self.names, self.images = "training", ("a", "b"), images
        self.labels = np.arange(len(images)) % 2

    def blocks(self):
        for start in range(0, len(self.images), 50):
            yield [(f"image {i}", self.images[i]) for i in range(start, min(start + 50, len(self.images)))]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(open_image(data)[0])


def test_rgb_and_grey_are_as_stored():
    rgb, kind, grey = open_image(encode(picture(1, (5, 7))))
    assert rgb.mode == "RGB" and kind == "PNG" and not grey and np.array_equal(rgb, picture(1, (5, 7)))
    mono, kind, grey = open_image(encode(picture(1, mode="L"), "BMP"))
    assert mono.mode == "L" and kind == "BMP" and grey and np.array_equal(mono, picture(1, mode="L"))
    bits = Image.fromarray(np.eye(8, dtype=bool))
    assert bits.mode == "1" and np.array_equal(pixels(encode(bits)), 255 * np.eye(8, dtype=np.uint8))


def test_palette_and_its_transparency():
    coloured = picture(2).quantize(16)
    assert coloured.mode == "P"
    assert np.array_equal(pixels(encode(coloured)), np.asarray(coloured.convert("RGB")))
    index = int(np.asarray(coloured)[0, 0])
    found = pixels(encode(coloured, transparency=index))
    inside = np.asarray(coloured) == index
    assert (found[inside] == 255).all() and inside.any()
    assert np.array_equal(found[~inside], np.asarray(coloured.convert("RGB"))[~inside])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_images_lie_on_white(mode):
    image = picture(3, mode=mode)
    values = np.asarray(image).astype(float)
    alpha = values[..., -1:] / 255
    expected = np.broadcast_to(alpha * values[..., :-1] + (1 - alpha) * 255, (8, 8, 3))
    found, _, grey = open_image(encode(image))
    assert found.mode == "RGB" and grey == (mode == "LA")
    assert np.abs(np.asarray(found) - expected).max() <= 1


def test_cmyk_jpeg_is_converted():
    ink = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    found, kind, grey = open_image(encode(ink, "JPEG", quality=95))
    assert found.mode == "RGB" and kind == "JPEG" and not grey
    assert np.abs(np.asarray(found).astype(int) - (0, 255, 255)).max() <= 12


def test_sixteen_bits_are_scaled_to_eight():
    values = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    for kind in ("PNG", "TIFF"):
        image, _, grey = open_image(encode(Image.fromarray(values), kind))
        assert image.mode == "L" and grey and np.array_equal(np.asarray(image), np.rint(values / 257.0))
    wide = Image.fromarray(np.full((4, 4), 70_000, np.int32))
    with pytest.raises(Unreadable, match="outside 16 bits"):
        open_image(encode(wide, "TIFF"))
    with pytest.raises(Unreadable, match="floating-point"):
        open_image(encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("orientation, upright", [
    (1, lambda a: a), (2, lambda a: a[:, ::-1]), (3, lambda a: a[::-1, ::-1]), (4, lambda a: a[::-1]),
    (5, lambda a: a.transpose(1, 0, 2)), (6, lambda a: np.rot90(a, -1)),
    (7, lambda a: a[::-1, ::-1].transpose(1, 0, 2)), (8, lambda a: np.rot90(a)),
])
def test_rotation_in_exif_is_undone(orientation, upright):
    image, exif = picture(4, (6, 4)), Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encode(image, exif=exif)), upright(np.asarray(image)))


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == (255, 0, 0)).all()


def test_stretching_is_antialiased():
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (16, 8)))
    small = to_array(stripes, 4)
    assert small.shape == (1, 4, 4) and np.abs(small[:, :, 1:-1].astype(int) - 127).max() <= 16
    assert to_array(picture(5, (10, 3)), 4).shape == (3, 4, 4)


def png_of_size(width: int, height: int) -> bytes:
    """A few hundred bytes that announce width x height pixels."""
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99))
            + chunk(b"IEND", b""))


@pytest.mark.parametrize("width, height", [(9000, 8000), (40_000, 40_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)])
def test_bombs_are_refused_before_decoding(width, height):
    with pytest.raises(Unreadable):
        open_image(png_of_size(width, height))


def test_bombs_are_unreadable_files_without_warnings(recwarn):
    images = [encode(picture(i)) for i in range(200)]
    images[20] = png_of_size(10_000, 10_000)
    found = decode(Listed(images), 8, progress=False)
    assert len(found.images) == 199 and found.unreadable[0].startswith("image 20 (10000x10000 pixels, more than")
    assert not recwarn.list


def test_formats_that_start_other_programs_are_not_opened():
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with Image.open(io.BytesIO(postscript)) as image:
        assert image.format == "EPS"
    with pytest.raises(Unreadable, match="cannot identify"):
        open_image(postscript)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind, mode", [("PNG", "RGBA"), ("JPEG", "RGB"), ("GIF", "L"), ("TIFF", "RGB"), ("BMP", "RGB"),
                                        ("WEBP", "RGB"), ("PPM", "RGB"), ("TGA", "RGB")])
def test_damaged_images_are_read_or_refused(kind, mode):
    """Cut short, bits flipped, bytes overwritten: an image or Unreadable, never another exception."""
    whole = encode(picture(6, (16, 12), mode), kind)
    generator = np.random.default_rng(7)
    for trial in range(120):
        damaged = bytearray(whole[:generator.integers(len(whole))] if trial % 3 == 0 else whole)
        for place in generator.integers(0, max(len(damaged), 1), 4 if damaged else 0):
            damaged[place] = generator.integers(256)
        try:
            image = open_image(bytes(damaged))[0]
        except Unreadable as error:
            assert str(error) and "\n" not in str(error)
        else:
            assert image.mode in ("L", "RGB")


def test_many_images_keep_their_places():
    images = [encode(picture(i, 3 + i % 5)) for i in range(333)]
    found = decode(Listed(images), 6, progress=False)
    assert found.images.shape == (333, 3, 6, 6) and found.images.dtype == np.uint8 and found.smallest == 3
    for i in (0, 31, 32, 50, 199, 332):
        assert np.array_equal(found.images[i], to_array(picture(i, 3 + i % 5), 6))
    assert found.labels.tolist() == [i % 2 for i in range(333)] and found.formats == {"PNG"} and not found.grey


def test_one_per_cent_may_be_unreadable_and_no_more():
    images = [encode(picture(i)) for i in range(300)]
    for i in (3, 150, 299):
        images[i] = b"x"
    found = decode(Listed(images), 8, progress=False)
    assert [text.split(" (")[0] for text in found.unreadable] == ["image 3", "image 150", "image 299"]
    assert found.labels.tolist() == [i % 2 for i in range(300) if i not in (3, 150, 299)]
    images[4] = None
    with pytest.raises(DataError, match=r"more than 1% of the 300 training images cannot be read: image 3 \(.*\); "):
        decode(Listed(images), 8, progress=False)


def test_progress_shows_counts_and_time_left(capsys, monkeypatch):
    options = {}
    real = module.tqdm
    monkeypatch.setattr(module, "tqdm", lambda **given: options.update(given) or real(**{**given, "delay": 0}))
    decode(Listed([encode(picture(0))] * 100), 8)
    assert options["delay"] == 2 and "reading training images" in capsys.readouterr().err
    decode(Listed([encode(picture(0))] * 100), 8, progress=False)
    assert capsys.readouterr().err == ""
