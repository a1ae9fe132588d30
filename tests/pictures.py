"""The pictures of golden/augmentation.npz, and what classification makes of a picture in training."""
import dataclasses
from functools import cache

import numpy as np
from PIL import Image

from train import augment, classification
from train.config import resolve


def photograph(seed, H, W):
    """Colours of 6 x 8 nodes, enlarged bilinearly, and noise: (H, W, 3) uint8."""
    rng = np.random.RandomState(seed)
    nodes, noise = rng.randint(0, 256, (6, 8, 3)), rng.randint(-8, 9, (H, W, 3))
    y, x = 5 * np.arange(H) / (H - 1), 7 * np.arange(W) / (W - 1)
    i, j = np.minimum(y.astype(int), 4), np.minimum(x.astype(int), 6)
    y, x = (y - i)[:, None, None], (x - j)[:, None]
    down = nodes[i] * (1 - y) + nodes[i + 1] * y  # (H, 8, 3)
    return np.floor(down[:, j] * (1 - x) + down[:, j + 1] * x + noise + 0.5).clip(0, 255).astype(np.uint8)


A, B, C = photograph(1, 375, 500), photograph(2, 224, 224), photograph(3, 300, 300)
X, Y = photograph(4, 128, 128), np.floor(40 + photograph(5, 128, 128) * 98.0 / 255 + 0.5).astype(np.uint8)


@cache
def recipe(model, **changes):
    """The Config of `run.py train MODEL --attn elsa --data photos`, but for changes."""
    return dataclasses.replace(resolve(dict(model=model, attn="elsa", data="photos"))[0], **changes)


def samples(picture, n, seed, model="swin_t", **changes):
    """n times the picture as classification trains on it: (bytes (H, W, 3), matrix (3, 3))."""
    transform = augment.TrainingTransform(recipe(model, **changes))
    images = [(Image.fromarray(picture), 0)] * n
    training = classification.AugmentedPhotographs(images, transform, seed, token_labels=[None] * n)
    for index in range(n):
        pixels, _, _, matrix = training[0, index]
        yield pixels.numpy(), matrix.double().numpy()
