"""COCO's JSON: its three lists read entry by entry, each field checked, annotations kept in columns of numbers."""
import json
import math
import re
from array import array

import numpy as np
from faster_coco_eval import mask as rle

LISTS = ("images", "annotations", "categories")
READ_AT_ONCE = 1 << 22  # characters of a file
MAX_SIDE = 65535  # of an image, in pixels: the run-length library counts them in 32 bits
SPACE = re.compile(r"[ \t\n\r]*")
EXPECTED = {
    "id": "a text or a number", "image_id": "the id of an image", "category_id": "the id of a category",
    "height": f"a whole number of pixels, 1 to {MAX_SIDE}", "width": f"a whole number of pixels, 1 to {MAX_SIDE}",
    "file_name": "the name of a file", "name": "a text", "bbox": "four numbers: x, y, width, height",
    "area": "a number", "iscrowd": "0 or 1", "ignore": "0 or 1",
    "segmentation": "polygons [[x, y, x, y, x, y, ...], ...], or a run-length code whose counts fill its size"}


def read(path):
    """(images [(id, file name, height, width), ...], Annotations, categories [(id, name), ...], whether there is a list
    of annotations), each in the order of the file.

    Raises ValueError, naming the file, the entry and the field, for what is not COCO's.
    """
    images, annotations, categories = [], Annotations(), []
    add = {"images": lambda entry: images.append(_fields(entry, IMAGE)), "annotations": annotations.add,
           "categories": lambda entry: categories.append(_fields(entry, CATEGORY))}
    annotated = False
    try:
        for name, number, entry in entries(path):
            annotated |= name == "annotations"
            if number:
                add[name](entry)
    except WrongField as error:
        raise ValueError(f"{path}: {name}, {called(entry, number)}: {error}") from error.__cause__
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON in UTF-8 ({error}); expected COCO's instance annotations: images, "
                         "annotations and categories") from error
    if not images or not categories:
        empty = [name for name, found in (("images", images), ("categories", categories)) if not found]
        raise ValueError(f"{path} has no {' and no '.join(empty)}; expected COCO's instance annotations: images, "
                         "annotations and categories, each a list")
    return images, annotations, categories, annotated


def refuse(path, wrong, field, expected=None):
    """Raises ValueError for the first of the annotations that are `wrong`, (m,) bool, in this field."""
    if wrong.any():
        first = int(wrong.argmax()) + 1
        entry = next(entry for name, number, entry in entries(path) if (name, number) == ("annotations", first))
        raise ValueError(f"{path}: annotations, {called(entry, first)}: {WrongField(entry, field, expected)} (the "
                         f"first of {wrong.sum()})")


def called(entry, number):
    """What to call an entry, the number-th of its list."""
    return f"id {entry['id']!r:.60}" if isinstance(entry, dict) and "id" in entry else f"number {number}"


def entries(path):
    """Yields (name, number from 1, entry) of LISTS at the top of a JSON file, in its order, and (name, 0, None) at the
    start of each. Holds a few megabytes of it at a time.

    Raises json.JSONDecodeError or UnicodeDecodeError, and ValueError for a list that is none or there twice.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        text, seen = _Text(file), set()
        more = text.take("{") and not text.take("}")
        while more:
            name = text.value()
            if not isinstance(name, str):
                text.fail("Expecting a name")
            text.take(":") or text.fail("Expecting ':'")
            if name not in LISTS:
                text.value()
            elif name in seen:
                raise ValueError(f"{path}: {name} is there twice; expected one list of them")
            elif not text.take("["):
                raise ValueError(f"{path}: {name} is {text.value()!r:.60}; expected a list")
            else:
                seen.add(name)
                yield name, 0, None
                number, inside = 0, not text.take("]")
                while inside:
                    number += 1
                    yield name, number, text.value()
                    inside = text.take(",")
                    inside or text.take("]") or text.fail("Expecting ',' or ']'")
            more = text.take(",")
            more or text.take("}") or text.fail("Expecting ',' or '}'")
        if text.peek():
            text.fail("Extra data")


class _Text:
    """The part of a JSON file that is read next."""
    decode = json.JSONDecoder().raw_decode

    def __init__(self, file):
        self.file, self.text, self.at, self.dropped = file, "", 0, 0

    def read(self, size):
        """False at the end of the file."""
        new = self.file.read(size)
        self.dropped += self.at
        self.text, self.at = self.text[self.at:] + new, 0
        return bool(new)

    def peek(self):
        """The next character that is no space; "" at the end."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.read(READ_AT_ONCE):
                return ""

    def take(self, character):
        """Whether the next character is this, which is then behind us."""
        found = self.peek() == character
        self.at += found
        return found

    def value(self):
        self.peek()
        size = READ_AT_ONCE
        while True:
            try:
                value, end = self.decode(self.text, self.at)
            except ValueError as error:  # JSONDecodeError, or an integer of thousands of digits
                message, ahead = getattr(error, "msg", str(error)), getattr(error, "pos", self.at) - self.at
                if not self.read(size):
                    self.fail(message, ahead)
                size *= 2  # what is damaged is read to the end of the file, and not by a little each time
                continue
            length = end - self.at
            # A number may go on: 1 with 2, or with .5, or with e-3.
            if end + 2 >= len(self.text) and self.read(READ_AT_ONCE):
                continue
            self.at += length
            return value

    def fail(self, message, ahead=0):
        raise json.JSONDecodeError(f"{message}, character {self.dropped + self.at + ahead} of the file", "", 0)


class Annotations:
    """The annotations of a file, in columns.

    image_ids, category_ids: {id: number}; images, categories: of each annotation these numbers.
    polygons_of: of each the first and last + 1 of its polygons, which end in `coordinates` at polygon_ends[1:].
    code_of: of each the number of its run-length code in `codes`, of the (height, width) in `sizes`; 0: none.
    """

    def __init__(self):
        self.image_ids, self.category_ids, self.crowd, self.ignore = {}, {}, array("b"), array("b")
        self.images, self.categories = array("q"), array("q")
        self.boxes, self.areas, self.coordinates = array("d"), array("d"), array("d")
        self.polygon_ends, self.polygons_of = array("q", [0]), array("q")
        self.codes, self.code_of, self.sizes = [b""], array("q"), array("q", [0, 0])

    def add(self, entry):
        """Raises WrongField."""
        field = "image_id"
        try:
            self.images.append(self.image_ids.setdefault(entry[field], len(self.image_ids)))
            field = "category_id"
            self.categories.append(self.category_ids.setdefault(entry[field], len(self.category_ids)))
            field = "bbox"
            x, y, w, h = entry[field]
            self.boxes.extend((x, y, w, h))
            field = "area"
            area = entry.get(field)
            self.areas.append(0.0 if area is None else area)
            field = "iscrowd"
            self.crowd.append(bool(int(entry.get(field, 0))))
            field = "ignore"
            self.ignore.append(bool(int(entry.get(field, 0))))
            field = "segmentation"
            first = len(self.polygon_ends) - 1
            self.code_of.append(self._add_mask(entry.get(field)))
            self.polygons_of.extend((first, len(self.polygon_ends) - 1))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise WrongField(entry, field) from error

    def _add_mask(self, segmentation):
        """Number of its run-length code; 0: polygons, or no mask."""
        if segmentation is None:
            return 0
        if isinstance(segmentation, list):
            for polygon in segmentation:
                whole = len(polygon) >= 6 and len(polygon) % 2 == 0
                if whole and not isinstance(polygon[0], list):  # pairs in pairs are no polygon of COCO's
                    self.coordinates.extend(polygon)
                    self.polygon_ends.append(len(self.coordinates))
            return 0
        (height, width), counts = segmentation["size"], segmentation["counts"]
        if not isinstance(counts, list):
            runs = runs_of(counts.encode())
        elif {*map(type, counts)} == {int}:
            runs = np.array(counts)
        else:
            raise ValueError
        fits = 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE and sum(runs.tolist()) == height * width
        if not fits or runs.min() < 0:
            raise ValueError
        self.sizes.extend((height, width))
        self.codes.append(rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
                          if isinstance(counts, list) else counts.encode())
        return len(self.codes) - 1


def runs_of(code):
    """Lengths of the runs of a compressed run-length code, bytes: (n,) int64. Raises ValueError.

    Each number is in digits of five bits, the lowest first, with a sign, and from the fourth on a difference to the one
    before the last.
    """
    digits = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(~digits & 32)
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or len(ends) == 0 or ends[-1] != len(digits) - 1:
        raise ValueError("no run-length code")
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends + 1 - starts
    if lengths.max() > 7:
        raise ValueError("a run beyond all images")
    places = 5 * (np.arange(len(digits)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((digits & 31) << places, starts) - np.where(digits[ends] & 16, 1 << 5 * lengths, 0)
    runs[1::2], runs[2::2] = np.cumsum(runs[1::2]), np.cumsum(runs[2::2])
    return runs


class WrongField(Exception):
    """What is wrong with a field of an entry."""

    def __init__(self, entry, field, expected=None):
        if not isinstance(entry, dict):
            text = f"it is {entry!r:.60}; expected a mapping"
        else:
            found = f"{entry[field]!r:.80}" if field in entry else "missing"
            text = f"{field} is {found}; expected {expected or EXPECTED[field]}"
        super().__init__(text)


def _is_id(value):
    return isinstance(value, str) or type(value) is int or type(value) is float and math.isfinite(value)


def _is_length(value):
    return type(value) in (int, float) and value == int(value) and 1 <= value <= MAX_SIDE


def _is_text(value):
    return isinstance(value, str) and value.encode() and "\0" not in value  # lone surrogates cannot be encoded


IMAGE = {"id": _is_id, "file_name": _is_text, "height": _is_length, "width": _is_length}
CATEGORY = {"id": _is_id, "name": _is_text}


def _fields(entry, checks):
    """Those of an entry that `checks` names, each checked. Raises WrongField."""
    for field, fits in checks.items():
        try:
            if fits(entry[field]):
                continue
        except (KeyError, TypeError, ValueError, OverflowError):
            pass
        raise WrongField(entry, field)
    return tuple(entry[field] for field in checks)


