"""Where the photographs of a folder lie, which of them are for training, and how many: by their names alone.

Imports no torch, as config.py: the recipe depends on the count.
"""
import functools
import hashlib
import os
from pathlib import Path

from PIL import Image

TRAINING, VALIDATION = ("train", "training"), ("val", "validation", "test")
HELD_OUT = 1 / 5  # of a folder that is not split, the share for validation
FEW = 5  # photographs of a class, of fewer of which a line tells
NAMED = 20  # such classes that are named
NO_PIXELS = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5")  # what Pillow knows, but leaves to other programs


@functools.cache
def suffixes():
    """Endings of the files that Pillow decodes, in small letters: frozenset of ".jpg", ..."""
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items()
                     if kind in Image.OPEN and kind not in NO_PIXELS)


def photographs_of(data, task, training):
    """(folder, as text, below which the photographs of a split lie; whether it holds those of both splits).

    data: --data. It is not looked whether the folder is there, except for classification, where it says what the
    layout is: DIR/train or training, and DIR/val, validation or test, each with a folder per class; or a folder per
    class in DIR itself, of whose photographs validation_part() chooses some. Raises FileNotFoundError for another one.
    """
    root = Path(data)
    if task == "segmentation":
        return str(root / "images" / ("training" if training else "validation")), False
    if task == "detection":
        files = sorted((root / "annotations").glob(f"instances_{'train' if training else 'val'}*.json"))
        return str(root / (files[0].stem.removeprefix("instances_") if files else "absent")), False
    if not root.is_dir():
        raise FileNotFoundError(f"--data {data}: no such folder; expected one with train/ and val/ or test/, or with a "
                                "folder per class")
    inside = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and entry.name[0] != ".")
    wanted = TRAINING if training else VALIDATION
    for name in wanted:
        if name in inside:
            return str(root / name), False
    if len(inside) > 1 and not {*TRAINING, *VALIDATION, "annotations"} & {*inside}:
        return str(root), True
    raise FileNotFoundError(f"--data {data} has no {'/ or '.join(wanted)}/, and is no folder with a folder "
                            f"per class, two or more; it holds {sorted(os.listdir(root))[:8]}")


def validation_part(paths):
    """Which photographs of one class are for validation: a set of some of `paths`, as texts below the folder of the
    data.

    A photograph is, if the hash of its path is in the lowest fifth of all hashes: so one that is added, renamed or
    removed changes the part of no other. Except that a class with two or more has at least one in each part.
    """
    def place(path):  # 0 to 1
        return int.from_bytes(hashlib.sha256(os.fsencode(path.replace(os.sep, "/"))).digest()[:8]) / 2 ** 64

    order = sorted(paths, key=place)
    count = sum(place(path) < HELD_OUT for path in order)
    return {*order[:min(max(count, 1), len(order) - 1)]}


def count_training(data, task, enough):
    """How many photographs of a folder are for training, at most `enough`; 0 where there are none, or no such folder.

    Raises FileNotFoundError as photographs_of does.
    """
    root, both = photographs_of(data, task, training=True)
    count, classes = 0, {}
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found = [name for name in names if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes()]
        below = os.path.relpath(folder, root)
        if both and below != ".":
            classes.setdefault(below.split(os.sep)[0], []).extend(os.path.join(below, name) for name in found)
        count += len(found)
        if count >= enough / (1 - HELD_OUT if both else 1):
            return enough
    return sum(len(paths) - len(validation_part(paths)) for paths in classes.values()) if both else count


def scarce(counts):
    """A line for each class with fewer than FEW training photographs, the first NAMED of them. counts: {name: how
    many}."""
    lines = [f"class {name} has {count} photograph{'s' * (count != 1)}, too few to learn it well; expected {FEW} or "
             "more" for name, count in counts.items() if count < FEW]
    more = len(lines) - NAMED
    return lines[:NAMED] + ([f"and {more} more classes have fewer than {FEW} photographs"] if more > 0 else [])
