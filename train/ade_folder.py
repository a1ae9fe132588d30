"""ADE20K's layout: photographs beside label maps, and the names of their classes."""
import json
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from train.photographs import exif_notes, left_out, load_matching, read, suffixes, visible_files

IGNORED = 255
LOOKED_AT = 200  # label maps that are read before training
FREQUENT = 0.05  # share of the pixels from which on label 0 may be a class


class AdeFolder(Dataset):
    """ADE20K's layout: DIR/images/SPLIT/x.jpg beside DIR/annotations/SPLIT/x.png, at any depth below SPLIT.

    In label maps 255 is void and 0 is, as config.zero_label says, unlabelled or the first class. Samples: (RGB image
    (H, W, 3) uint8, labels (H, W) uint8 from 0, with 255 where they are ignored, name: the path below SPLIT without its
    ending). notes: see train.run_folder. Raises FileNotFoundError or ValueError, naming the file.
    """

    def __init__(self, config, split, classes):
        images, annotations = (Path(config.data) / name / split for name in ("images", "annotations"))
        for path in (images, annotations):
            if not path.is_dir():
                raise FileNotFoundError(f"--data {config.data}: no folder {path}; expected ADE20K's layout, images/ "
                                        "and annotations/, each with training/ and validation/")
        files, others = _by_suffix(images, suffixes())
        label_maps, _ = _by_suffix(annotations, (".png",))
        if not files:
            raise FileNotFoundError(f"--data {config.data}: no photographs in {images}")
        photographs, label_maps = _by_name(files, images), _by_name(label_maps, annotations)
        missing = [str(annotations / f"{name}.png") for name in photographs if name not in label_maps]
        if missing:
            raise FileNotFoundError(f"--data {config.data}: {len(missing)} images have no label map; missing are "
                                    f"{', '.join(missing[:5])}")
        self.files = [(path, label_maps[name], name) for name, path in photographs.items()]
        self.classes, self.exif, self.zero_is_class = classes, config.exif, config.zero_label == "class"
        alone = [str(path) for name, path in label_maps.items() if name not in photographs]
        self.notes = left_out(others) + exif_notes([path for path, *_ in self.files], config.exif)
        if alone:
            self.notes.append(f"left out: {len(alone)} label maps without a photograph, as {alone[0]}")
        self.notes += self._doubts()

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        photograph, path, name = self.files[index]
        labels = read_label_map(path)
        first, last = (0, len(self.classes) - 1) if self.zero_is_class else (1, len(self.classes))
        void = (labels == IGNORED) | (labels == 0) if first else labels == IGNORED
        wrong = labels[~void & ((labels < first) | (labels > last))]
        if len(wrong):
            zero = "0, unlabelled, " if first else "--zero-label class, "
            raise ValueError(f"{path} has label {wrong.max()}; expected {zero}{first} to {last}, or 255, void. Other "
                             "classes need a names file, classes.json or classes.txt, in the folder of the data")
        pixels = load_matching(photograph, *labels.shape, self.exif, path)
        return pixels, np.where(void, IGNORED, labels - first).astype(np.uint8), name

    def _doubts(self):
        """A note when some label maps look as if they counted from 0: it is frequent, and the last class is never
        there. Where not all are looked at, rare classes are missing, too: then the others must all be there."""
        step = -(-len(self.files) // LOOKED_AT)
        counts = np.zeros(256, np.int64)
        for _, path, _ in self.files[::step]:
            try:
                counts += np.bincount(read_label_map(path).astype(np.uint8).ravel(), minlength=256)
            except (ValueError, OSError):  # said when it is its turn
                pass
        last, zeros = len(self.classes), counts[0] / max(1, counts.sum())
        if self.zero_is_class or zeros < FREQUENT or counts[last] or step > 1 and not counts[1:last].all():
            return []
        return [f"label 0, unlabelled, is {100 * zeros:.0f}% of the pixels, and the last class, {last} "
                f"({self.classes[-1]}), is in none of {len(self.files[::step])} label maps; if they count from 0, so "
                "that 0 is a class, use --zero-label class"]


def _by_suffix(root, known):
    """(files below `root` with one of these endings, the others)."""
    of_kind, others = [], []
    for path in visible_files(root):
        (of_kind if path.suffix.lower() in known else others).append(path)
    return of_kind, others


def _by_name(files, root):
    """{path below `root` without its ending: file}. Raises ValueError for two of one name."""
    found = {}
    for path in files:
        name = path.relative_to(root).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path} share one name, and so one label map and one prediction; "
                             "rename or remove one of them")
        found[name] = path
    return found


def read_label_map(path):
    """The numbers in a PNG, whether of a palette or grey values -> (H, W), an integer type."""
    image, _ = read(path)
    labels = np.asarray(image)
    if labels.ndim != 2 or labels.dtype.kind not in "uib":
        raise ValueError(f"{path} is {labels.shape} of {labels.dtype}; expected one channel of whole numbers")
    if labels.dtype == bool:
        return labels.astype(np.uint8)
    if image.format == "PNG" and image.mode == "L":
        with open(path, "rb") as file:
            depth = file.read(25)[24]  # Pillow stretches grey values of 2 and 4 bits to 0 to 255
        labels = labels // {2: 85, 4: 17}[depth] if depth in (2, 4) else labels
    return labels


def label_map_size(path):
    """(H, W) of a label map, from the head of its file; (1, 1) of one that cannot be read, which is said when it is its
    turn."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return 1, 1


def named_classes(folder):
    """Names of the classes, in order of their labels: DIR/classes.json (a list), DIR/classes.txt (one a line), or
    ADE20K's own file; None without any. Read as UTF-8, with or without a byte order mark.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"--data {folder}: no such folder; expected one with images/ and annotations/")
    file = next((root / name for name in ("classes.json", "classes.txt", "objectInfo150.txt")
                 if (root / name).exists()), None)
    if file is None:
        return None
    try:
        text = file.read_text(encoding="utf-8-sig")
        names = json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines()]
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}); expected "
                         f"{'a list of names, JSON' if file.suffix == '.json' else 'one name a line'}, in UTF-8"
                         ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{file} holds {type(names).__name__}; expected a list of names")
    if file.name == "objectInfo150.txt":  # tab-separated, a title, the name last
        names = [line.split("\t")[-1].strip() for line in names[1:]]
    elif file.suffix == ".txt":
        names = [name for name in names if name]
    if not 0 < len(names) < IGNORED:
        raise ValueError(f"{file} names {len(names)} classes; expected 1 to {IGNORED - 1}, as many as fit beside "
                         "'unlabelled' into a PNG")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{file} has names more than once: {twice[:5]}; expected a name of its own for each class")
    return names
