"""Images and labels for training and evaluation.

Nothing here depends on the number of workers or ranks, nor on where a run was interrupted: what happens to a sample is a function of
(seed, epoch, index), the order of an epoch one of (seed, epoch).
"""
import math
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as F

from train import scenes
from train.tokens import TokenLabels

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; what published weights expect
TO_FLOAT = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
BICUBIC = InterpolationMode.BICUBIC
FILL = [round(255 * mean) for mean in MEAN]  # of what a geometric augmentation uncovers
SCENES, HELD_OUT_SCENES = 2048, 512  # rendered scenes per epoch, and for validation


def seed_of(*numbers):
    """One 63-bit seed from several numbers; neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def with_generator(seeds, function, *arguments):
    """function(*arguments) with torch's global generator seeded, which in the main process also drives stochastic depth: it is put back."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed_of(*seeds))
    try:
        return function(*arguments)
    finally:
        torch.set_rng_state(state)


class Augmented(Dataset):
    """Photographs for training. Samples have keys (epoch, index): their augmentation depends on these and the seed, on nothing else.

    They are (image, label), or with `token_labels`, a train.tokens.TokenLabels, (image, label, label map, place): see
    TrainingTransform for the place.
    """

    def __init__(self, images, transform, seed, token_labels=None):
        self.images, self.transform, self.seed, self.token_labels = images, transform, seed, token_labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.images[index]
        image, place = with_generator((self.seed, epoch, index), self.transform, image)
        if self.token_labels is None:
            return image, label
        return image, label, self.token_labels[index], torch.tensor(place, dtype=torch.float32)


class Scenes(Dataset):
    """Rendered scenes of one object as float images (3, size, size). Every epoch of training draws new ones, so there is nothing to augment.

    Keys: (epoch, index) for training, index for the held-out scenes. Drawing costs far less than training, so nothing is kept.
    """
    classes = list(scenes.CLASSES)
    max_objects = 1

    def __init__(self, length, size, seed, held_out=False):
        self.length, self.size, self.seed, self.held_out = length, size, seed, held_out

    def __len__(self):
        return self.length

    def draw(self, key):
        epoch, index = (0, key) if self.held_out else key
        return scenes.draw(self.held_out * scenes.HELD_OUT + epoch * self.length + index, self.seed, self.size, self.max_objects)

    def __getitem__(self, key):
        scene = self.draw(key)
        return to_tensor(scene.image), scene.label


class ShareSampler:
    """Keys (epoch, index) of one rank: step s takes images s * batch_size on of the epoch's permutation, each rank its share of them.

    Yields one list per backward pass. The images left over at the end of an epoch are not used in it. groups: a number for each image;
    what a rank takes in one pass is then of one group, except for a few remainders at the end.
    """

    def __init__(self, length, batch_size, accumulate, seed, rank, world, groups=None):
        self.length, self.batch_size, self.accumulate, self.seed, self.rank, self.world = length, batch_size, accumulate, seed, rank, world
        self.groups, self.epoch = groups, 0

    def __len__(self):
        return self.length // self.batch_size * self.accumulate

    def __iter__(self):
        rng = np.random.default_rng((self.seed, self.epoch))
        order = rng.permutation(self.length)
        micro = self.batch_size // self.accumulate
        share = micro // self.world
        if self.groups is not None:
            order = in_groups(order, np.asarray(self.groups)[order], share, rng)
        order = order.tolist()
        for start in range(0, len(self) * micro, micro):
            first = start + self.rank * share
            yield [(self.epoch, index) for index in order[first:first + share]]


def in_groups(order, groups, share, rng):
    """`order` (n,) so rearranged that each `share` of it is of one group; what of a group is left over comes last."""
    chunks, rest = [], []
    for group in np.unique(groups):
        members = order[groups == group]
        whole = len(members) // share * share
        chunks += list(members[:whole].reshape(-1, share))
        rest.append(members[whole:])
    return np.concatenate([chunks[i] for i in rng.permutation(len(chunks))] + rest)


class RandAugment:
    """RandAugment "m9-mstd0.5-inc1" on PIL images: two operations, each applied with probability 0.5 at a magnitude from N(9, 0.5).

    Operations, their ranges, the clipping of magnitudes to 0..10 and the fill colour are those of timm, which the published recipe
    was trained with. One difference remains: timm interpolates bilinearly or bicubically at random, here it is always bicubic.
    Returns (image, place), see TrainingTransform; the image has to be square for the place to be right.
    """

    def __init__(self, magnitude=9.0, std=0.5):
        self.magnitude, self.std = magnitude, std

    def __call__(self, image):
        place = np.eye(3)
        for operation in torch.randint(len(OPERATIONS), (2,)).tolist():
            applied, negated, noise = float(torch.rand(())), float(torch.rand(())), float(torch.randn(()))
            if applied < 0.5:
                level = min(max(self.magnitude + self.std * noise, 0.0), 10.0) / 10
                operation, signed = OPERATIONS[operation], -level if negated < 0.5 else level
                image = operation(image, level, signed)
                if isinstance(operation, Geometric):
                    place = place @ operation.place(signed, 1, 1)
        return image, place


class Geometric:
    """An operation that moves pixels. `matrix`: signed level -> (2, 2), from the result to the image, about the centre or else the
    top left corner; `shift`: the share of the sides by which the place moves then."""

    def __init__(self, matrix, centred=False, shift=lambda signed: (0.0, 0.0)):
        self.matrix, self.centred, self.shift = matrix, centred, shift

    def place(self, signed, width, height):
        """(3, 3): homogeneous coordinates x, y in the result -> in the image."""
        sides = np.array([width, height], float)
        matrix, fixed = np.array(self.matrix(signed), float), sides / 2 * self.centred
        place = np.eye(3)
        place[:2, :2], place[:2, 2] = matrix, fixed - matrix @ fixed + sides * self.shift(signed)
        return place

    def __call__(self, image, level, signed):
        return image.transform(image.size, Image.AFFINE, self.place(signed, *image.size)[:2].flatten().tolist(), Image.BICUBIC,
                               fillcolor=tuple(FILL))


def _rotation(signed):
    sine, cosine = math.sin(math.radians(30 * signed)), math.cos(math.radians(30 * signed))
    return (cosine, -sine), (sine, cosine)


def _solarize_add(image, level):
    return image.point([min(255, value + int(110 * level)) if value < 128 else value for value in range(256)] * 3)


# (RGB image, level in 0..1, the level with a random sign) -> image; the larger the level, the stronger the change.
OPERATIONS = (
    lambda image, level, signed: F.autocontrast(image),
    lambda image, level, signed: F.equalize(image),
    lambda image, level, signed: F.invert(image),
    Geometric(_rotation, centred=True),
    lambda image, level, signed: F.posterize(image, max(1, 4 - int(4 * level))),  # newer Pillow refuses 0 bits, black
    lambda image, level, signed: F.solarize(image, 256 - int(256 * level)),
    lambda image, level, signed: _solarize_add(image, level),
    lambda image, level, signed: F.adjust_saturation(image, 1 + 0.9 * signed),
    lambda image, level, signed: F.adjust_contrast(image, 1 + 0.9 * signed),
    lambda image, level, signed: F.adjust_brightness(image, 1 + 0.9 * signed),
    lambda image, level, signed: F.adjust_sharpness(image, 1 + 0.9 * signed),
    Geometric(lambda signed: ((1, 0.3 * signed), (0, 1))),
    Geometric(lambda signed: ((1, 0), (0.3 * signed, 1))),
    Geometric(lambda signed: np.eye(2), shift=lambda signed: (0.45 * signed, 0)),
    Geometric(lambda signed: np.eye(2), shift=lambda signed: (0, 0.45 * signed)),
)


class TrainingTransform:
    """PIL image -> ((3, img_size, img_size) float32, place): crop, flip, RandAugment, normalisation, erasing, as the Config says.

    place, (3, 3), leads from homogeneous coordinates in the result back to those in the image, both as shares of width and height.
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
        place = np.array([[width / W, 0, left / W], [0, height / H, top / H], [0, 0, 1]])
        if torch.rand(()) < self.flip:
            image = F.horizontal_flip(image)
            place = place @ [[-1, 0, 1], [0, 1, 0], [0, 0, 1]]
        if self.randaugment:
            image, moved = self.randaugment(image)
            place = place @ moved
        return self.finish(image), place


def validation_transform(img_size, crop_pct):
    """PIL image -> (3, img_size, img_size) float32: the short side resized to img_size / crop_pct, then the centre."""
    return v2.Compose([v2.Resize(math.floor(img_size / crop_pct), BICUBIC), v2.CenterCrop(img_size), *TO_FLOAT])


class Erasing:
    """Replaces a random rectangle, 2 to a third of the image's area, by one normal deviate per pixel, with probability `p`."""

    def __init__(self, p):
        self.p = p

    def __call__(self, image):
        if torch.rand(()) < self.p:
            top, left, height, width, _ = v1.RandomErasing.get_params(image, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])
            image[:, top:top + height, left:left + width] = torch.randn(3, height, width)
        return image


def mix(images, mixup, cutmix, rng):
    """Mixup or cutmix of a batch with its reverse -> (images, weight of the image's own label; the reverse's has the rest).

    images: (B, 3, H, W). mixup, cutmix: alphas, 0 switches off; with both, half of the batches take either. rng: numpy Generator,
    advanced alike in every case. Sources: arXiv 1710.09412 and 1905.04899; one weight per batch and pairs by reversal as timm does.
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


def datasets(config):
    """(training Dataset with keys (epoch, index), validation Dataset, names of the classes) of a Config.

    Raises FileNotFoundError or ValueError when the folder does not hold what it should.
    """
    if config.data is None:
        return Scenes(config.limit or SCENES, config.img_size, config.seed), held_out_scenes(config), Scenes.classes
    train = image_folder(_split(config.data, "train"))
    val = image_folder(_split(config.data, "val", "test"), validation_transform(config.img_size, config.crop_pct))
    if train.classes != val.classes:
        missing, extra = sorted(set(train.classes) - set(val.classes)), sorted(set(val.classes) - set(train.classes))
        raise ValueError(f"the classes of {train.root} and {val.root} differ; expected the same folders in both. Missing in {val.root}: "
                         f"{missing[:5]}, missing in {train.root}: {extra[:5]}")
    train_images = balanced(train, config.limit)
    labels = TokenLabels(config.token_labels, train, train_images) if config.token_labels else None
    return Augmented(train_images, TrainingTransform(config), config.seed, labels), balanced(val, config.val_limit), train.classes


def held_out_scenes(config):
    return Scenes(config.val_limit or HELD_OUT_SCENES, config.img_size, config.seed, held_out=True)


def image_folder(root, transform=None):
    """torchvision's ImageFolder, with errors that say what is wrong with `root` or with a file in it."""
    try:
        return ImageFolder(root, transform, loader=load_image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root}: {error}. Expected one folder per class with images inside") from error


def load_image(path):
    """A photograph as an RGB PIL image."""
    try:
        return default_loader(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or delete the file") from error


def fitted(H, W, short, long):
    """(h, w), of the same shape as (H, W), as large as a short side of `short` and a long side of `long` allow."""
    factor = min(int(long) / max(H, W), int(short) / min(H, W))
    return max(1, math.floor(H * factor + 0.5)), max(1, math.floor(W * factor + 0.5))


def resized(pixels, shape):
    """(H, W, 3) uint8 -> (h, w, 3) uint8: bilinear, without low-pass filter and rounded, as OpenCV has it, which published dense models saw."""
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float()
    return interpolate(image, tuple(shape), mode="bilinear")[0].round().permute(1, 2, 0).byte().numpy()


def to_tensor(pixels):
    """(H, W, 3), 0 to 255 -> (3, H, W) float32, normalised."""
    return torch.from_numpy(((pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)).transpose(2, 0, 1).astype(np.float32)).contiguous()


def _split(data, *names):
    if not Path(data).is_dir():
        raise FileNotFoundError(f"--data {data}: no such folder; expected one with train/ and val/ or test/")
    for name in names:
        if (Path(data) / name).is_dir():
            return str(Path(data) / name)
    raise FileNotFoundError(f"--data {data} has no {' or '.join(name + '/' for name in names)}; it holds {sorted(os.listdir(data))[:8]}")


def evaluation_folder(data):
    """DIR/val or DIR/test."""
    return _split(data, "val", "test")


def balanced(images, limit):
    """The first `limit` images when classes take turns, or all of them."""
    if limit is None or limit >= len(images):
        return images
    turn = {}  # class -> how many of it came before
    order = []
    for index, label in enumerate(images.targets):
        turn[label] = turn.get(label, -1) + 1
        order.append((turn[label], label, index))
    return Subset(images, sorted(index for _, _, index in sorted(order)[:limit]))


def training_loader(dataset, config, rank, world, workers):
    sampler = ShareSampler(len(dataset), config.batch_size, config.accumulate, config.seed, rank, world, getattr(dataset, "groups", None))
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=getattr(dataset, "collate", None), num_workers=workers,
                      pin_memory=torch.cuda.is_available(), persistent_workers=workers > 0)


def validation_loader(dataset, batch_size, rank, world, workers):
    """Every image once over all ranks: rank r takes images r, r + world, ..., so that shares may differ in length by one."""
    return DataLoader(Subset(dataset, range(rank, len(dataset), world)), batch_size, num_workers=workers,
                      pin_memory=torch.cuda.is_available())


def default_workers(config):
    """None for scenes, which draw in a millisecond or two; else the cores of the machine shared among its ranks, at most 8."""
    return 0 if config.data is None else min(8, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
