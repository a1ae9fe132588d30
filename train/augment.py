"""Augmentation for classification: crop, flip, RandAugment of images; mixing, erasing of batches; and validation's.

Operations, ranges and probabilities are those of timm 0.4.9, which the published models were trained with.
"""
import math

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch.nn.functional import interpolate
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from train.photographs import MEAN

BICUBIC = InterpolationMode.BICUBIC
LOG_ASPECT = math.log(4 / 3)  # of a crop, at most, and at least its negative
WHOLE = 16  # the long side, in short ones, up to which an image is resized whole
FILL = [round(255 * mean) for mean in MEAN]  # of what a geometric operation uncovers


class TrainingTransform:
    """(PIL image, draws.Draws) -> ((img_size, img_size, 3) uint8, matrix): crop, flip, RandAugment.

    With token labels and crop_last: flip, RandAugment of the whole image, crop, as TokenLabeling does.

    matrix, (3, 3), leads from homogeneous coordinates x, y, 1 in the result back to those in the image, both as shares
    of width and height: label maps follow the image through it. With published_label_crop it exchanges rows and columns
    of the crop, as the published code does; the image's own crop is right.
    """

    def __init__(self, config):
        self.size, self.scale, self.flip = config.img_size, config.scale, config.flip
        self.interpolation, self.exchanged = config.interpolation, config.published_label_crop
        self.steps, self.finish = [self.random_crop, self.random_flip], to_bytes
        if config.randaugment:
            self.steps.append(RandAugment(config.randaugment, config.randaugment_std, config.interpolation))
        if config.token_labels and config.crop_last:
            self.steps = [*self.steps[1:], self.random_crop]

    def __call__(self, image, draws):
        matrix = np.eye(3)
        for step in self.steps:
            image, transform = step(image, draws)
            matrix = matrix @ transform
        return self.finish(image), matrix

    def random_crop(self, image, draws):
        W, H = image.size
        top, left, height, width = 0, 0, H, W
        if self.scale != (1.0, 1.0):
            top, left, height, width = draw_box(H, W, self.scale, draws)
        image = image.crop((left, top, left + width, top + height))
        image = resample(image, self.size, draw_filter(self.interpolation, draws))
        x, y = (width / W, left / W), (height / H, top / H)
        if self.exchanged:
            x, y = y, x
        return image, np.array([[x[0], 0, x[1]], [0, y[0], y[1]], [0, 0, 1]])

    def random_flip(self, image, draws):
        if draws.uniform() < self.flip:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), np.array([[-1, 0, 1], [0, 1, 0], [0, 0, 1]])
        return image, np.eye(3)


def resample(image, size, resampling):
    """image.resize((size, size), resampling) of an RGB PIL image, rows first, in a third of the time.

    torch's weights have fewer bits: of photographs 0.3% of the values differ by one, one of a million by two. (Pillow
    13 takes columns first where they shrink more, and differs by up to 14 then where the first pass saturates; the
    published runs had older ones.)
    """
    mode = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}[resampling]
    pixels = four_bytes(image)[None].permute(0, 3, 1, 2)  # channels last, for which torch has a kernel of its own
    pixels = interpolate(pixels, (size, size), mode=mode, antialias=True)
    return from_four_bytes(pixels[0].permute(1, 2, 0))


def four_bytes(image):
    """RGB PIL image -> (H, W, 4) uint8: as Pillow keeps it, which is taken over sooner than three are packed."""
    return torch.frombuffer(bytearray(image.tobytes("raw", "RGBX")), dtype=torch.uint8).view(*image.size[::-1], 4)


def from_four_bytes(pixels):
    """The reverse."""
    return Image.frombytes("RGB", pixels.shape[1::-1], pixels.numpy(), "raw", "RGBX")


def to_bytes(image):
    """RGB PIL image -> (H, W, 3) uint8."""
    return torch.from_numpy(np.array(image))


def draw_box(H, W, scale, draws):
    """(top, left, height, width) of a random crop, as torchvision's RandomResizedCrop.get_params draws it, number for
    number; scale: shares of the area."""
    for _ in range(10):
        area, aspect = H * W * draws.uniform(*scale), math.exp(draws.uniform(-LOG_ASPECT, LOG_ASPECT))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= W and 0 < height <= H:
            return draws.below(H - height + 1), draws.below(W - width + 1), height, width
    width, height = min(W, round(H * 4 / 3)), min(H, round(W * 4 / 3))  # the centre of what is long
    return (H - height) // 2, (W - width) // 2, height, width


def draw_filter(interpolation, draws):
    """The filter of Pillow for one resize: "bicubic", or with "random" bilinear as often as bicubic."""
    bilinear = interpolation == "random" and draws.uniform() < 0.5
    return Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC


def validation_transform(img_size, crop_pct):
    """PIL image -> (img_size, img_size, 3) uint8: the short side resized to img_size / crop_pct, then the centre."""
    short = math.floor(img_size / crop_pct)

    def resize(image):
        W, H = image.size
        if max(W, H) <= WHOLE * min(W, H):
            return F.resize(image, short, BICUBIC)
        # Of a strip only the centre is made, for all of it might not fit into memory.
        long = int(short * max(W, H) / min(W, H))
        start = round((long - img_size) / 2)
        first, last = (side * max(W, H) / long for side in (start, start + img_size))
        if W > H:
            return image.resize((img_size, short), Image.Resampling.BICUBIC, (first, 0, last, H))
        image = image.resize((short, H), Image.Resampling.BICUBIC)  # rows first, as in the whole
        return image.resize((short, img_size), Image.Resampling.BICUBIC, (0, first, short, last))

    return v2.Compose([resize, v2.CenterCrop(img_size), to_bytes])


class RandAugment:
    """RandAugment "m9-mstd0.5-inc1" on PIL images: two operations, each with probability 0.5, at a magnitude from N(9,
    0.5), clipped to 0..10. What geometric operations uncover is filled with the mean colour. interpolation: see
    draw_filter. Returns (image, matrix), see TrainingTransform.
    """

    def __init__(self, magnitude=9.0, std=0.5, interpolation="bicubic"):
        self.magnitude, self.std, self.interpolation = magnitude, std, interpolation

    def __call__(self, image, draws):
        aspect, matrix = image.width / image.height, np.eye(3)
        for operation in [draws.below(len(OPERATIONS)), draws.below(len(OPERATIONS))]:
            applied, negated, noise = draws.uniform(), draws.uniform(), draws.normal()
            if applied < 0.5:
                level = min(max(self.magnitude + self.std * noise, 0.0), 10.0) / 10
                operation, signed = OPERATIONS[operation], -level if negated < 0.5 else level
                if isinstance(operation, Affine):
                    image = operation(image, level, signed, draw_filter(self.interpolation, draws))
                    # In shares of the sides: x counts in heights while an operation computes, in widths before and
                    # after.
                    from_shares, to_shares = np.diag([aspect, 1, 1]), np.diag([1 / aspect, 1, 1])
                    matrix = matrix @ to_shares @ operation.matrix(signed, aspect, 1) @ from_shares
                else:
                    image = operation(image, level, signed)
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

    def __call__(self, image, level, signed, resampling=Image.Resampling.BICUBIC):
        matrix = self.matrix(signed, *image.size)
        if matrix[1].tolist() == [0, 1, 0]:
            return slide(image, matrix[0, 1], matrix[0, 2], 1, resampling)
        if matrix[0].tolist() == [1, 0, 0]:
            return slide(image, matrix[1, 0], matrix[1, 2], 0, resampling)
        coefficients = matrix[:2].flatten().tolist()
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, resampling, fillcolor=tuple(FILL))


def slide(image, slope, offset, axis, resampling):
    """What Image.transform makes of an RGB PIL image whose lines move along themselves, sooner: with a bicubic filter
    in half of the time or less. A line (row for axis 1, column for 0) at y shows at x what was at x + slope * y +
    offset, pixel centres at halves.

    Of a hundred thousand values a few differ by one: Pillow's sums are float64.
    """
    pixels = four_bytes(image)
    packed = pixels.view(torch.int32)[..., 0]  # (H, W), a pixel each
    length, lines = packed.shape[axis], packed.shape[1 - axis]
    moved = slope * (torch.arange(lines, dtype=torch.float64) + 0.5) + offset
    whole = moved.floor()
    d = (moved - whole).float()
    d = d[:, None] if axis else d.repeat_interleave(4)
    places = torch.arange(-1, length + 2).unsqueeze(1 - axis) + whole.long().unsqueeze(axis)
    # Of each line the pixels and one more before, two behind: (H, W * 4), longer along the axis.
    taps = packed.gather(axis, places.clamp_(0, length - 1)).view(torch.uint8).float()
    step = 4 if axis else 1
    rises = taps.narrow(axis, step, (length + 2) * step) - taps.narrow(axis, 0, (length + 2) * step)
    tap = lambda k, x: x.narrow(axis, k * step, length * step)
    result = torch.addcmul(tap(1, taps), tap(1, rises), d)
    if resampling == Image.Resampling.BICUBIC:  # a cubic of slope -1, as in Pillow's transform, not its resize
        result.addcmul_(tap(0, rises), d * (1 - d) ** 2).addcmul_(tap(2, rises), d * d * (d - 1))
    result = result.clamp_(0, 255).numpy().astype(np.uint8).view(np.int32)  # sooner than torch
    first = -(moved + 0.5).floor().numpy()  # of each line, with a pixel there to show
    place, first = np.arange(length), np.expand_dims(first, axis)
    place = np.expand_dims(place, 1 - axis)
    shows = (place >= first) & (place < first + length)
    result = np.where(shows, result, np.array([*FILL, 255], np.uint8).view(np.int32))
    return Image.frombytes("RGB", image.size, result, "raw", "RGBX")


def _rotation(signed):
    sine, cosine = math.sin(math.radians(30 * signed)), math.cos(math.radians(30 * signed))
    return (cosine, -sine), (sine, cosine)


def _posterize(image, bits):
    """Pillow's, which today refuses 0 bits; the published runs got black from it."""
    return image.point([value & 256 - 2 ** (8 - bits) for value in range(256)] * 3)


def _solarize_add(image, level):
    table = [min(255, value + int(110 * level)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


# (RGB image, level in 0..1, the level with a random sign) -> image; the larger the level, the stronger the change.
OPERATIONS = (
    lambda image, level, signed: ImageOps.autocontrast(image),
    lambda image, level, signed: ImageOps.equalize(image),
    lambda image, level, signed: ImageOps.invert(image),
    Affine(_rotation, centred=True),
    lambda image, level, signed: _posterize(image, 4 - int(4 * level)),
    lambda image, level, signed: ImageOps.solarize(image, 256 - int(256 * level)),
    lambda image, level, signed: _solarize_add(image, level),
    lambda image, level, signed: ImageEnhance.Color(image).enhance(1 + 0.9 * signed),
    lambda image, level, signed: ImageEnhance.Contrast(image).enhance(1 + 0.9 * signed),
    lambda image, level, signed: ImageEnhance.Brightness(image).enhance(1 + 0.9 * signed),
    lambda image, level, signed: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * signed),
    Affine(lambda signed: ((1, 0.3 * signed), (0, 1))),  # shear along x
    Affine(lambda signed: ((1, 0), (0.3 * signed, 1))),  # shear along y
    Affine(lambda signed: np.eye(2), shift=lambda signed: (0.45 * signed, 0)),
    Affine(lambda signed: np.eye(2), shift=lambda signed: (0, 0.45 * signed)),
)


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


def erase(images, probability, rng):
    """Random erasing: each image loses with `probability` a rectangle, 2% to a third of it, to noise, one normal
    deviate per value -> a copy of the batch.

    images: (B, C, H, W), mixed and normalised. rng: numpy Generator; the noise is drawn on the images' device. Sources:
    arXiv 1708.04896; timm's mode "pixel", whose rectangles are smaller than the image along both sides, and which gives
    an image up after ten that are not.
    """
    B, C, H, W = images.shape
    images = images.clone()
    generator = torch.Generator(images.device).manual_seed(int(rng.integers(2 ** 63)))
    for b in range(B):
        if rng.random() >= probability:
            continue
        for _ in range(10):
            area, aspect = rng.uniform(0.02, 1 / 3) * H * W, math.exp(rng.uniform(math.log(0.3), -math.log(0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < H and w < W:
                top, left = rng.integers(H - h + 1), rng.integers(W - w + 1)
                images[b, :, top:top + h, left:left + w] = torch.randn(
                    C, h, w, generator=generator, device=images.device, dtype=images.dtype)
                break
    return images
