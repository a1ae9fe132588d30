"""Rendered scenes: one drawing, and what every task takes from it."""
import numpy as np
import pytest
from training import tiny

from train import classification, scenes


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


def test_scene_refuses_a_size_without_room():
    with pytest.raises(ValueError, match="size = 8"):
        scenes.draw(0, size=8)
