"""COCO's layout on disk: read once, checked, and held in a few flat arrays that all processes of a rank share.

As Python's objects the annotations of COCO take 2 GB, and each loader worker copies what it touches, because counting
references writes to them. The arrays are tensors: forked workers share them, and to others torch hands shared memory.
"""
import json
import os
from pathlib import Path

import numpy as np
import torch
from faster_coco_eval import mask as rle

from train.coco_json import called, entries, read, refuse
from train.photographs import exif_notes, load_matching

MAX_COORDINATE = 1e6  # of a box or polygon in pixels: drawing a polygon takes memory by its length


class CocoFolder:
    """DIR/annotations/instances_<split>2017.json, or another year or none, the photographs in DIR/<split>2017/; for
    evaluation also image_info_test-dev2017.json without annotations, the photographs in test2017/.

    Args:
        folder: DIR, or the JSON file.
        split: "train" or "val".
        masks: "required" or "optional": whether an object without a mask is refused.
        exif: see train.photographs.load_matching.

    classes, category_ids: names and ids of the categories, in the order of the ids. Images are in the order of theirs,
    image_ids, in JSON, texts or numbers and nothing but names; file_names, heights, widths: of each image. labels
    (class from 0), boxes (m, 4) float64 as x, y, width, height, areas, crowd, ignore (0 or 1): of all objects;
    image i has those from starts[i] to starts[i + 1]. annotated: whether the file has annotations at all.
    notes: what was made up or is missing, to be said.

    Raises FileNotFoundError or ValueError, naming file, record and field, for what is missing or does not fit.
    """

    def __init__(self, folder, split, masks="required", exif="apply"):
        self.exif = exif
        self.file = annotation_file(folder, split)
        name = self.file.stem.removeprefix("instances_").removeprefix("image_info_")
        self.root = self.file.parent.parent / name.replace("-dev", "")  # test-dev2017 is a part of test2017/
        self.notes = []
        images, annotations, categories, self.annotated = read(self.file)
        if split == "train" and not self.annotated:
            raise ValueError(f"{self.file} has no annotations; expected them for training")
        refuse_twice(self.file, "category id", [category for category, _ in categories])
        refuse_twice(self.file, "category name", [name for _, name in categories])
        categories = sorted(categories, key=lambda category: _order(category[0]))
        self.category_ids, self.classes = [i for i, _ in categories], [name for _, name in categories]

        refuse_twice(self.file, "image id", [image[0] for image in images])
        refuse_twice(self.file, "file_name", [os.path.normpath(image[1]) for image in images])
        ids, names, *sides = zip(*sorted(images, key=lambda image: _order(image[0])))
        self.image_ids, self.file_names = Texts(map(json.dumps, ids)), Texts(names)
        self.heights, self.widths = torch.tensor(sides, dtype=torch.int64)
        self._take_annotations(annotations, {key: i for i, key in enumerate(ids)}, masks)
        find_photographs(folder, self.file.name, self.root, names)
        self.notes += exif_notes([str(self.root / name) for name in names], exif)

    def __len__(self):
        return len(self.heights)

    def name(self, index):
        """Name of a photograph, for errors."""
        return f"{self.file}, {self.file_names[index]}"

    def pixels(self, index):
        """The photograph as (H, W, 3) uint8, of the size that the annotations are of."""
        size = int(self.heights[index]), int(self.widths[index])
        return load_matching(self.root / self.file_names[index], *size, self.exif, self.file.name)

    def annotations(self, index):
        """[{"category_id": class, from 0, "bbox", "area", "iscrowd", "ignore", "segmentation"}] of image `index`.

        segmentation: polygons, a compressed run-length code, or None for an object without a mask.
        """
        start, end = self.starts[index:index + 2].tolist()
        columns = (self.labels, self.boxes, self.areas, self.crowd, self.ignore)
        columns = [column[start:end].tolist() for column in columns]
        size = [int(self.heights[index]), int(self.widths[index])]
        return [{"category_id": label, "bbox": box, "area": area, "iscrowd": crowd, "ignore": ignore,
                 "segmentation": self._segmentation(start + i, size)}
                for i, (label, box, area, crowd, ignore) in enumerate(zip(*columns))]

    def _segmentation(self, number, size):
        if code := self.codes.bytes_of(int(self.code_of[number])):
            return {"size": size, "counts": code}
        first, last = self.polygons_of[number].tolist()
        ends = self.polygon_ends[first:last + 1].tolist()
        return [self.coordinates[a:b].tolist() for a, b in zip(ends, ends[1:])] or None

    def _take_annotations(self, found, index_of, masks):
        """Checks what needs the whole file, and orders the objects by their image."""
        def numbered(ids, of):  # -1: of none
            return np.array([of.get(key, -1) for key in ids], np.int64)

        label_of = {category: label for label, category in enumerate(self.category_ids)}
        image = numbered(found.image_ids, index_of)[np.asarray(found.images)]
        labels = numbered(found.category_ids, label_of)[np.asarray(found.categories)]
        refuse(self.file, image < 0, "image_id")
        refuse(self.file, labels < 0, "category_id")
        boxes, areas = np.asarray(found.boxes).reshape(-1, 4), np.asarray(found.areas)
        limit = f"of at most {MAX_COORDINATE:.0f} pixels"
        refuse(self.file, ~(np.abs(boxes) <= MAX_COORDINATE).all(1), "bbox", f"four numbers {limit}")
        refuse(self.file, ~np.isfinite(areas), "area", "a finite number")
        coordinates, polygon_ends = np.asarray(found.coordinates), np.asarray(found.polygon_ends)
        polygons_of = np.asarray(found.polygons_of).reshape(-1, 2)
        if len(coordinates) and not -MAX_COORDINATE <= coordinates.min() <= coordinates.max() <= MAX_COORDINATE:
            before = np.append(0, np.cumsum(~(np.abs(coordinates) <= MAX_COORDINATE)))[polygon_ends[polygons_of]]
            refuse(self.file, before[:, 0] < before[:, 1], "segmentation", f"coordinates {limit}")
        code_of, sizes = np.asarray(found.code_of), np.asarray(found.sizes).reshape(-1, 2)
        of_image = torch.stack([self.heights, self.widths], 1).numpy()[image]
        refuse(self.file, (code_of > 0) & (sizes[code_of] != of_image).any(1), "segmentation",
               "a run-length code of the size of its image")

        masked = (polygons_of[:, 0] < polygons_of[:, 1]) | (code_of > 0)
        self._refuse_boxes_alone(masked, masks)
        order = np.argsort(image, kind="stable")
        self.starts = torch.from_numpy(np.searchsorted(image[order], np.arange(len(self) + 1)))
        self.labels, self.boxes, self.areas = (torch.from_numpy(x[order]) for x in (labels, boxes, areas))
        self.crowd, self.ignore = (torch.from_numpy(np.asarray(x, np.int8)[order])
                                   for x in (found.crowd, found.ignore))
        self.code_of, self.polygons_of = torch.from_numpy(code_of[order]), torch.from_numpy(polygons_of[order])
        self.coordinates, self.polygon_ends = torch.from_numpy(coordinates), torch.from_numpy(polygon_ends)
        self.codes = Texts(found.codes)
        self._fill_areas(image[order])

    def _refuse_boxes_alone(self, masked, masks):
        without = np.flatnonzero(~masked)
        if len(without) and masks == "required":
            first = {*without[:10].tolist()}
            which = ", ".join(called(entry, number) for name, number, entry in entries(self.file)
                              if name == "annotations" and number - 1 in first)
            raise ValueError(
                f"{self.file}: {len(without)} of the {len(masked)} annotations are boxes without a mask (segmentation "
                f"is missing, empty, nested or of fewer than three points): {which}{', ...' * (len(without) > 10)}; "
                "expected polygons or run-length codes. --masks optional takes these objects as boxes alone")
        if len(without):
            self.notes.append(f"masks: {len(without)} of the {len(masked)} annotations have none: boxes alone, without "
                              "mask loss and outside of mask AP")

    def _fill_areas(self, image):
        """An area of 0, or none, is taken from the mask, or from the box where there is none."""
        without = np.flatnonzero(self.areas.numpy() <= 0)
        for k in without.tolist():
            size = int(self.heights[image[k]]), int(self.widths[image[k]])
            code = run_lengths(self._segmentation(k, list(size)), *size)
            self.areas[k] = float(rle.area(code)) if code else float(self.boxes[k, 2:].clamp_min(0).prod())
        if len(without):
            self.notes.append(f"areas: {len(without)} of the {len(self.areas)} annotations have none or 0: taken from "
                              "their masks, or from their boxes where there is no mask")


def annotation_file(folder, split):
    """The JSON file of a split in COCO's layout; for "val" that of a test set where there is no other. Raises
    FileNotFoundError."""
    folder = Path(folder)
    if folder.is_file() and split == "val":
        return folder
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: no such folder; expected one with annotations/, train2017/ and "
                                "val2017/")
    files = sorted((folder / "annotations").glob(f"instances_{split}*.json"))
    tests = sorted((folder / "annotations").glob("image_info_*.json")) if split == "val" and not files else []
    if len(files or tests) != 1:
        raise FileNotFoundError(
            f"--data {folder}: expected one annotations/instances_{split}*.json, as instances_{split}2017.json; found "
            f"{[file.name for file in files or tests]}{'; for evaluation, name one of them' if tests else ''}")
    return (files or tests)[0]


def find_photographs(folder, file, root, names):
    """Raises ValueError or FileNotFoundError when those that a file names are not in `root`."""
    outside = [name for name in names if os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == ".."]
    if outside:
        raise ValueError(f"{file} names files outside of {root}: {outside[:5]}; they were refused, expected names "
                         "inside of it")
    missing = [name for name in names if not os.path.isfile(f"{root}/{name}")]
    if missing:
        raise FileNotFoundError(f"--data {folder}: {len(missing)} of the {len(names)} photographs in {file} are not "
                                f"in {root}; missing are {', '.join(missing[:10])}")


def run_lengths(segmentation, height, width):
    """What a CocoFolder has of an object's mask, which was checked when the file was read, as a compressed run-length
    code, or None."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return segmentation


class Texts:
    """Many short texts, or bytes, in two tensors."""

    def __init__(self, texts):
        encoded = [text if isinstance(text, bytes) else text.encode() for text in texts]
        self.starts = torch.tensor([0, *map(len, encoded)]).cumsum(0)
        self.content = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))

    def bytes_of(self, index):
        start, end = self.starts[index:index + 2].tolist()
        return self.content[start:end].numpy().tobytes()

    def __getitem__(self, index):
        return self.bytes_of(index).decode()


def refuse_twice(file, what, values):
    """Raises ValueError when values, which are to be keys, are not unique."""
    seen = set()
    twice = [value for value in values if value in seen or seen.add(value)]
    if twice:
        raise ValueError(f"{file}: the same {what} more than once: {', '.join(map(repr, twice[:5]))} ({len(twice)} in "
                         "all); expected each once")


def _order(value):
    return isinstance(value, str), value
