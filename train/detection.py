"""The task of detection and instance segmentation: COCO's folders, or rendered scenes, and what is minimised.

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

from eval import coco
from eval.coco import evaluate  # noqa: F401  the loop and the command must count alike
from train import scenes
from train.data import HELD_OUT_SCENES, SCENES, Scenes, fitted, load_image, resized, to_tensor, with_generator
from train.device import autocast

METRICS = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP"}  # the first chooses the best epoch
LONGEST = 5 / 3  # the long side, at most, in short sides: 1333 for 800
MULTIPLE = 32  # that the sides of images are padded to


def loss(run, batch, rng):
    """Sum of the detector's losses: a scalar."""
    images, sizes, targets = batch
    with autocast(run.device, run.config.amp):
        losses = run.runner(images, sizes, targets=targets)
    return sum(losses.values())


def datasets(config):
    """(training Dataset with keys (epoch, index), validation Dataset, names of the classes) of a Config."""
    validation, classes = validation_set(config)
    if config.data is None:
        return DetectionScenes(config.limit or SCENES, config.img_size, config.seed), validation, classes
    training = CocoFolder(config.data, "train")
    if training.classes != classes:
        raise ValueError(f"--data {config.data}: the categories of train and val differ; expected the same ids and names in both files")
    return AugmentedPhotographs(training, config), validation, classes


def validation_loader(dataset, batch_size, rank, world, workers):
    """One photograph at a time, whatever the batch size: their sizes differ."""
    return coco.loader(dataset, rank, world, workers)


def validation_set(config):
    """(Dataset for eval.coco.evaluate at the published size, names of the classes): the short side img_size, the long at most 5/3 of it."""
    if config.data is None:
        return DetectionScenes(config.val_limit or HELD_OUT_SCENES, config.img_size, config.seed, held_out=True), list(scenes.CLASSES)
    folder = CocoFolder(config.data, "val")
    return Photographs(folder, config.img_size, config.val_limit), folder.classes


class DetectionScenes(Scenes):
    """Rendered scenes with their boxes and masks. Keys: (epoch, index) for training, index for the held-out ones.

    Training: as AugmentedPhotographs. Held out: as Photographs.
    """
    category_ids = list(range(len(scenes.CLASSES)))
    max_objects = 2

    def __getitem__(self, key):
        scene = self.draw(key)
        if not self.held_out:
            return to_tensor(scene.image), scene.boxes, scene.labels, scene.masks
        codes = rle.encode(np.asfortranarray(scene.masks.astype(np.uint8).transpose(1, 2, 0)))
        annotations = [{"image_id": key, "category_id": int(label), "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
                        "area": float(mask.sum()), "iscrowd": 0, "segmentation": code}
                       for (x0, y0, x1, y1), label, mask, code in zip(scene.boxes, scene.labels, scene.masks, codes)]
        return padded(to_tensor(scene.image)), (self.size, self.size), (self.size, self.size), key, annotations

    def collate(self, samples):
        return collate(samples)


class CocoFolder:
    """COCO's layout: DIR/annotations/instances_<split>2017.json, or another year or none, and the photographs in DIR/<split>2017/.

    classes: names, in the order of their ids. images: records of the photographs. annotations: those of each image, a list, where
    category_id is the class, from 0. Raises FileNotFoundError or ValueError, naming the file, for what is missing or does not fit.
    """

    def __init__(self, data, split):
        if not Path(data).is_dir():
            raise FileNotFoundError(f"--data {data}: no such folder; expected one with annotations/, train2017/ and val2017/")
        files = sorted((Path(data) / "annotations").glob(f"instances_{split}*.json"))
        if len(files) != 1:
            raise FileNotFoundError(f"--data {data}: expected one annotations/instances_{split}*.json, as instances_{split}2017.json; found "
                                    f"{[file.name for file in files]}")
        self.file = files[0]
        self.root = Path(data) / self.file.stem.removeprefix("instances_")
        try:
            content = json.loads(self.file.read_text())
            images, entries, categories = content["images"], content["annotations"], content["categories"]
            categories = sorted(categories, key=lambda category: category["id"])
            self.classes = [category["name"] for category in categories]
            self.category_ids = [category["id"] for category in categories]
            self.images = sorted(images, key=lambda image: image["id"])
            of_image = {image["id"]: [] for image in self.images}
            number = {category: i for i, category in enumerate(self.category_ids)}
            for entry in entries:
                of_image[entry["image_id"]].append({"image_id": entry["image_id"], "category_id": number[entry["category_id"]],
                                                    "bbox": [float(side) for side in entry["bbox"]], "area": float(entry["area"]),
                                                    "iscrowd": int(entry.get("iscrowd", 0)), "segmentation": entry["segmentation"]})
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, KeyError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{self.file} is not COCO's instance annotations ({problem}); expected images, annotations and categories, every "
                             "annotation with bbox, area, segmentation and known image_id and category_id") from error
        self.annotations = [of_image[image["id"]] for image in self.images]
        outside = [image["file_name"] for image in self.images
                   if os.path.isabs(image["file_name"]) or os.path.normpath(image["file_name"]).startswith("..")]
        if outside:
            raise ValueError(f"{self.file} names files outside of {self.root}: {outside[:5]}; they were refused, expected names inside of it")
        missing = [image["file_name"] for image in self.images if not (self.root / image["file_name"]).is_file()]
        if missing:
            raise FileNotFoundError(f"--data {data}: {len(missing)} of the {len(self.images)} photographs in {self.file.name} are not in "
                                    f"{self.root}; missing are {', '.join(missing[:10])}")

    def where(self, index):
        """Name of a photograph, for errors."""
        return f"{self.file}, {self.images[index]['file_name']}"

    def pixels(self, index):
        """The photograph as (H, W, 3) uint8. As in COCO, its EXIF orientation is not applied."""
        image = self.images[index]
        pixels = np.asarray(load_image(self.root / image["file_name"]))
        if pixels.shape[:2] != (image["height"], image["width"]):
            raise ValueError(f"{self.root / image['file_name']} is {pixels.shape[0]} x {pixels.shape[1]} pixels; {self.file.name} says "
                             f"{image['height']} x {image['width']}")
        return pixels


def objects(annotations, height, width, where):
    """(boxes (n, 4) float32, labels (n,) int64, masks (n, H, W) bool) to train on: no crowds, nothing below one pixel or out of the image.

    where: name of the image, for errors.
    """
    boxes, labels, masks = [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        if annotation["iscrowd"] or annotation["area"] <= 0 or w < 1 or h < 1 or not inside:
            continue
        boxes.append([x, y, x + w, y + h])
        labels.append(annotation["category_id"])
        masks.append(rle.decode(run_lengths(annotation["segmentation"], height, width, where)))
    return (np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(masks, bool).reshape(-1, height, width))


def run_lengths(segmentation, height, width, where):
    """Polygons [[x, y, x, y, ...], ...], or a run-length code, compressed or not -> compressed. Raises ValueError if it is damaged."""
    try:
        if isinstance(segmentation, list):
            polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
            code = rle.merge(rle.frPyObjects(polygons, height, width)) if polygons else \
                rle.encode(np.zeros((height, width), np.uint8, order="F"))
        else:
            code = rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
        if tuple(code["size"]) != (height, width):
            raise ValueError(f"its size is {code['size']}, the image's {[height, width]}")
        if not isinstance(segmentation, list):
            rle.decode(code)  # reads it
        return code
    except Exception as error:  # the library raises whatever its parts do
        raise ValueError(f"{where}: a segmentation cannot be read ({type(error).__name__}: {error}); expected polygons of three points or more, or a "
                         "run-length code of the image's size") from error


class AugmentedPhotographs(Dataset):
    """Photographs with something to find, for training; keys (epoch, index).

    Items: image (3, h, w) float32, boxes (n, 4) float32, labels (n,) int64, masks (n, h, w) bool.
    """

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        self.indices = [i for i, image in enumerate(folder.images)
                        if min(image["width"], image["height"]) >= 32 and any(not entry["iscrowd"] for entry in folder.annotations[i])]
        self.indices = self.indices[:config.limit]
        self.groups = [int(folder.images[i]["width"] > folder.images[i]["height"]) for i in self.indices]  # so that little is padded

    def __len__(self):
        return len(self.indices)

    def __getitem__(self, key):
        epoch, index = key
        place = self.indices[index]
        pixels = self.folder.pixels(place)
        return with_generator((self.config.seed, epoch, index), augment, pixels,
                              *objects(self.folder.annotations[place], *pixels.shape[:2], self.folder.where(place)), self.config)

    def collate(self, samples):
        return collate(samples)


def augment(pixels, boxes, labels, masks, config):
    """Flip; half of the time a crop from a smaller resize; then resize by a random ratio."""
    if torch.rand(()) < config.flip:
        pixels, masks, width = pixels[:, ::-1], masks[:, :, ::-1], pixels.shape[1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if torch.rand(()) < config.crop:
        pixels, boxes, masks = scaled(pixels, boxes, masks, config, (0.5, 0.625, 0.75)[int(torch.randint(3, ()))])
        pixels, boxes, labels, masks = cropped(pixels, boxes, labels, masks, config)
    low, high = config.resize
    pixels, boxes, masks = scaled(pixels, boxes, masks, config, low + (high - low) * int(torch.randint(11, ())) / 10)
    return to_tensor(pixels), boxes, labels, masks


def scaled(pixels, boxes, masks, config, ratio):
    """Image, boxes and masks so that the short side is ratio * img_size, if the long one does not exceed what it may."""
    H, W = pixels.shape[:2]
    h, w = fitted(H, W, config.img_size * ratio, config.img_size * LONGEST)
    masks = F.interpolate(torch.from_numpy(np.ascontiguousarray(masks))[:, None].byte(), (h, w), mode="nearest")[:, 0].bool().numpy() \
        if len(masks) else np.zeros((0, h, w), bool)
    boxes = np.clip(boxes * np.float32([w / W, h / H, w / W, h / H]), 0, np.float32([w, h, w, h]))
    return resized(pixels, (h, w)), boxes, masks


def cropped(pixels, boxes, labels, masks, config):
    """A rectangle of 0.48 to 0.75 img_size along each side, at random, as far as the image has it."""
    H, W = pixels.shape[:2]
    low, high = round(0.48 * config.img_size), round(0.75 * config.img_size)
    h, w = (min(side, int(torch.randint(min(side, low), min(side, high) + 1, ()))) for side in (H, W))
    top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
    boxes = np.clip(boxes - np.float32([left, top, left, top]), 0, np.float32([w, h, w, h]))
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return pixels[top:top + h, left:left + w], boxes[kept], labels[kept], masks[kept, top:top + h, left:left + w]


def collate(samples):
    """Samples -> images (N, 3, H, W) padded with zeros, their sizes [(h, w), ...], targets [{boxes, labels, masks}, ...]."""
    sizes = [tuple(image.shape[1:]) for image, *_ in samples]
    H, W = (-(-max(sides) // MULTIPLE) * MULTIPLE for sides in zip(*sizes))
    images, targets = torch.zeros(len(samples), 3, H, W), []
    for i, (image, boxes, labels, masks) in enumerate(samples):
        h, w = sizes[i]
        images[i, :, :h, :w] = image
        whole = torch.zeros(len(masks), H, W, dtype=torch.bool)
        whole[:, :h, :w] = torch.from_numpy(np.ascontiguousarray(masks))
        targets.append({"boxes": torch.from_numpy(np.ascontiguousarray(boxes, np.float32)), "labels": torch.from_numpy(labels), "masks": whole})
    return images, sizes, targets


class Photographs(Dataset):
    """What is shown to a detector: (image (3, H, W) float32, padded; its size (h, w) before; size of the photograph; id; annotations)."""

    def __init__(self, folder, size, limit=None):
        self.folder, self.size, self.category_ids = folder, size, folder.category_ids
        self.length = min(len(folder.images), limit or len(folder.images))

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        pixels = self.folder.pixels(index)
        image, size = shown(pixels, self.size)
        annotations = [{**entry, "segmentation": run_lengths(entry["segmentation"], *pixels.shape[:2], self.folder.where(index))}
                       for entry in self.folder.annotations[index]]
        return image, size, pixels.shape[:2], self.folder.images[index]["id"], annotations


def shown(pixels, img_size):
    """A photograph (H, W, 3) uint8 as a detector takes it: (image (3, H, W) float32, padded, size before padding)."""
    size = fitted(*pixels.shape[:2], img_size, img_size * LONGEST)
    return padded(to_tensor(resized(pixels, size))), size


def padded(image):
    """Zeros right and bottom, up to multiples of 32."""
    return F.pad(image, (0, -image.shape[2] % MULTIPLE, 0, -image.shape[1] % MULTIPLE))
