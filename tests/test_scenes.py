"""train/scenes.py: the shapes are what they are called, every machine draws the same scenes, and one drawing serves all
tasks."""
import math

import numpy as np
import pytest

from train import classification, scenes
from training import tiny

DRAWN = [  # index, classes, boxes, the pixels at (10, 30) and (36, 12), visible pixels of each object
    (0, [0, 7], [[9, 16, 37, 43], [31, 0, 45, 16]], [95, 109, 61], [198, 216, 181], [589, 99]),
    (1, [1], [[8, 1, 43, 36]], [68, 28, 85], [113, 36, 74], [632]),
    (2, [2], [[5, 3, 34, 32]], [107, 63, 14], [107, 86, 31], [548]),
    (3, [3], [[12, 6, 43, 42]], [94, 40, 46], [199, 153, 195], [569]),
    (4, [4, 3], [[5, 8, 46, 47], [9, 12, 20, 22]], [45, 51, 14], [52, 3, 23], [643, 59]),
    (5, [5, 0], [[4, 10, 37, 43], [26, 33, 33, 40]], [40, 47, 61], [56, 35, 100], [536, 38]),
    (6, [6, 5], [[0, 8, 48, 40], [20, 2, 35, 17]], [143, 83, 155], [77, 35, 94], [710, 118]),
    (7, [7, 5], [[4, 1, 36, 39], [15, 37, 24, 46]], [100, 30, 77], [100, 39, 72], [535, 49]),
]
MEASURES = {  # area and radius
    "circle": (math.pi, 1), "ring": (math.pi * (1 - 0.6 ** 2), 1), "square": (4, math.sqrt(2)),
    "triangle": (3 * math.sqrt(3) / 4, 1), "star": (10 * 0.45 * math.sin(math.pi / 5) / 2, 1),
    "cross": (2 * 2 * 0.6 - 0.6 ** 2, math.hypot(1, 0.3)), "bar": (2 * 0.6, math.hypot(1, 0.3)),
}


@pytest.mark.parametrize("index, labels, boxes, upper, lower, areas", DRAWN)
def test_every_machine_draws_the_same(index, labels, boxes, upper, lower, areas):
    scene = scenes.draw(index, seed=0, size=48, max_objects=3)
    assert scene.labels.tolist() == labels and scene.label == labels[0]
    assert scene.boxes == pytest.approx(np.array(boxes), abs=1) and scene.boxes.dtype == np.float32
    assert scene.masks.sum((1, 2)) == pytest.approx(np.array(areas), abs=2)  # a sine may be rounded otherwise elsewhere
    assert scene.image[10, 30] == pytest.approx(np.array(upper), abs=1)
    assert scene.image[36, 12] == pytest.approx(np.array(lower), abs=1)
    for label, mask in zip(labels, scene.masks):
        assert (scene.label_map[mask] == label + 1).all()
    assert (scene.label_map[~scene.masks.any(0)] == scenes.BACKGROUND).all()


@pytest.mark.parametrize("name", MEASURES)
def test_shapes_have_their_area(name):
    _, area, radius = scenes.SHAPES[name]
    assert (area, radius) == pytest.approx(MEASURES[name], rel=0.01)


def test_moon_is_a_circle_without_another():
    inside, area, radius = scenes.SHAPES["moon"]
    u, v = np.mgrid[-1:1:200j, -1:1:200j]
    assert np.array_equal(inside(u, v), (np.hypot(u, v) <= 1) & (np.hypot(u - 0.45, v) > 0.8))
    assert radius == pytest.approx(1, rel=0.01) and 1.3 < area < 1.6


@pytest.mark.parametrize("name", scenes.CLASSES)
def test_shapes_are_drawn_as_large_as_asked_and_within_the_image(name):
    for seed in range(20):
        coverage = scenes._shape(np.random.default_rng(seed), name, 20, 64)
        assert coverage.sum() == pytest.approx(400, rel=0.04), "less where a part is outside"
        assert set(np.unique(4 * coverage)) <= {0, 1, 2, 3, 4}


def test_large_and_small_objects_and_their_brightness():
    for index in range(64):
        scene = scenes.draw(index, size=64, max_objects=4)
        shares = scene.masks.mean((1, 2))
        assert 0.9 * 0.42 ** 2 * 0.8 < shares[0] < 0.55 ** 2 * 1.05
        assert (shares[1:] < shares[0] / 0.9 / 6 * 1.1).all()
        background = scene.image[~scene.masks.any(0)].mean()
        assert all(scene.image[mask].mean() > background + 20 for mask in scene.masks)


def rectangle(rows, columns, coverage=1.0):
    image = np.zeros((48, 48), np.float32)
    image[slice(*rows), slice(*columns)] = coverage
    return image


LARGE = rectangle((0, 20), (0, 20))
TENTH = rectangle((0, 20), (18, 24))  # hides 40 of its 400 pixels
CORNER = rectangle((0, 1), (0, 1))  # one pixel more
FAINT = rectangle((44, 48), (44, 48), 0.49)  # less than half of each pixel: it is not there
BESIDE = rectangle((30, 40), (30, 40), 0.5)


@pytest.mark.parametrize("shapes, masks", [
    ([LARGE, TENTH, CORNER, BESIDE], [LARGE - LARGE * TENTH, TENTH, BESIDE]),
    ([LARGE, CORNER, TENTH, BESIDE], [LARGE - CORNER, CORNER, BESIDE]),
    ([LARGE, FAINT, BESIDE], [LARGE, BESIDE]),
])
def test_an_object_hides_at_most_a_tenth_of_another(monkeypatch, shapes, masks):
    coverages = iter(shapes)
    monkeypatch.setattr(scenes, "_shape", lambda *_: next(coverages, np.zeros((48, 48), np.float32)))
    scene = scenes.draw(0, max_objects=100)
    assert next(coverages, None) is None and np.array_equal(scene.masks, np.array(masks) > 0)
    assert len(scene.labels) == len(masks) and scene.boxes[-1].tolist() == [30, 30, 40, 40]


def test_colours_end_at_black_and_white(monkeypatch):
    glare = np.repeat(np.where(np.arange(48) < 24, 300, -50).astype(np.float32), 48 * 3).reshape(48, 48, 3)
    monkeypatch.setattr(scenes, "_background", lambda rng, size: glare.copy())
    monkeypatch.setattr(scenes, "_shape", lambda *_: rectangle((20, 30), (20, 30)))
    image = scenes.draw(0).image
    assert (image[:20] == 255).all() and (image[30:] == 0).all()


def test_size_has_a_least():
    assert scenes.draw(0, size=16).image.shape == (16, 16, 3)
    with pytest.raises(ValueError, match="size = 15"):
        scenes.draw(0, size=15)


# What a scene says of itself

@pytest.mark.parametrize("size", [16, 33, 48])
def test_scene_annotations_come_from_one_drawing(size):
    for index in range(64):
        scene = scenes.draw(index, seed=3, size=size, max_objects=6)
        n = len(scene.labels)
        assert scene.image.shape == (size, size, 3) and scene.image.dtype == np.uint8
        assert scene.boxes.shape == (n, 4) and scene.masks.shape == (n, size, size) and 1 <= n <= 6
        area = scene.masks.sum((1, 2))
        assert (scene.masks.sum(0) <= 1).all(), "a pixel belongs to one object"
        assert area.min() > 0 and area.argmax() == 0 and scene.label == scene.labels[0] == index % len(scenes.CLASSES)
        for box, label, mask in zip(scene.boxes, scene.labels, scene.masks):
            y, x = np.nonzero(mask)
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
            assert (scene.label_map[mask] == label + 1).all()
        assert (scene.label_map[~scene.masks.any(0)] == scenes.BACKGROUND).all()


def test_scene_is_a_function_of_index_and_seed():
    first, again = scenes.draw(5, seed=1), scenes.draw(5, seed=1)
    for name in ("image", "boxes", "labels", "masks", "label_map"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.image, scenes.draw(5, seed=2).image)
    assert not np.array_equal(first.image, scenes.draw(5 + len(scenes.CLASSES), seed=1).image)


def test_scenes_hide_the_class_from_colour():
    """The mean colour of an image does not tell its class: the nearest class mean is near chance."""
    colours = np.array([scenes.draw(i, size=16).image.mean((0, 1)) for i in range(800)])
    labels = np.arange(800) % len(scenes.CLASSES)
    means = np.array([colours[:400][labels[:400] == c].mean(0) for c in range(len(scenes.CLASSES))])
    guess = ((colours[400:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == labels[400:]).mean() < 0.22  # chance is 0.125, its standard deviation 0.017


def test_training_and_held_out_scenes_are_disjoint_and_balanced():
    training, held_out, classes = classification.datasets(tiny(limit=16, val_limit=16))
    assert classes == list(scenes.CLASSES)
    seen = {training[epoch, i][0].numpy().tobytes() for epoch in range(2) for i in range(16)}
    held = {held_out[i][0].numpy().tobytes() for i in range(16)}
    assert len(seen) == 32 and len(held) == 16 and not seen & held
    assert np.bincount([held_out[i][1] for i in range(16)]).tolist() == [2] * 8
