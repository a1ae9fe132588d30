"""Photographs and their pixels: reading, turning, resizing, normalising. What all tasks share."""
import contextlib
import functools
import io
import math
import os
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch.nn.functional import interpolate

from models import MEAN, STD

MAX_PIXELS = 178_956_970  # 512 MiB of RGB; Pillow's own limit
TOO_LARGE = f"{{}} has more than {MAX_PIXELS / 1e6:.0f} megapixels and is not decoded; make it smaller"
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")  # Pillow's, converted
NO_PIXELS = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5")  # what Pillow knows, but leaves to other programs
PAUSES = (0.1, 1.0)  # seconds between the tries of a read
ANSWERS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)  # of a disk that works
LOOKED_AT = 2000  # photographs whose EXIF data is read before training

# How a viewer turns what is stored, by EXIF orientation, and how that is undone.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}
UNDONE = {**TURNS, 6: TURNS[8], 8: TURNS[6]}

_dark = []  # the first photograph with 12 bits in 16 that this process met


def load_image(path):
    """A photograph as an RGB PIL image, as a viewer shows it: turned by its EXIF orientation, 16 bits scaled to 8, the
    first frame of an animation; transparency is dropped.

    A read that fails, as on a network disk, is tried three times. Raises FileNotFoundError, IsADirectoryError or
    another OSError, or ValueError: each names the file.
    """
    return _shown(path)[0]


def decode_image(content, name):
    """As load_image, of the bytes of a file. name: for errors."""
    with _named(name):
        image, orientation = _decode_file(io.BytesIO(content), name)
    return _upright(image, orientation, name)


def load_matching(path, height, width, exif, source):
    """A photograph as (height, width, 3) uint8, the size of its annotations, which `source` holds.

    If only what is stored, or only what a viewer shows of it, is of that size, it is taken. If both are (orientation 2
    to 4, or a square) the annotations may be drawn on either: exif, "apply" or "ignore", says on which. Raises as
    load_image does, and ValueError when no size fits.
    """
    shown, orientation = _shown(path)
    if orientation == 1:
        candidates = [shown]
    else:
        candidates = [shown, shown.transpose(UNDONE[orientation])]
        if exif == "ignore":
            candidates.reverse()
    for image in candidates:
        if image.size == (width, height):
            return np.asarray(image)
    sizes = " or ".join(f"{H} x {W}" for H, W in sorted({(image.height, image.width) for image in candidates}))
    turned = f" (its EXIF orientation is {orientation})" if orientation != 1 else ""
    raise ValueError(f"{path} is {sizes} pixels high and wide{turned}; {source} says {height} x {width}")


@functools.cache
def suffixes():
    """Endings of the files that Pillow decodes, in small letters: frozenset of ".jpg", ..."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items()
                     if kind in Image.OPEN and kind not in NO_PIXELS)


def visible_files(root):
    """Paths of the files below `root`, at any depth, in the order of their names; a name that begins with a dot is
    none, nor is what such a folder holds."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found, key=lambda path: path.parts)


def left_out(files):
    """A note on files among photographs that are none, or none at all: a list."""
    kinds = ", ".join(sorted({Path(file).suffix or Path(file).name for file in files})[:5])
    return [f"left out: {len(files)} files that Pillow does not read ({kinds})"] if files else []


def shown(image, name="the image"):
    """An opened PIL image as load_image gives a file; name: what to call it in errors."""
    orientation = 1 if image.format == "TIFF" else _orientation(image)  # Pillow turns a TIFF itself
    image = _rgb(image, name)
    return image if orientation == 1 else image.transpose(TURNS[orientation])


def exif_notes(paths, exif):
    """Lines for a data set's notes on photographs whose EXIF orientation matters to annotations.

    Of more than LOOKED_AT paths so many are looked at, evenly spread.
    """
    looked = paths[::-(-len(paths) // LOOKED_AT)] if paths else []
    turned = [(path, size) for path in looked for orientation, size in [_orientation_of(path)] if orientation != 1
              and (orientation < 5 or size[0] == size[1])]
    if not turned:
        return []
    other = "ignore" if exif == "apply" else "apply"
    of = f"{len(turned)} of the {len(looked)} photographs" + (" looked at" if len(looked) < len(paths) else "")
    how = "taken as a viewer shows them" if exif == "apply" else "taken as they are stored"
    return [f"EXIF: {of} are to be turned or mirrored, as {turned[0][0]}, and their size does not say whether their "
            f"annotations are, too: {how}; --exif {other} does otherwise"]


def _orientation_of(path):
    """(EXIF orientation, (width, height)) without decoding; (1, None) for what cannot be read: that is said later."""
    try:
        with warnings.catch_warnings(action="ignore"), open(path, "rb") as file:
            image = Image.open(file)
            return _orientation(image), image.size
    except Exception:
        return 1, None


def _orientation(image):
    try:
        # Pillow turns a TIFF itself, and forgets how when it decodes.
        found = getattr(image, "tag_v2", None) or image.getexif()
        return found.get(ExifTags.Base.Orientation) if found.get(ExifTags.Base.Orientation) in TURNS else 1
    except Exception:  # damaged EXIF data are no reason to refuse the pixels
        return 1


def _shown(path):
    """(photograph as RGB PIL image, as a viewer shows it; its EXIF orientation, 1 to 8)."""
    image, orientation = read(path)
    return _upright(image, orientation, path), orientation


def _upright(image, orientation, name):
    """What a viewer shows of a PIL image, RGB."""
    is_tiff = image.format == "TIFF"  # Pillow has turned it
    image = _rgb(image, name)
    return image if is_tiff or orientation == 1 else image.transpose(TURNS[orientation])


def read(path):
    """(PIL image as it is stored, its EXIF orientation, 1 to 8). Tries and raises as load_image says."""
    with _named(path):
        return trying(lambda: _decode(path))


@contextlib.contextmanager
def _named(path):
    """What goes wrong in this block names the file, see load_image."""
    try:
        yield
    except _Refused:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a directory; expected a photograph") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(TOO_LARGE.format(path)) from None
    except MemoryError:
        raise ValueError(f"{path} does not fit into the memory that is left; make it smaller") from None
    except UnidentifiedImageError as error:
        raise ValueError(f"{path} cannot be read as an image: it is damaged, or of a kind that Pillow does not know"
                         ) from error
    except Exception as error:  # Pillow raises whatever its decoders do
        if _is_of_the_disk(error):
            raise OSError(f"{path} could not be read: {error.strerror}") from error
        raise ValueError(f"{path} cannot be read as an image: the file is damaged ({error}); replace or delete it"
                         ) from error


def trying(read):
    """read(), again after a tenth of a second and after a second where a disk fails, as network disks do."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if not _is_of_the_disk(error) or isinstance(error, ANSWERS):
                raise
        time.sleep(pause)
    return read()


def _is_of_the_disk(error):
    return isinstance(error, OSError) and error.errno is not None  # what Pillow raises for damage has none


class _Refused(ValueError):
    """Of a file that is not damaged."""


def _decode(path):
    with open(path, "rb") as file:
        return _decode_file(file, path)


def _decode_file(file, name):
    """(PIL image as it is stored, its EXIF orientation) of an open file."""
    image = Image.open(file)
    if image.width * image.height > MAX_PIXELS:
        raise _Refused(TOO_LARGE.format(name))
    if image.format in NO_PIXELS:
        raise _Refused(f"{name} is of the kind {image.format}, which Pillow alone does not decode; expected pixels")
    orientation = _orientation(image) if image.format == "TIFF" else None  # decoding forgets it
    image.load()
    return image, orientation or _orientation(image)


def _rgb(image, path):
    """8 bits a channel, red, green and blue, of whatever Pillow decodes."""
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits at most
        pixels = np.asarray(image)
        if 0 < pixels.max() < 4096 and not _dark:
            _dark.append(path)
            warnings.warn(f"{path} has 16 bits a pixel, but no value above {pixels.max()}: scaled as all 16-bit "
                          "photographs are, it is nearly black. Further ones are not named", stacklevel=2)
        return Image.fromarray((pixels // 257).astype(np.uint8)).convert("RGB")
    if image.mode not in MODES:
        raise ValueError(f"{path} has pixels of Pillow's mode {image.mode}, whose black and white nobody knows; save "
                         "it as RGB or greyscale with 8 or 16 bits a channel")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # of the straight way Pillow warns
    return image if image.mode == "RGB" else image.convert("RGB")


def fit_size(H, W, short, long):
    """(h, w), of the same shape as (H, W), as large as a short side of `short` and a long side of `long` allow."""
    factor = min(int(long) / max(H, W), int(short) / min(H, W))
    return max(1, math.floor(H * factor + 0.5)), max(1, math.floor(W * factor + 0.5))


def resize(pixels, size):
    """(H, W, 3) uint8 -> (h, w, 3) uint8.

    Bilinear, without low-pass filter and rounded, as OpenCV has it, which published dense models saw.
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float()
    return interpolate(image, tuple(size), mode="bilinear")[0].round().permute(1, 2, 0).byte().numpy()


def to_tensor(pixels):
    """(H, W, 3), 0 to 255 -> (3, H, W) float32, normalised."""
    normalised = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(normalised.transpose(2, 0, 1).astype(np.float32)).contiguous()
