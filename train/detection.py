"""The task of detection and instance segmentation: COCO's folders or rendered scenes, and what is minimised.

Augmentation is that of the published configurations (mmdetection 2.11's, after DETR and Sparse R-CNN).
"""
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as rle
from torch.utils.data import Dataset

from train import data, scenes
from train.device import autocast
from train.photographs import fit_size, load_image, resize, to_tensor

MAX_RATIO = 5 / 3  # the long side, at most, in short sides: 1333 for 800
SIZE_DIVISOR = 32  # the sides of images are padded to multiples of it


def datasets(config):
    """(training Dataset with keys (epoch, index), validation Dataset, names of the classes) of a Config.

    Raises FileNotFoundError or ValueError when the folder does not hold what it should.
    """
    validation, classes = validation_set(config)
    if config.data is None:
        return Scenes.of(config), validation, classes
    training = CocoFolder(config.data, "train")
    if training.classes != classes:
        raise ValueError(f"--data {config.data}: the categories of train and val differ; expected the same ids and "
                         "names in both files")
    return AugmentedPhotographs(training, config), validation, classes


def validation_set(config):
    """(Dataset for evaluation at the published size, names of the classes): the short side img_size, the long one at
    most 5/3 of it. Samples: see Photographs."""
    if config.data is None:
        return Scenes.of(config, validation=True), list(scenes.CLASSES)
    folder = CocoFolder(config.data, "val")
    return Photographs(folder, config.img_size, config.val_limit), folder.classes


def loss(model, batch, config, rng):
    """Sum of the detector's losses: a scalar.

    batch: (images, sizes, targets), see collate. rng: not used.
    """
    images, sizes, targets = batch
    with autocast(images.device, config.amp):
        losses = model(images, sizes, targets=targets)
    return sum(losses.values())


class Scenes(data.Scenes):
    """Rendered scenes with their boxes and masks. Training: as AugmentedPhotographs. Validation: as Photographs."""
    category_ids = list(range(len(scenes.CLASSES)))

    def __getitem__(self, key):
        scene = self.draw(key)
        image = to_tensor(scene.image)
        if not self.validation:
            return image, scene.boxes, scene.labels, scene.masks
        codes = rle.encode(np.asfortranarray(scene.masks.astype(np.uint8).transpose(1, 2, 0)))
        annotations = []
        for box, label, mask, code in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks, codes):
            x0, y0, x1, y1 = box
            annotations.append({"image_id": key, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0],
                                "area": float(mask.sum()), "iscrowd": 0, "segmentation": code})
        size = (self.size, self.size)
        return pad(image), size, size, key, annotations

    def collate(self, samples):
        return collate(samples)


class CocoFolder:
    """COCO's layout: DIR/annotations/instances_<split>2017.json, or another year or none, the photographs in
    DIR/<split>2017/.

    classes: names, in the order of their ids. images: records of the photographs. annotations: those of each image, a
    list, where category_id is the class, from 0. Raises FileNotFoundError or ValueError, naming the file, for what is
    missing or does not fit.
    """

    def __init__(self, folder, split):
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"--data {folder}: no such folder; "
                                    "expected one with annotations/, train2017/ and val2017/")
        files = sorted((Path(folder) / "annotations").glob(f"instances_{split}*.json"))
        if len(files) != 1:
            raise FileNotFoundError(f"--data {folder}: expected one annotations/instances_{split}*.json, as "
                                    f"instances_{split}2017.json; found {[file.name for file in files]}")
        self.file = files[0]
        self.root = Path(folder) / self.file.stem.removeprefix("instances_")
        try:
            self._read(json.loads(self.file.read_text()))
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{self.file} is not COCO's instance annotations ({problem}); expected images, "
                             "annotations and categories, every annotation with bbox, area, segmentation and known "
                             "image_id and category_id") from error
        names = [image["file_name"] for image in self.images]
        outside = [name for name in names if os.path.isabs(name) or os.path.normpath(name).startswith("..")]
        if outside:
            raise ValueError(f"{self.file} names files outside of {self.root}: {outside[:5]}; they were refused, "
                             "expected names inside of it")
        missing = [name for name in names if not (self.root / name).is_file()]
        if missing:
            raise FileNotFoundError(f"--data {folder}: {len(missing)} of the {len(names)} photographs in "
                                    f"{self.file.name} are not in {self.root}; missing are {', '.join(missing[:10])}")

    def _read(self, content):
        images, entries, categories = content["images"], content["annotations"], content["categories"]
        categories = sorted(categories, key=lambda category: category["id"])
        self.classes = [category["name"] for category in categories]
        self.category_ids = [category["id"] for category in categories]
        self.images = sorted(images, key=lambda image: image["id"])
        label_of = {category: label for label, category in enumerate(self.category_ids)}
        of_image = {image["id"]: [] for image in self.images}
        for entry in entries:
            of_image[entry["image_id"]].append({
                "image_id": entry["image_id"], "category_id": label_of[entry["category_id"]],
                "bbox": [float(side) for side in entry["bbox"]], "area": float(entry["area"]),
                "iscrowd": int(entry.get("iscrowd", 0)), "segmentation": entry["segmentation"]})
        self.annotations = [of_image[image["id"]] for image in self.images]

    def name(self, index):
        """Name of a photograph, for errors."""
        return f"{self.file}, {self.images[index]['file_name']}"

    def pixels(self, index):
        """The photograph as (H, W, 3) uint8. As in COCO, its EXIF orientation is not applied."""
        image = self.images[index]
        path = self.root / image["file_name"]
        pixels = np.asarray(load_image(path))
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise ValueError(f"{path} is {pixels.shape[0]} x {pixels.shape[1]} pixels; {self.file.name} says "
                             f"{image['height']} x {image['width']}")
        return pixels


def objects(annotations, height, width, name):
    """What is trained on: no crowds, nothing below one pixel or out of the image.

    -> (boxes (n, 4) float32, labels (n,) int64, masks (n, H, W) bool). name: of the image, for errors.
    """
    boxes, labels, masks = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        if annotation["iscrowd"] or annotation["area"] <= 0 or w < 1 or h < 1 or not inside:
            continue
        boxes.append([x, y, x + w, y + h])
        labels.append(annotation["category_id"])
        masks.append(rle.decode(run_lengths(annotation["segmentation"], height, width, name)))
    boxes, masks = np.array(boxes, np.float32).reshape(-1, 4), np.array(masks, bool).reshape(-1, height, width)
    return boxes, np.array(labels, np.int64), masks


def run_lengths(segmentation, height, width, name):
    """Polygons [[x, y, x, y, ...], ...], or a run-length code, compressed or not -> compressed.

    Raises ValueError, naming the image, if it is damaged.
    """
    try:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            if polygons:
                code = rle.merge(rle.frPyObjects(polygons, height, width))
            else:
                code = rle.encode(np.zeros((height, width), np.uint8, order="F"))
        elif isinstance(segmentation["counts"], list):
            code = rle.frPyObjects(segmentation, height, width)
        else:
            code = segmentation
        if tuple(code["size"]) != (height, width):
            raise ValueError(f"its size is {code['size']}, the image's {[height, width]}")
        if not isinstance(segmentation, list):
            rle.decode(code)  # reads it
        return code
    except Exception as error:  # the library raises whatever its parts do
        raise ValueError(f"{name}: a segmentation cannot be read ({type(error).__name__}: {error}); expected polygons "
                         "of three points or more, or a run-length code of the image's size") from error


class AugmentedPhotographs(Dataset):
    """Photographs with annotations, as published also those with crowds alone, for training; keys (epoch, index).

    Samples: image (3, h, w) float32, boxes (n, 4) float32, labels (n,) int64, masks (n, h, w) bool.
    """

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        usable = [i for i, image in enumerate(folder.images)
                  if min(image["width"], image["height"]) >= 32 and folder.annotations[i]]
        self.indices = usable[:config.limit]
        # Photographs of one orientation make a batch, so that little is padded.
        self.groups = [int(folder.images[i]["width"] > folder.images[i]["height"]) for i in self.indices]

    def __len__(self):
        return len(self.indices)

    def name(self, index):
        """Annotations and name of a photograph, for errors."""
        return self.folder.name(self.indices[index])

    def __getitem__(self, key):
        epoch, index = key
        i = self.indices[index]
        pixels = self.folder.pixels(i)
        found = objects(self.folder.annotations[i], *pixels.shape[:2], self.folder.name(i))
        return data.with_generator((self.config.seed, epoch, index), augment, pixels, *found, self.config)

    def collate(self, samples):
        return collate(samples)


def augment(pixels, boxes, labels, masks, config):
    """Flip; half of the time a crop from a smaller resize; then resize by a random ratio. -> a sample"""
    if torch.rand(()) < config.flip:
        pixels, masks, width = pixels[:, ::-1], masks[:, :, ::-1], pixels.shape[1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if torch.rand(()) < config.crop:
        ratio = (0.5, 0.625, 0.75)[int(torch.randint(3, ()))]
        pixels, boxes, masks = rescale(pixels, boxes, masks, config, ratio)
        pixels, boxes, labels, masks = random_crop(pixels, boxes, labels, masks, config)
    low, high = config.resize
    pixels, boxes, masks = rescale(pixels, boxes, masks, config, low + (high - low) * int(torch.randint(11, ())) / 10)
    return to_tensor(pixels), boxes, labels, masks


def rescale(pixels, boxes, masks, config, ratio):
    """Image, boxes and masks so that the short side is ratio * img_size, if the long one is not too long then."""
    H, W = pixels.shape[:2]
    h, w = fit_size(H, W, config.img_size * ratio, config.img_size * MAX_RATIO)
    if len(masks):
        masks = torch.from_numpy(np.ascontiguousarray(masks))[:, None].byte()
        masks = F.interpolate(masks, (h, w), mode="nearest")[:, 0].bool().numpy()
    else:
        masks = np.zeros((0, h, w), bool)
    boxes = np.clip(boxes * np.float32([w / W, h / H, w / W, h / H]), 0, np.float32([w, h, w, h]))
    return resize(pixels, (h, w)), boxes, masks


def random_crop(pixels, boxes, labels, masks, config):
    """A rectangle of 0.48 to 0.75 img_size along each side, at random, as far as the image has it."""
    H, W = pixels.shape[:2]
    low, high = round(0.48 * config.img_size), round(0.75 * config.img_size)
    h, w = (min(side, int(torch.randint(min(side, low), min(side, high) + 1, ()))) for side in (H, W))
    top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
    boxes = np.clip(boxes - np.float32([left, top, left, top]), 0, np.float32([w, h, w, h]))
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    rows, columns = slice(top, top + h), slice(left, left + w)
    return pixels[rows, columns], boxes[kept], labels[kept], masks[kept, rows, columns]


def collate(samples):
    """Samples -> images (N, 3, H, W) padded with zeros, their sizes [(h, w), ...], targets, a dict of boxes, labels and
    masks for each."""
    sizes = [tuple(image.shape[1:]) for image, *_ in samples]
    H, W = (-(-max(sides) // SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes))
    images, targets = torch.zeros(len(samples), 3, H, W), []
    for i, (image, boxes, labels, masks) in enumerate(samples):
        h, w = sizes[i]
        images[i, :, :h, :w] = image
        padded = torch.zeros(len(masks), H, W, dtype=torch.bool)
        padded[:, :h, :w] = torch.from_numpy(np.ascontiguousarray(masks))
        boxes = torch.from_numpy(np.ascontiguousarray(boxes, np.float32))
        targets.append({"boxes": boxes, "labels": torch.from_numpy(labels), "masks": padded})
    return images, sizes, targets


class Photographs(Dataset):
    """What is shown to a detector of each photograph.

    Samples: (image (3, H, W) float32, padded; its size (h, w) before; size of the photograph; id; annotations).
    """

    def __init__(self, folder, size, limit=None):
        self.folder, self.size, self.category_ids = folder, size, folder.category_ids
        self.length = min(len(folder.images), limit or len(folder.images))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        pixels = self.folder.pixels(index)
        image, size = resize_and_pad(pixels, self.size)
        annotations = []
        for entry in self.folder.annotations[index]:
            code = run_lengths(entry["segmentation"], *pixels.shape[:2], self.folder.name(index))
            annotations.append({**entry, "segmentation": code})
        return image, size, pixels.shape[:2], self.folder.images[index]["id"], annotations


def resize_and_pad(pixels, img_size):
    """(H, W, 3) uint8 -> (image (3, H, W) float32 as a detector takes it, padded; its size (h, w) before padding)."""
    size = fit_size(*pixels.shape[:2], img_size, img_size * MAX_RATIO)
    return pad(to_tensor(resize(pixels, size))), size


def pad(image):
    """Zeros right and bottom, up to multiples of 32."""
    return F.pad(image, (0, -image.shape[2] % SIZE_DIVISOR, 0, -image.shape[1] % SIZE_DIVISOR))
