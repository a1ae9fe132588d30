"""The task of classification: folders of images or rendered scenes, and what is minimised."""
import os
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset, Subset
from torchvision.datasets import ImageFolder

from models.precision import widened
from train import data, scenes
from train.augment import TrainingTransform, erase, mix, validation_transform
from train.config import RECORDS
from train.device import autocast
from train.draws import Draws
from train.hub_data import HubImages
from train.layout import photographs_of, scarce, suffixes, validation_part
from train.photographs import left_out, load_image
from train.shards import Shards
from train.tokens import TokenLabels, dense_targets, draw_swap


def datasets(config):
    """(training Dataset with keys (epoch, index), validation Dataset, names of the classes) of a Config.

    Raises FileNotFoundError or ValueError when the folder does not hold what it should.
    """
    if config.data is None:
        return Scenes.of(config), Scenes.of(config, validation=True), Scenes.classes
    train = source(config, training=True)
    val = validation_folder(config)
    if train.classes != val.classes:
        missing, extra = sorted(set(train.classes) - set(val.classes)), sorted(set(val.classes) - set(train.classes))
        raise ValueError(f"the classes of {train.root} and {val.root} differ; expected the same folders in both. "
                         f"Missing in {val.root}: {missing[:5]}, missing in {train.root}: {extra[:5]}")
    train_images = balanced(train, config.limit)
    labels = TokenLabels(config.token_labels, train, train_images) if config.token_labels else None
    training = AugmentedPhotographs(train_images, TrainingTransform(config), config.seed, labels)
    training.notes = train.notes + scarce(Counter(train.classes[label] for label in train.targets))
    return training, balanced(val, config.val_limit), train.classes


def validation_folder(config):
    """The photographs of --data for validation, ready to be evaluated."""
    return source(config, False, validation_transform(config.img_size, config.crop_pct))


def source(config, training, transform=None):
    """The photographs of --data for training or for validation: a PhotographFolder or records.Records."""
    kind, _, place = config.data.partition(":")
    if kind in RECORDS:
        return {"hf": HubImages, "wds": Shards}[kind](place, training, transform)
    return image_folder(config.data, training, transform)


def loss(model, batch, config, seed):
    """Loss of one pass, a scalar.

    batch: (images, labels), with token labels (images, labels, label maps, matrices). seed: for numpy's default_rng.
    """
    images, labels, *label_maps = batch
    own = 1.0
    if config.mixup or config.cutmix or config.erasing or config.mix_token:
        rng = np.random.default_rng(seed)
        images, own = mix(images, config.mixup, config.cutmix, rng)
    if config.erasing:  # after mixing, as published: noise is of full strength, and not shared with the partner
        images = erase(images, config.erasing, rng)
    inputs = [images]
    if config.mix_token:
        plain = getattr(model, "module", model)  # of DistributedDataParallel
        grid = plain.token_grid(*images.shape[2:])
        swap, own = draw_swap(rng, config.mix_token, *grid)
        inputs.append(swap.to(images.device, non_blocking=True))
    with autocast(images.device, config.amp):
        out = model(*inputs)
    if not isinstance(out, tuple):
        return mixed_cross_entropy(widened(out), labels, own, config.label_smoothing)
    logits, token_logits = (widened(part) for part in out)
    targets = None
    if label_maps:
        targets = dense_targets(*label_maps, labels, *token_logits.shape[1:], config.label_smoothing,
                                config.ground_truth)
    return token_cross_entropy(logits, token_logits, labels, targets, own, config.label_smoothing, config.dense_weight)


def mixed_cross_entropy(logits, labels, own, label_smoothing):
    """Cross-entropy against `own` of the image's label and the rest of its partner's, see augment.mix.

    logits (B, C), labels (B,).
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if own == 1:
        return loss
    return own * loss + (1 - own) * F.cross_entropy(logits, labels.flip(0), label_smoothing=label_smoothing)


def token_cross_entropy(logits, token_logits, labels, targets, own, label_smoothing, dense_weight):
    """Loss of the class token plus dense_weight times that of the tokens. Source: Jiang et al., arXiv 2104.10858.

    logits: (B, C). token_logits: (B, h, w, C), those that come from one image together, as VOLO returns them. own:
    share of an image's own tokens behind its class token, see tokens.draw_swap. targets: (class targets (B, C), token
    targets (B, h, w, C)) of tokens.dense_targets, or None: the label (B,) of an image is that of its tokens.
    """
    tokens = token_logits.flatten(0, 2)
    if targets is None:
        spread = labels[:, None, None].expand(token_logits.shape[:3]).flatten()
        return mixed_cross_entropy(logits, labels, own, label_smoothing) \
            + dense_weight * F.cross_entropy(tokens, spread, label_smoothing=label_smoothing)
    class_targets, token_targets = targets
    mixed = own * class_targets + (1 - own) * class_targets.flip(0)
    return F.cross_entropy(logits, mixed) + dense_weight * F.cross_entropy(tokens, token_targets.flatten(0, 2))


class Scenes(data.Scenes):
    """Rendered scenes of one object: (image (size, size, 3) uint8, label)."""
    classes = list(scenes.CLASSES)
    max_objects = 1

    def __getitem__(self, key):
        scene = self.draw(key)
        return torch.from_numpy(scene.image), scene.label


class AugmentedPhotographs(Dataset):
    """Photographs for training; keys (epoch, index): their augmentation depends on these and the seed, on nothing else.

    Samples are (image (img_size, img_size, 3) uint8, label), or with `token_labels`, a tokens.TokenLabels, (image,
    label, label map, matrix): see augment.TrainingTransform for the matrix, device.to_device for the bytes.
    """

    def __init__(self, images, transform, seed, token_labels=None):
        self.images, self.transform, self.seed, self.token_labels = images, transform, seed, token_labels

    def __len__(self):
        return len(self.images)

    def name(self, index):
        """The file or record of an image, for errors."""
        images = self.images
        if isinstance(images, Subset):
            images, index = images.dataset, images.indices[index]
        return images.name(index)

    def __getitem__(self, key):
        epoch, index = key
        image, label = self.images[index]
        image, matrix = self.transform(image, Draws(data.seed_of(self.seed, epoch, index)))
        if self.token_labels is None:
            return image, label
        return image, label, self.token_labels[index], torch.tensor(matrix, dtype=torch.float32)


class PhotographFolder(ImageFolder):
    """torchvision's ImageFolder of what Pillow reads: a folder for each class, photographs in it at any depth. A name
    that begins with a dot is neither. notes: see train.run_folder."""

    def __init__(self, root, transform=None):
        others, hidden, known = [], f"{os.sep}.", suffixes()

        def is_photograph(path):
            if hidden in path[len(root):]:
                return False
            if os.path.splitext(path)[1].lower() in known:
                return True
            others.append(path)
            return False

        super().__init__(root, transform, loader=load_image, is_valid_file=is_photograph)
        self.notes = left_out(others)
        # As UTF-8, whatever the locale takes them for: a checkpoint is known by them everywhere.
        self.classes = [os.fsencode(name).decode("utf-8", "surrogateescape") for name in self.classes]

    def name(self, index):
        """The file of a photograph."""
        return self.samples[index][0]

    def find_classes(self, directory):
        names = sorted(entry.name for entry in os.scandir(directory) if entry.is_dir() and entry.name[0] != ".")
        if not names:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return names, {name: label for label, name in enumerate(names)}


def image_folder(data, training, transform=None):
    """A PhotographFolder of the photographs of --data for training or for validation; errors say what is wrong."""
    root, both = photographs_of(data, "classification", training)
    try:
        folder = PhotographFolder(root, transform)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{root}: {error}. Expected one folder per class with images inside") from error
    if both:
        keep_part(folder, training)
    return folder


def keep_part(folder, training):
    """Leaves, of a PhotographFolder of all photographs, those for training or for validation."""
    of_class, below = {}, len(os.path.join(folder.root, ""))
    for path, label in folder.samples:
        of_class.setdefault(label, []).append(path[below:])
    held_out = set().union(*map(validation_part, of_class.values()))
    kept = [(path, label) for path, label in folder.samples if (path[below:] not in held_out) == training]
    if not kept:
        raise ValueError(f"--data {folder.root}: every class has one photograph, so that none is left for validation; "
                         "expected two or more")
    folder.notes.append(f"{len(kept)} of the {len(folder.samples)} photographs in {folder.root}, which a hash of their "
                        "names splits 4 : 1")
    folder.samples = folder.imgs = kept
    folder.targets = [label for _, label in kept]


def balanced(images, limit):
    """The first `limit` images when classes take turns, or all of them."""
    if limit is None or limit >= len(images):
        return images
    turn = {}  # class -> how many of it came before
    order = []
    for index, label in enumerate(images.targets):
        turn[label] = turn.get(label, -1) + 1
        order.append((turn[label], label, index))
    subset = Subset(images, sorted(index for _, _, index in sorted(order)[:limit]))
    subset.notes = images.notes
    return subset
