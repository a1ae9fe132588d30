"""WebDataset shards, tar files of photographs and labels: `--data 'wds:/data/imagenet-train-{0000..1281}.tar'`.

The members are indexed once, from the headers, and read in any order then: the order of an epoch, its division among
ranks and its resumption are those of folders. The package webdataset is not needed.
"""
import glob
import itertools
import re
import tarfile
from pathlib import Path

import numpy as np

from train.photographs import suffixes, trying
from train.records import Records

VALIDATION = ("validation", "valid", "val", "test")  # what stands for "train" in the names of the other shards


class Shards(Records):
    """The photographs of tar files: members KEY.jpg, or another kind that Pillow reads, and KEY.cls, the class as a
    number in text; KEY ends at the first dot of a name, and other members are not looked at.

    pattern: TRAIN or TRAIN::VAL, each a path with {0000..1281}, {a,b} and * in it. Without VAL it is TRAIN with
    "validation", "valid", "val" or "test" for "train", and anything for what is in braces. classes.txt beside the
    training shards names the classes, one a line; without it they are called by their numbers, up to the largest label
    of both. Raises FileNotFoundError or ValueError.
    """

    def __init__(self, pattern, training, transform=None):
        of_both = paths_of(pattern)
        indices = [Index(paths) for paths in of_both]
        self.index = indices[0] if training else indices[1]
        file = of_both[0][0].with_name("classes.txt")
        if file.is_file():
            classes = file.read_text(encoding="utf-8-sig").splitlines()
            if len(set(classes)) < len(classes) or not all(classes):
                raise ValueError(f"{file}: expected the name of a class on every line, each once")
        else:
            classes = [str(number) for number in range(1 + max(max(index.labels, default=0) for index in indices))]
        paths = self.index.paths
        super().__init__(f"wds:{paths[0]}" + (f" to {paths[-1].name}" if len(paths) > 1 else ""), classes,
                         self.index.labels, transform, self.index.notes)

    def content(self, index):
        return self.index.read(index)

    def name(self, index):
        return self.index.name(index)


class Index:
    """Where in which tar file every photograph is. labels: of each. notes: what is left out."""

    def __init__(self, paths):
        self.paths, self.labels, self.notes = paths, [], []
        places, incomplete = [], 0
        for number, path in enumerate(paths):
            samples = _samples(path)
            for image, label in samples:
                if image is None or label is None:
                    incomplete += 1
                    continue
                places.append((number, image.offset_data, image.size))
                self.labels.append(label)
        self.places = np.array(places, np.int64).reshape(-1, 3)  # 24 bytes each; workers share them
        if incomplete:
            self.notes.append(f"left out: {incomplete} samples without a photograph or without a .cls")

    def read(self, index):
        number, offset, size = self.places[index].tolist()

        def read():
            with open(self.paths[number], "rb") as file:
                file.seek(offset)
                return file.read(size)

        content = trying(read)
        if len(content) < size:
            raise ValueError(f"{self.paths[number]} ends in the middle of a photograph; it is shorter than it was")
        return content

    def name(self, index):
        """FILE, MEMBER, for errors: the names are not kept, and looked up."""
        number, offset, _ = self.places[index].tolist()
        with tarfile.open(self.paths[number], "r:") as tar:
            return f"{self.paths[number]}, {next(member.name for member in tar if member.offset_data == offset)}"


def _samples(path):
    """[(TarInfo of the photograph or None, label or None), ...] of a tar file, in its order."""
    samples = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                if not member.isfile() or not stem:
                    continue
                sample, kind = samples.setdefault((folder, stem), [None, None]), f".{kind.lower()}"
                if kind == ".cls":
                    sample[1] = _label(tar.extractfile(member).read(), path, member)
                elif kind in suffixes():
                    if sample[0] is not None:
                        raise ValueError(f"{path}: {sample[0].name} and {member.name} are photographs of one sample; "
                                         "expected one")
                    sample[0] = member
                tar.members.clear()  # it would keep all of them
    except tarfile.TarError as error:
        raise ValueError(f"{path} is no tar file, or compressed, or damaged ({error}); expected plain tar") from error
    return samples.values()


def _label(text, path, member):
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{path}, {member.name} holds {text[:20]!r}; expected the number of a class") from None


def paths_of(pattern):
    """(paths of the training shards, of the validation shards) of TRAIN or TRAIN::VAL."""
    train, separator, val = pattern.partition("::")
    training = expand(train)
    if separator:
        return training, expand(val)
    folder, _, name = train.rpartition("/")
    for other in VALIDATION if "train" in name else ():
        found = glob.glob("/".join([*filter(None, [glob.escape(folder)]),
                                    re.sub(r"\{.*?\}", "*", name.replace("train", other))]))
        if found:
            return training, [Path(path) for path in sorted(found)]
    raise FileNotFoundError(f"--data wds:{pattern}: which shards are for validation? None are called as these, with "
                            f"{' or '.join(VALIDATION)} for train; name them: 'wds:TRAIN::VAL'")


def expand(pattern):
    """Paths that a pattern with {0000..1281}, {a,b} and * stands for. Raises FileNotFoundError where one is missing."""
    parts = [_choices(part) for part in re.split(r"(\{.*?\})", pattern)]
    paths = []
    for path in map("".join, itertools.product(*parts)):
        found = sorted(glob.glob(path)) if "*" in path else [path]
        if not found or not Path(found[0]).is_file():
            raise FileNotFoundError(f"--data wds:{pattern}: no file {path}")
        paths += map(Path, found)
    return paths


def _choices(part):
    if not part.startswith("{"):
        return [part]
    span = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
    if span:
        first, last = span.groups()
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return part[1:-1].split(",")
