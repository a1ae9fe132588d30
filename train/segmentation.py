"""The task of semantic segmentation: ADE20K's folders or rendered scenes, and what is minimised.

Augmentation and loss are those of the published configurations (mmsegmentation 0.11's for ADE20K).
"""
import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset

from models.precision import widened
from train import data, scenes
from train.ade_folder import IGNORED, AdeFolder, label_map_size, named_classes
from train.device import autocast, clear_padding
from train.photographs import fit_size, resize, to_tensor

ADE20K_CLASSES = 150


def datasets(config):
    """(training Dataset with keys (epoch, index), validation Dataset, names of the classes) of a Config.

    Raises FileNotFoundError or ValueError when the folder does not hold what it should.
    """
    classes = class_names(config)
    if config.data is None:
        return Scenes.of(config), validation_set(config, classes), classes
    training = AugmentedPhotographs(_photographs(config, "training", classes, config.limit), config)
    return training, validation_set(config, classes), classes


def validation_set(config, classes, ratios=(1.0,), flip=False):
    """Dataset for evaluation at the published size: the short side img_size, the long one at most 4 times that.

    Samples: see Views.
    """
    if config.data is None:
        return Scenes.of(config, validation=True)
    return Views(_photographs(config, "validation", classes, config.val_limit), config.img_size, ratios, flip)


def loss(model, batch, config, seed):
    """Cross-entropy of the logits plus auxiliary_weight times that of the auxiliary ones: a scalar.

    batch: (images, labels, sizes), see collate. seed: not used.
    """
    images, labels, sizes = batch
    clear_padding(images, sizes)
    with autocast(images.device, config.amp):
        logits, auxiliary = model(images)
    return pixel_cross_entropy(logits, labels) + config.auxiliary_weight * pixel_cross_entropy(auxiliary, labels)


def pixel_cross_entropy(logits, labels):
    """logits (B, C, H, W), labels (B, H, W) int64.

    As published the mean is over all pixels: ignored ones count, with a loss of 0.
    """
    return F.cross_entropy(widened(logits), labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


class Scenes(data.Scenes):
    """Rendered scenes with their label maps; background is a class.

    Training: as AugmentedPhotographs. Validation: as Views.
    """
    classes = ["background", *scenes.CLASSES]

    def __getitem__(self, key):
        scene = self.draw(key)
        labels = torch.from_numpy(scene.label_map.astype(np.int64))
        if self.validation:
            return [(to_tensor(scene.image), False)], labels, f"scene{key}"
        return torch.from_numpy(scene.image), labels, (self.size, self.size)

    def collate(self, samples):
        return collate(samples)


def _photographs(config, split, classes, limit):
    files = AdeFolder(config, split, classes)
    if limit is None or limit >= len(files):
        return files
    first = Subset(files, range(limit))
    first.notes = files.notes
    return first


def class_names(config):
    """Names of the classes, in order of their labels: those of ade_folder.named_classes, else as many as num_classes
    says, else ADE20K's 150, called by their numbers.
    """
    if config.data is None:
        return Scenes.classes
    names = named_classes(config.data)
    return names or [str(number) for number in range(1, (config.num_classes or ADE20K_CLASSES) + 1)]


class AugmentedPhotographs(Dataset):
    """Photographs and label maps for training, keys (epoch, index): see augment."""

    def __init__(self, photographs, config):
        self.photographs, self.config, self.notes = photographs, config, photographs.notes

    def __len__(self):
        return len(self.photographs)

    def name(self, index):
        """The file of a photograph, for errors."""
        return str(getattr(self.photographs, "dataset", self.photographs).files[index][0])  # a Subset has the first

    def __getitem__(self, key):
        epoch, index = key
        pixels, labels, _ = self.photographs[index]
        return data.with_generator((self.config.seed, epoch, index), augment, pixels, labels, self.config)

    def collate(self, samples):
        return collate(samples)


def collate(samples):
    """[(image, labels, size), ...] -> images (B, H, W, 3) uint8, labels (B, H, W) int64, sizes [(h, w), ...]."""
    images, labels, sizes = zip(*samples)
    return torch.stack(images), torch.stack(labels), list(sizes)


def augment(pixels, labels, config):
    """Resize by a random ratio, crop, flip, distort colours, pad.

    -> (image (size, size, 3) uint8, labels (size, size) int64, (h, w) before padding)
    """
    size = config.img_size
    low, high = config.resize
    ratio = low + (high - low) * float(torch.rand(()))
    H, W = fit_size(*labels.shape, size * ratio, 4 * size * ratio)
    pixels = resize(pixels, (H, W))
    labels = F.interpolate(torch.from_numpy(labels)[None, None], (H, W), mode="nearest")[0, 0]
    for _ in range(11):  # a crop nearly all of one class teaches little; the eleventh is taken as it comes
        top, left = int(torch.randint(max(1, H - size + 1), ())), int(torch.randint(max(1, W - size + 1), ()))
        crop = labels[top:top + size, left:left + size]
        counts = torch.bincount(crop.flatten(), minlength=256)[:IGNORED]
        if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
            break
    pixels = pixels[top:top + size, left:left + size]
    if torch.rand(()) < config.flip:
        pixels, crop = pixels[:, ::-1], crop.flip(1)
    image = torch.from_numpy(np.ascontiguousarray(distort(pixels, *draw_distortion())))
    padding = (0, size - crop.shape[1], 0, size - crop.shape[0])
    return F.pad(image, (0, 0, *padding)), F.pad(crop, padding, value=IGNORED).long(), tuple(crop.shape)


def draw_distortion():
    """(brightness, contrast, whether that comes early, saturation, hue): each with probability 0.5, else None."""
    def drawn(low, high):
        return low + (high - low) * float(torch.rand(())) if torch.rand(()) < 0.5 else None

    brightness, contrast, early = drawn(-32, 32), drawn(0.5, 1.5), bool(torch.rand(()) < 0.5)
    saturation, hue = drawn(0.5, 1.5), int(torch.randint(-18, 18, ())) if torch.rand(()) < 0.5 else None
    return brightness, contrast, early, saturation, hue


def distort(pixels, brightness=None, contrast=None, early=False, saturation=None, hue=None):
    """Colours changed as mmsegmentation's PhotoMetricDistortion does: bytes + brightness; bytes * contrast, before
    (early) or after the others; of HSV, S * saturation and H + hue, in steps of two degrees.

    (H, W, 3) uint8 -> the same. Every step clips and truncates to bytes.
    """
    if brightness is not None:
        pixels = _scale(pixels, 1, brightness)
    if contrast is not None and early:
        pixels = _scale(pixels, contrast)
    if saturation is not None:
        H, S, V = to_hsv(pixels)
        pixels = to_rgb(H, _scale(S, saturation), V)
    if hue is not None:
        H, S, V = to_hsv(pixels)
        pixels = to_rgb((H + hue) % 180, S, V)
    return _scale(pixels, contrast) if contrast is not None and not early else pixels


def _scale(values, factor, offset=0.0):
    table = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    return np.clip(table, 0, 255).astype(np.uint8)[values]


def to_hsv(pixels):
    """(H, W, 3) uint8 -> hue in steps of two degrees, 0 to 179, saturation and value, 0 to 255: (H, W) int32 each.

    The fixed-point arithmetic of OpenCV's 8-bit HSV.
    """
    red, green, blue = pixels.transpose(2, 0, 1).astype(np.int32)
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    divisors = np.arange(256).clip(1)
    saturation = (chroma * np.rint(255 * 4096 / divisors).astype(np.int32)[value] + 2048) >> 12
    turn = np.where(value == red, green - blue, np.where(value == green, blue - red + 2 * chroma,
                                                         red - green + 4 * chroma))  # in chromas, 6 are a circle
    hue = (turn * np.rint(30 * 4096 / divisors).astype(np.int32)[chroma] + 2048) >> 12
    return hue % 180, saturation, value


def to_rgb(hue, saturation, value):
    """The reverse of to_hsv, truncated to bytes as OpenCV's: (H, W, 3) uint8. The largest channel is the value."""
    turn, saturation, value = hue.astype(np.float32) / 30, saturation / np.float32(255), value.astype(np.float32)
    pixels = np.empty((*hue.shape, 3), np.uint8)
    for channel, peak in enumerate((0, 2, 4)):  # full for a sixth of the circle to both sides, low from two sixths on
        away = np.abs(turn - peak)
        low = (np.minimum(away, 6 - away) - 1).clip(0, 1)
        pixels[..., channel] = value * (1 - saturation * low)
    return pixels


class Views(Dataset):
    """What is shown to a segmenter of each photograph.

    Samples: ([(image (3, h, w) float32, whether mirrored), ...], labels (H, W) int64, name). shapes: (n,) int64, a
    number for each list of the views' sizes; reads the head of every label map.
    """

    def __init__(self, photographs, size, ratios, flip):
        self.photographs, self.size, self.ratios, self.flip = photographs, size, ratios, flip
        self.notes = photographs.notes

    @functools.cached_property
    def shapes(self):
        files = getattr(self.photographs, "dataset", self.photographs).files[:len(self)]  # a Subset has the first
        sizes = [[fit_size(*label_map_size(path), self.size * ratio, 4 * self.size * ratio) for ratio in self.ratios]
                 for _, path, _ in files]
        return np.unique(np.array(sizes).reshape(len(sizes), -1), axis=0, return_inverse=True)[1].reshape(-1)

    def __len__(self):
        return len(self.photographs)

    def __getitem__(self, index):
        pixels, labels, name = self.photographs[index]
        return views(pixels, self.size, self.ratios, self.flip), torch.from_numpy(labels.astype(np.int64)), name


def views(pixels, size, ratios=(1.0,), flip=False):
    """[(image (3, h, w) float32, whether mirrored), ...] of a photograph (H, W, 3) uint8: each ratio plain, then
    mirrored if `flip`."""
    images = []
    for ratio in ratios:
        image = to_tensor(resize(pixels, fit_size(*pixels.shape[:2], size * ratio, 4 * size * ratio)))
        images += [(image, False), (image.flip(2), True)] if flip else [(image, False)]
    return images
