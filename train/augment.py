"""Augmentation for classification: crop, flip, RandAugment, erasing; and what validation does instead."""
import math

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from train.photographs import MEAN, STD

TO_FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
BICUBIC = InterpolationMode.BICUBIC
FILL = [round(255 * mean) for mean in MEAN]  # of what a geometric operation uncovers


class TrainingTransform:
    """PIL image -> ((3, img_size, img_size) float32, matrix): crop, flip, RandAugment, normalisation, erasing.

    matrix, (3, 3), leads from homogeneous coordinates x, y, 1 in the result back to those in the image, both as shares
    of width and height: label maps follow the image through it.
    """

    def __init__(self, config):
        self.size, self.scale, self.flip = config.img_size, config.scale, config.flip
        self.randaugment = RandAugment(config.randaugment, config.randaugment_std) if config.randaugment else None
        self.finish = v2.Compose([*TO_FLOAT, Erasing(config.erasing)])

    def __call__(self, image):
        W, H = image.size
        top, left, height, width = 0, 0, H, W
        if self.scale != (1.0, 1.0):
            top, left, height, width = v1.RandomResizedCrop.get_params(image, self.scale, (3 / 4, 4 / 3))
        image = F.resized_crop(image, top, left, height, width, (self.size, self.size), BICUBIC)
        matrix = np.array([[width / W, 0, left / W], [0, height / H, top / H], [0, 0, 1]])
        if torch.rand(()) < self.flip:
            image = F.horizontal_flip(image)
            matrix = matrix @ [[-1, 0, 1], [0, 1, 0], [0, 0, 1]]
        if self.randaugment:
            image, transform = self.randaugment(image)
            matrix = matrix @ transform
        return self.finish(image), matrix


def validation_transform(img_size, crop_pct):
    """PIL image -> (3, img_size, img_size) float32: the short side resized to img_size / crop_pct, then the centre."""
    return v2.Compose([v2.Resize(math.floor(img_size / crop_pct), BICUBIC), v2.CenterCrop(img_size), *TO_FLOAT])


class RandAugment:
    """RandAugment "m9-mstd0.5-inc1" on PIL images: two operations, each with probability 0.5, at a magnitude from N(9,
    0.5).

    Operations, their ranges, the clipping of magnitudes to 0..10 and the fill colour are those of timm, which the
    published recipe was trained with. One difference remains: timm interpolates bilinearly or bicubically at random,
    here it is always bicubic. Returns (image, matrix), see TrainingTransform; only for a square image the matrix is
    right.
    """

    def __init__(self, magnitude=9.0, std=0.5):
        self.magnitude, self.std = magnitude, std

    def __call__(self, image):
        matrix = np.eye(3)
        for operation in torch.randint(len(OPERATIONS), (2,)).tolist():
            applied, negated, noise = float(torch.rand(())), float(torch.rand(())), float(torch.randn(()))
            if applied < 0.5:
                level = min(max(self.magnitude + self.std * noise, 0.0), 10.0) / 10
                operation, signed = OPERATIONS[operation], -level if negated < 0.5 else level
                image = operation(image, level, signed)
                if isinstance(operation, Affine):
                    matrix = matrix @ operation.matrix(signed, 1, 1)
        return image, matrix


class Affine:
    """An operation that moves pixels.

    linear: signed level -> (2, 2), from the result to the image, about the centre, or else about the top left corner.
    shift: signed level -> by which share of the sides the result is shifted.
    """

    def __init__(self, linear, centred=False, shift=lambda signed: (0.0, 0.0)):
        self.linear, self.centred, self.shift = linear, centred, shift

    def matrix(self, signed, width, height):
        """(3, 3): homogeneous coordinates x, y, 1 in the result -> in the image."""
        sides = np.array([width, height], float)
        linear, fixed = np.array(self.linear(signed), float), sides / 2 * self.centred
        matrix = np.eye(3)
        matrix[:2, :2], matrix[:2, 2] = linear, fixed - linear @ fixed + sides * self.shift(signed)
        return matrix

    def __call__(self, image, level, signed):
        coefficients = self.matrix(signed, *image.size)[:2].flatten().tolist()
        return image.transform(image.size, Image.AFFINE, coefficients, Image.BICUBIC, fillcolor=tuple(FILL))


def _rotation(signed):
    sine, cosine = math.sin(math.radians(30 * signed)), math.cos(math.radians(30 * signed))
    return (cosine, -sine), (sine, cosine)


def _solarize_add(image, level):
    table = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


# (RGB image, level in 0..1, the level with a random sign) -> image; the larger the level, the stronger the change.
OPERATIONS = (
    lambda image, level, signed: F.autocontrast(image),
    lambda image, level, signed: F.equalize(image),
    lambda image, level, signed: F.invert(image),
    Affine(_rotation, centred=True),
    lambda image, level, signed: F.posterize(image, max(1, 4 - int(4 * level))),  # newer Pillow refuses 0 bits, black
    lambda image, level, signed: F.solarize(image, 256 - int(256 * level)),
    lambda image, level, signed: _solarize_add(image, level),
    lambda image, level, signed: F.adjust_saturation(image, 1 + 0.9 * signed),
    lambda image, level, signed: F.adjust_contrast(image, 1 + 0.9 * signed),
    lambda image, level, signed: F.adjust_brightness(image, 1 + 0.9 * signed),
    lambda image, level, signed: F.adjust_sharpness(image, 1 + 0.9 * signed),
    Affine(lambda signed: ((1, 0.3 * signed), (0, 1))),  # shear along x
    Affine(lambda signed: ((1, 0), (0.3 * signed, 1))),  # shear along y
    Affine(lambda signed: np.eye(2), shift=lambda signed: (0.45 * signed, 0)),
    Affine(lambda signed: np.eye(2), shift=lambda signed: (0, 0.45 * signed)),
)


class Erasing:
    """With probability `p` fills a random rectangle, 2% to a third of the image, with a normal deviate per value."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if torch.rand(()) < self.p:
            top, left, height, width, _ = v1.RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])
            image[:, top:top + height, left:left + width] = torch.randn(3, height, width)
        return image


def mix(images, mixup, cutmix, rng):
    """Mixup or cutmix of a batch with its reverse -> (images, weight of the image's own label; its partner's has the
    rest).

    images: (B, 3, H, W). mixup, cutmix: alphas, 0 switches off; with both, half of the batches take either. rng: numpy
    Generator, advanced alike in every case. Sources: arXiv 1710.09412 and 1905.04899; one weight per batch and pairs by
    reversal as timm does.
    """
    use_cutmix = rng.random() < 0.5 if mixup and cutmix else bool(cutmix)
    alpha, centre = (cutmix if use_cutmix else mixup), rng.random(2)
    if not alpha:
        return images, 1.0
    own = rng.beta(alpha, alpha)
    if not use_cutmix:
        return images * own + images.flip(0) * (1 - own), own
    H, W = images.shape[2:]
    half = math.sqrt(1 - own) / 2
    top, bottom = (round(min(max((centre[0] + side) * H, 0), H)) for side in (-half, half))
    left, right = (round(min(max((centre[1] + side) * W, 0), W)) for side in (-half, half))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (H * W)  # the border may have cut the rectangle
