"""train/photographs.py: what is read and refused, sizes, resizing as OpenCV has it, normalised pixels."""
import errno
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from photographs import mutated
from train import photographs
from train.photographs import exif_notes, fit_size, load_image, load_matching, resize, to_tensor


@settings(deadline=None, max_examples=100)
@given(H=st.integers(1, 2000), W=st.integers(1, 2000), short=st.integers(1, 800), ratio=st.floats(1, 5))
def test_fitted_sizes_touch_one_limit_and_keep_the_shape(H, W, short, ratio):
    long = int(short * ratio)
    h, w = fit_size(H, W, short, long)
    assert min(h, w) <= max(1, short) and max(h, w) <= max(1, long)
    assert min(h, w) == short or max(h, w) == long
    assert abs(h * W - w * H) <= 0.5 * (H + W) or 1 in (h, w)  # each side is rounded by half a pixel at most
    assert fit_size(W, H, short, long) == (w, h)


@pytest.mark.parametrize("size", [(7, 9), (20, 30), (3, 5), (33, 10)])
def test_resized_pixels_are_rounded_mixtures_of_the_four_nearest(size):
    """OpenCV's INTER_LINEAR, which has no low-pass filter."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)

    def neighbours(old, new):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, old - 1), (at - low)
    (top, bottom, v), (left, right, u) = neighbours(13, size[0]), neighbours(17, size[1])
    values, v, u = pixels.astype(float), v[:, None, None], u[:, None]
    upper = values[top][:, left] * (1 - u) + values[top][:, right] * u
    lower = values[bottom][:, left] * (1 - u) + values[bottom][:, right] * u
    expected = upper * (1 - v) + lower * v
    ours = resize(pixels, size)
    assert ours.dtype == np.uint8 and ours.shape == (*size, 3)
    assert np.abs(ours - expected).max() <= 0.5 + 1e-3


def test_pixels_are_normalised_by_channel():
    image = to_tensor(np.uint8([[[0, 128, 255], [255, 0, 0]]]))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red first
    expected = [[(value / 255 - mean[c]) / std[c] for value in values]
                for c, values in enumerate([(0, 255), (128, 0), (255, 0)])]
    assert image.shape == (3, 1, 2) and image.dtype == torch.float32
    assert image[:, 0].tolist() == [pytest.approx(row, rel=1e-5) for row in expected]


# Reading

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
AS_SHOWN = {1: lambda x: x, 2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
            5: lambda x: x.transpose(1, 0, 2), 6: lambda x: np.rot90(x, -1),
            7: lambda x: x[::-1, ::-1].transpose(1, 0, 2), 8: lambda x: np.rot90(x)}


def saved(path, pixels=PIXELS, orientation=None, **options):
    if orientation:
        options["exif"] = Image.Exif()
        options["exif"][274] = orientation
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("name, options", [("a.png", {}), ("a.tiff", {}), ("a.webp", {"lossless": True})])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_turned_as_viewers_do_and_fit_their_annotations(tmp_path, name, options, orientation):
    path, shown = saved(tmp_path / name, orientation=orientation, **options), AS_SHOWN[orientation](PIXELS)
    assert np.array_equal(load_image(path), shown)
    matching = {exif: load_matching(path, 4, 6, exif, "labels.png") for exif in ("apply", "ignore")}
    assert np.array_equal(matching["ignore"], PIXELS)
    assert np.array_equal(matching["apply"], shown if orientation < 5 else PIXELS)  # what is stored fits
    if orientation > 4:
        assert np.array_equal(load_matching(path, 6, 4, "ignore", "labels.png"), shown)
    with pytest.raises(ValueError, match=f"{name} is 4 x 6.*labels.png says 6 x 5") as error:
        load_matching(path, 6, 5, "apply", "labels.png")
    assert ("EXIF" in str(error.value)) == (orientation > 1)


def test_squares_of_every_orientation_follow_the_option(tmp_path):
    path = saved(tmp_path / "a.png", PIXELS[:, :4], orientation=6)
    assert np.array_equal(load_matching(path, 4, 4, "apply", ""), np.rot90(PIXELS[:, :4], -1))
    assert np.array_equal(load_matching(path, 4, 4, "ignore", ""), PIXELS[:, :4])


def test_photographs_of_unclear_orientation_are_counted(tmp_path, monkeypatch):
    paths = [saved(tmp_path / f"{i}.png", PIXELS[:, :4 + 2 * (i != 8)], orientation=i) for i in range(1, 9)]
    (tmp_path / "damaged.png").write_bytes(b"junk")
    note, = exif_notes([*paths, tmp_path / "damaged.png"], "apply")
    assert "4 of the 9 photographs are" in note and "2.png" in note and "--exif ignore" in note  # 2, 3, 4, the square
    assert "--exif apply" in exif_notes(paths, "ignore")[0] and not exif_notes(paths[4:7], "apply")
    monkeypatch.setattr(photographs, "LOOKED_AT", 4)
    assert "of the 4 photographs looked at" in exif_notes(paths, "apply")[0]


RAMP = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(2, 0)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "a.jp2"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    pixels = np.asarray(load_image(saved(tmp_path / name, RAMP)))
    assert pixels.shape == (2, 64, 3) and pixels[0, ::16].tolist() == [[v] * 3 for v in (0, 64, 129, 194)]
    assert pixels[0, 63].tolist() == [255] * 3


def test_twelve_bits_in_sixteen_are_scaled_alike_and_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "_dark", [])
    path = saved(tmp_path / "a.png", RAMP // 16)
    with pytest.warns(UserWarning, match="a.png has 16 bits a pixel, but no value above 4095"):
        assert np.asarray(load_image(path)).max() == 15
    with warnings.catch_warnings(action="error"):
        load_image(path)
        load_image(saved(tmp_path / "b.png", RAMP))


@pytest.mark.parametrize("name, pixels, words", [
    ("float.tif", RAMP / np.float32(65535), "mode F"), ("32.tif", RAMP.astype(np.int32), "mode I"),
    ("bomb.png", None, "megapixels"), ("folder.jpg", None, "is a directory"), ("x.eps", PIXELS, "kind EPS")])
def test_whole_files_are_refused_in_words_of_their_own(tmp_path, name, pixels, words):
    path = tmp_path / name
    if pixels is not None:
        saved(path, pixels)
    elif "bomb" in name:
        chunks = (b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(bytes(100)))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks))
    else:
        path.mkdir()
    with pytest.raises((ValueError, IsADirectoryError), match=words) as error:
        load_image(path)
    assert name in str(error.value) and "delete" not in str(error.value) and "damaged" not in str(error.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_colours_are_as_pillow_converts_them(tmp_path, mode):
    name = "a.png" if mode in ("1", "L", "LA", "P", "RGBA") else "a.tif"
    image = Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / name, **({"transparency": bytes(range(240))} if mode == "P" else {}))
    with warnings.catch_warnings(action="error"):
        ours = np.asarray(load_image(tmp_path / name))
    assert np.array_equal(ours, image.convert("RGB"))


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "lime")]
    lossless = {"lossless": True} if name.endswith("webp") else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **lossless)
    assert np.array_equal(load_image(tmp_path / name), np.full((4, 5, 3), (255, 0, 0)))


@pytest.mark.parametrize("size", [(1, 1), (20_000, 2), (1, 70_000)])
def test_odd_sizes_are_read(tmp_path, size):
    assert load_image(saved(tmp_path / "a.png", np.zeros((*size, 3), np.uint8))).size == size[::-1]


def test_a_failing_disk_is_asked_three_times(tmp_path, monkeypatch):
    monkeypatch.setattr(photographs, "PAUSES", (0, 0))
    path, decode, left = saved(tmp_path / "a.png"), photographs._decode, []

    def fail(path):
        if left:
            raise left.pop()
        return decode(path)

    monkeypatch.setattr(photographs, "_decode", fail)
    left[:] = [OSError(errno.EIO, "Input/output error")] * 2
    assert np.array_equal(load_image(path), PIXELS)
    left[:] = [OSError(errno.EIO, "Input/output error")] * 4
    with pytest.raises(OSError, match="a.png could not be read: Input/output error"):
        load_image(path)
    assert len(left) == 1
    left[:] = [PermissionError(errno.EACCES, "Permission denied")] * 2
    with pytest.raises(OSError, match="Permission denied"):
        load_image(path)
    assert len(left) == 1
    left[:] = [OSError("image file is truncated")] * 2
    with pytest.raises(ValueError, match="is damaged .image file is truncated.; replace or delete"):
        load_image(path)
    assert len(left) == 1


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_bytes_give_pixels_or_an_error_that_names_the_file(tmp_path, count):
    rng, files, results = np.random.default_rng(count), [], [0, 0]
    for name in ("a.jpg", "a.png", "a.gif", "a.webp", "a.tif", "a.bmp"):
        files.append(saved(tmp_path / name, rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), orientation=3))
    for i in range(count):
        file = files[i % len(files)]
        path = tmp_path / f"mutated{file.suffix}"
        path.write_bytes(mutated(file.read_bytes(), rng))
        with warnings.catch_warnings(action="ignore"):
            try:
                image = load_image(path)
                results[0] += image.mode == "RGB" and np.asarray(image).shape[2] == 3
            except (ValueError, OSError) as error:
                results[1] += str(path) in str(error)
    assert sum(results) == count and min(results) > count / 10
    assert {path.name for path in tmp_path.iterdir()} == {file.name for file in files} | {f"mutated{file.suffix}"
                                                                                         for file in files}
