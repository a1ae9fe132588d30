"""The task of detection and instance segmentation: COCO's folders or rendered scenes, and what is minimised.

Augmentation is that of the published configurations (mmdetection 2.11's, after DETR and Sparse R-CNN).
"""
import json

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import mask as rle
from torch.utils.data import Dataset

from train import data, scenes
from train.coco_folder import CocoFolder, run_lengths
from train.device import autocast, clear_padding
from train.layout import scarce
from train.photographs import fit_size, resize, to_tensor

MAX_RATIO = 5 / 3  # the long side, at most, in short sides: 1333 for 800
SIZE_DIVISOR = 32  # the sides of images are padded to multiples of it
MIN_SIDE = 32  # of a photograph to be trained on
MIN_BOX = 0.1  # pixels: of less than that, after the last resize, no box is left to learn


def datasets(config):
    """(training Dataset with keys (epoch, index), validation Dataset, names of the classes) of a Config.

    Raises FileNotFoundError or ValueError when the folder does not hold what it should.
    """
    validation, classes = validation_set(config)
    if config.data is None:
        return Scenes.of(config), validation, classes
    if not validation.annotated:
        raise ValueError(f"{validation.folder.file} has no annotations; expected them for the validation of a training "
                         "run")
    training = CocoFolder(config.data, "train", config.masks, config.exif)
    if training.classes != classes:
        raise ValueError(f"--data {config.data}: the categories of train and val differ; expected the same ids and "
                         "names in both files")
    return AugmentedPhotographs(training, config), validation, classes


def validation_set(config):
    """(Dataset for evaluation at the published size, names of the classes): the short side img_size, the long one at
    most 5/3 of it. Samples: see Photographs."""
    if config.data is None:
        return Scenes.of(config, validation=True), list(scenes.CLASSES)
    folder = CocoFolder(config.data, "val", config.masks, config.exif)
    return Photographs(folder, config.img_size, config.val_limit), folder.classes


def loss(model, batch, config, seed):
    """Sum of the detector's losses: a scalar.

    batch: (images, sizes, targets), see collate. seed: not used.
    """
    images, sizes, targets = batch
    clear_padding(images, sizes)
    with autocast(images.device, config.amp):
        losses = model(images, sizes, targets=targets)
    return sum(losses.values())


class Scenes(data.Scenes):
    """Rendered scenes with their boxes and masks. Training: as AugmentedPhotographs. Validation: as Photographs."""
    category_ids = list(range(len(scenes.CLASSES)))
    annotated = True

    def image_id(self, index):
        return index

    def __getitem__(self, key):
        scene = self.draw(key)
        if not self.validation:
            return scene.image, scene.boxes, scene.labels, scene.masks, np.ones(len(scene.labels), bool)
        codes = rle.encode(np.asfortranarray(scene.masks.astype(np.uint8).transpose(1, 2, 0)))
        annotations = []
        for box, label, mask, code in zip(scene.boxes.tolist(), scene.labels.tolist(), scene.masks, codes):
            x0, y0, x1, y1 = box
            annotations.append({"image_id": key, "category_id": label, "bbox": [x0, y0, x1 - x0, y1 - y0],
                                "area": float(mask.sum()), "iscrowd": 0, "segmentation": code})
        size = (self.size, self.size)
        return pad(to_tensor(scene.image)), size, size, key, annotations

    def collate(self, samples):
        return collate(samples)


def objects(annotations, height, width):
    """What is trained on: no crowds, nothing that is to be ignored, below one pixel or out of the image.

    -> (boxes (n, 4) float32, labels (n,) int64, masks (n, H, W) bool, has_mask (n,) bool: False where a mask, all False
    here, is not known).
    """
    boxes, labels, masks, has_mask = [], [], [], []
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        inside = min(x + w, width) > max(x, 0) and min(y + h, height) > max(y, 0)
        skipped = annotation["iscrowd"] or annotation["ignore"]
        if skipped or annotation["area"] <= 0 or w < 1 or h < 1 or not inside:
            continue
        boxes.append([x, y, x + w, y + h])
        labels.append(annotation["category_id"])
        code = run_lengths(annotation["segmentation"], height, width)
        has_mask.append(code is not None)
        masks.append(rle.decode(code) if code else np.zeros((height, width), bool))
    boxes, masks = np.array(boxes, np.float32).reshape(-1, 4), np.array(masks, bool).reshape(-1, height, width)
    return boxes, np.array(labels, np.int64), masks, np.array(has_mask, bool)


def left_out(folder, used, config):
    """Lines on what of a CocoFolder is not trained on. used: indices of its photographs that are."""
    heights, widths, counts = folder.heights.numpy(), folder.widths.numpy(), folder.starts.diff().numpy()
    small = np.flatnonzero((np.minimum(heights, widths) < MIN_SIDE) & (counts > 0))
    photographs = [f"{(counts == 0).sum()} without objects"] * bool((counts == 0).any())
    if len(small):
        photographs.append(f"{len(small)} with a side below {MIN_SIDE} pixels, as {folder.file_names[small[0]]} of "
                           f"{heights[small[0]]} x {widths[small[0]]}")

    rows = np.isin(image := np.repeat(np.arange(len(folder)), counts), used)
    image, size = image[rows], np.stack([widths, heights], 1)
    start, side = np.split(folder.boxes.numpy()[rows], 2, 1)
    seen = np.minimum(start + side, size[image]) - np.maximum(start, 0)  # width and height inside of the photograph
    short, long = size.min(1), size.max(1)
    scale = np.minimum(config.img_size * config.resize[1] / short, config.img_size * MAX_RATIO / long)[image]
    reasons = {"crowds": folder.crowd.numpy()[rows] > 0, "to be ignored": folder.ignore.numpy()[rows] > 0,
               "outside of their photograph": (seen <= 0).any(1), "below one pixel": (side < 1).any(1),
               "without area": folder.areas.numpy()[rows] <= 0,
               f"with less than {MIN_BOX} pixels inside of it": (seen.min(1, initial=np.inf) * scale < MIN_BOX)}
    objects, counted = [], np.zeros(len(image), bool)
    for reason, chosen in reasons.items():  # each object by the first that holds
        number = int((chosen & ~counted).sum())
        objects += [f"{number} {reason}"] * bool(number)
        counted |= chosen
    return [f"left out: {what} {', '.join(parts)}"
            for what, parts in (("photographs:", photographs), ("objects:", objects)) if parts]


def photographs_with(folder):
    """{name of a class: how many photographs of a CocoFolder have objects of it}"""
    image = torch.arange(len(folder)).repeat_interleave(folder.starts.diff())
    pairs = torch.stack([folder.labels, image], 1).unique(dim=0)
    counts = torch.bincount(pairs[:, 0], minlength=len(folder.classes))
    return dict(zip(folder.classes, counts.tolist()))


class AugmentedPhotographs(Dataset):
    """Photographs with annotations, as published also those with crowds alone, for training; keys (epoch, index).

    Samples: image (h, w, 3) uint8, boxes (n, 4) float32, labels (n,) int64, masks (n, h, w) bool, has_mask (n,) bool,
    see objects(). notes: what is left out.
    """

    def __init__(self, folder, config):
        self.folder, self.config = folder, config
        usable = (torch.minimum(folder.widths, folder.heights) >= MIN_SIDE) & (folder.starts.diff() > 0)
        self.indices = usable.nonzero()[:config.limit, 0]
        # Photographs of one orientation make a batch, so that little is padded.
        self.groups = (folder.widths > folder.heights)[self.indices].int()
        self.notes = left_out(folder, self.indices.numpy(), config) + folder.notes + scarce(photographs_with(folder))

    def __len__(self):
        return len(self.indices)

    def name(self, index):
        """Annotations and name of a photograph, for errors."""
        return self.folder.name(self.indices[index])

    def __getitem__(self, key):
        epoch, index = key
        i = int(self.indices[index])
        pixels = self.folder.pixels(i)
        boxes, labels, masks, has_mask = objects(self.folder.annotations(i), *pixels.shape[:2])
        image, boxes, kept, masks = data.with_generator(
            (self.config.seed, epoch, index), augment, pixels, boxes, np.arange(len(labels)), masks, self.config)
        return image, boxes, labels[kept], masks, has_mask[kept]

    def collate(self, samples):
        return collate(samples)


def augment(pixels, boxes, labels, masks, config):
    """Flip; half of the time a crop from a smaller resize; then resize by a random ratio; what is hardly a box then is
    left out. -> (image, boxes, labels, masks)"""
    if torch.rand(()) < config.flip:
        pixels, masks, width = pixels[:, ::-1], masks[:, :, ::-1], pixels.shape[1]
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
    if torch.rand(()) < config.crop:
        ratio = (0.5, 0.625, 0.75)[int(torch.randint(3, ()))]
        pixels, boxes, masks = rescale(pixels, boxes, masks, config, ratio)
        pixels, boxes, labels, masks = random_crop(pixels, boxes, labels, masks, config)
    low, high = config.resize
    pixels, boxes, masks = rescale(pixels, boxes, masks, config, low + (high - low) * int(torch.randint(11, ())) / 10)
    kept = (boxes[:, 2:] - boxes[:, :2] >= MIN_BOX).all(1)
    return pixels, boxes[kept], labels[kept], masks[kept]


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
    """Samples -> images (N, H, W, 3) uint8, padded, their sizes [(h, w), ...], targets, a dict of boxes, labels, masks
    and has_mask for each."""
    sizes = [image.shape[:2] for image, *_ in samples]
    H, W = (-(-max(sides) // SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes))
    images, targets = torch.zeros(len(samples), H, W, 3, dtype=torch.uint8), []
    for i, (image, boxes, labels, masks, has_mask) in enumerate(samples):
        h, w = sizes[i]
        images[i, :h, :w] = torch.from_numpy(np.ascontiguousarray(image))
        padded = torch.zeros(len(masks), H, W, dtype=torch.bool)
        padded[:, :h, :w] = torch.from_numpy(np.ascontiguousarray(masks))
        boxes = torch.from_numpy(np.ascontiguousarray(boxes, np.float32))
        targets.append({"boxes": boxes, "labels": torch.from_numpy(labels), "masks": padded,
                        "has_mask": torch.from_numpy(has_mask)})
    return images, sizes, targets


class Photographs(Dataset):
    """What is shown to a detector of each photograph.

    Samples: (image (3, H, W) float32, padded; its size (h, w) before; size of the photograph; index; annotations, as
    COCO has them, but with index and class, from 0, as ids, and segmentation None where there is no mask). annotated:
    whether there are annotations at all. shapes: (n,) int64, a number for each padded size. notes: what is to be said.
    """

    def __init__(self, folder, size, limit=None):
        self.folder, self.size, self.category_ids = folder, size, folder.category_ids
        self.annotated, self.notes = folder.annotated, folder.notes
        self.length = min(len(folder), limit or len(folder))
        sides = zip(folder.heights[:self.length].tolist(), folder.widths[:self.length].tolist())
        fitted = [fit_size(H, W, size, size * MAX_RATIO) for H, W in sides]
        self.shapes = np.unique(-(-np.array(fitted) // SIZE_DIVISOR), axis=0, return_inverse=True)[1].reshape(-1)

    def __len__(self):
        return self.length

    def image_id(self, index):
        """As the file has it: a text or a number."""
        return json.loads(self.folder.image_ids[index])

    def __getitem__(self, index):
        pixels = self.folder.pixels(index)
        image, size = resize_and_pad(pixels, self.size)
        annotations = []
        for entry in self.folder.annotations(index):
            code = run_lengths(entry["segmentation"], *pixels.shape[:2])
            annotations.append({"image_id": index, "category_id": entry["category_id"], "bbox": entry["bbox"],
                                "area": entry["area"], "iscrowd": entry["iscrowd"], "segmentation": code})
        return image, size, pixels.shape[:2], index, annotations


def resize_and_pad(pixels, img_size):
    """(H, W, 3) uint8 -> (image (3, H, W) float32 as a detector takes it, padded; its size (h, w) before padding)."""
    size = fit_size(*pixels.shape[:2], img_size, img_size * MAX_RATIO)
    return pad(to_tensor(resize(pixels, size))), size


def pad(image):
    """Zeros right and bottom, up to multiples of 32."""
    return F.pad(image, (0, -image.shape[2] % SIZE_DIVISOR, 0, -image.shape[1] % SIZE_DIVISOR))
