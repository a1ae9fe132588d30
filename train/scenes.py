"""Rendered scenes: a data set that needs no download, for trying every part of the project within minutes.

A scene is a textured background with one large shape and, as asked for, small ones. The class of the image, the boxes,
the masks and the label map come from the same drawing, so that classification, detection and segmentation learn from
the same images. Everything in a scene is a function of (index, seed): nothing is stored, and any worker on any machine
draws the same pixels.
"""
from dataclasses import dataclass

import numpy as np

CLASSES = ("circle", "ring", "square", "triangle", "star", "cross", "bar", "moon")
BACKGROUND = 0  # of the label map; class c is painted as c + 1
HELD_OUT = 1 << 32  # training draws indices below, validation from here on: the two can never share a scene


@dataclass
class Scene:
    image: np.ndarray  # (H, W, 3) uint8
    label: int  # class of the largest object: the one with most visible pixels
    boxes: np.ndarray  # (n, 4) float32, x0 y0 x1 y1 in pixels, tight around the visible part, x1 and y1 exclusive
    labels: np.ndarray  # (n,) int64, classes of the objects, the largest first
    masks: np.ndarray  # (n, H, W) bool, visible pixels; no pixel belongs to two objects
    label_map: np.ndarray  # (H, W) uint8, BACKGROUND or 1 + class


def draw(index, seed=0, size=48, max_objects=2):
    """Draws scene `index`.

    Args:
        index: which scene, from 0; the class of the image is index modulo the number of classes, so any run of indices
            is balanced.
        seed: another seed, another data set.
        size: side of the image in pixels.
        max_objects: a scene holds one large object and up to max_objects - 1 small ones, painted later. A small object
            has at most a sixth of the large one's area. One that would hide more than a tenth of another is left out.

    Shapes are brighter than the background. Colour, texture, position, orientation and size tell nothing about the
    class. Pixels are averages of 2 x 2 samples.
    """
    if size < 16:
        raise ValueError(f"size = {size}; a scene needs at least 16 pixels to show its shapes, use 16 or more")
    rng = np.random.default_rng((seed, index))
    image = _background(rng, size)
    large = rng.uniform(0.42, 0.55) * size  # square root of the area, in pixels
    objects = [(index % len(CLASSES), large)]
    for _ in range(rng.integers(0, max_objects)):
        objects.append((int(rng.integers(len(CLASSES))), rng.uniform(0.25, 0.4) * large))

    labels, masks, areas = [], np.zeros((0, size, size), bool), np.zeros(0, int)
    for label, side in objects:
        coverage = _shape(rng, CLASSES[label], side, size)  # (size, size), 0 to 1
        mask = coverage >= 0.5
        if not mask.any():
            continue
        visible = masks & ~mask
        if (visible.sum((1, 2)) < 0.9 * areas).any():
            continue
        image += coverage[..., None] * (_paint(rng, size) - image)
        labels.append(label)
        masks = np.concatenate([visible, mask[None]])
        areas = np.append(areas, mask.sum())

    image = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
    labels = np.array(labels)
    label_map = (masks * (labels + 1)[:, None, None]).sum(0).astype(np.uint8)
    return Scene(image, int(labels[0]), np.stack([_box(mask) for mask in masks]), labels, masks, label_map)


def _box(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _background(rng, size):
    """A dark colour under two gratings and coarse noise -> (size, size, 3) float32."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    pattern = np.zeros((size, size), np.float32)
    for _ in range(2):
        pattern += _grating(rng, x, y, max_frequency=8)
    cell = -(-size // 8)  # pixels; 8 x 8 cells cover the image
    pattern += np.kron(rng.normal(0, 0.7, (8, 8)), np.ones((cell, cell)))[:size, :size]
    colour, contrast = rng.uniform(20, 110, 3), rng.uniform(-14, 14, 3)
    return (colour + pattern[..., None] * contrast).astype(np.float32)


def _paint(rng, size):
    """A bright colour with faint stripes -> (size, size, 3) float32."""
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    colour, contrast = rng.uniform(130, 240, 3), rng.uniform(-12, 12, 3)
    return (colour + _grating(rng, x, y, max_frequency=6)[..., None] * contrast).astype(np.float32)


def _grating(rng, x, y, max_frequency):
    """A sinusoidal grating, -1 to 1, at a random angle and phase; frequency in waves an image."""
    angle, frequency, phase = rng.uniform(0, 2 * np.pi), rng.uniform(2, max_frequency), rng.uniform(0, 2 * np.pi)
    return np.sin(2 * np.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase).astype(np.float32)


def _shape(rng, name, side, size):
    """Coverage of the pixels (size, size), 0 to 1, by a shape of area side * side.

    It stands at random in the image, turned by up to 30 degrees.
    """
    inside, area, radius = SHAPES[name]
    unit = side / np.sqrt(area)  # pixels per unit of the shape's own coordinates
    margin = min(unit * radius, size / 2)
    centre = rng.uniform(margin, size - margin, 2)
    angle = rng.uniform(-np.pi / 6, np.pi / 6)
    samples = (np.arange(2 * size, dtype=np.float32) + 0.5) / 2  # two a pixel along each axis
    x, y = (samples - centre[0]) / unit, (samples[:, None] - centre[1]) / unit
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return inside(u, v).reshape(size, 2, size, 2).mean((1, 3), dtype=np.float32)


def _square(u, v):
    return np.maximum(abs(u), abs(v)) <= 1


def _triangle(u, v):  # equilateral, corners on the unit circle
    return np.maximum(-u, abs(v) * 3 ** 0.5 / 2 + u / 2) <= 0.5


def _star(u, v, notch=0.45):  # tips on the unit circle, notches at radius `notch`
    half = np.pi / 5
    angle = abs((np.arctan2(v, u) + half) % (2 * half) - half)  # from the nearest tip
    radius = np.hypot(u, v)
    # The edge runs from the tip (1, 0) to the notch: inside is where the cross product has the origin's sign.
    along, across = notch * np.cos(half) - 1, notch * np.sin(half)
    return along * radius * np.sin(angle) - across * (radius * np.cos(angle) - 1) >= 0


def _cross(u, v):
    return (np.maximum(abs(u), abs(v)) <= 1) & (np.minimum(abs(u), abs(v)) <= 0.3)


SHAPES = {
    "circle": lambda u, v: u * u + v * v <= 1,
    "ring": lambda u, v: abs(np.hypot(u, v) - 0.8) <= 0.2,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "bar": lambda u, v: (abs(u) <= 1) & (abs(v) <= 0.3),
    "moon": lambda u, v: (u * u + v * v <= 1) & ((u - 0.45) ** 2 + v * v > 0.64),
}


def _measured(inside):
    """(shape, its area, its radius: the largest distance from the origin) in the shape's own coordinates."""
    v, u = np.mgrid[-1.5:1.5:600j, -1.5:1.5:600j]
    hit = inside(u, v)
    return inside, 9 * hit.mean(), np.hypot(u, v)[hit].max()


SHAPES = {name: _measured(SHAPES[name]) for name in CLASSES}
