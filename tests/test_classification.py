"""Folders of images, their augmentation, mixing and loss."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from photographs import image_folder
from train import augment, classification, data
from train.classification import mixed_cross_entropy
from training import tiny


@pytest.fixture
def photos(tmp_path):
    return image_folder(tmp_path / "photos", {"train": 6, "val": 3})


def test_samples_do_not_depend_on_workers_or_ranks(photos):
    config = tiny(data=str(photos), limit=None, batch_size=4, randaugment=9.0, erasing=0.5, seed=7)
    training, _, _ = classification.datasets(config)

    def epoch(rank, world, workers, number=1):
        loader = data.training_loader(training, dataclasses.replace(config, workers=workers), rank, world)
        loader.batch_sampler.epoch = number
        return [images for images, _ in loader]

    alone, workers = epoch(0, 1, 0), epoch(0, 1, 2)
    assert len(alone) == 3 and all(torch.equal(a, b) for a, b in zip(alone, workers))
    halves = [torch.cat(pair) for pair in zip(epoch(0, 2, 0), epoch(1, 2, 0))]
    assert all(torch.equal(a, b) for a, b in zip(alone, halves))
    assert not torch.equal(alone[0], epoch(0, 1, 0, number=2)[0])


def test_every_epoch_augments_anew(photos):
    config = tiny(data=str(photos), limit=None, scale=(0.2, 1.0), img_size=32)
    training, _, _ = classification.datasets(config)
    seen = [training[epoch, 3][0] for epoch in range(4)]
    assert torch.equal(seen[1], training[1, 3][0]) and len({image.sum().item() for image in seen}) == 4
    other = classification.datasets(dataclasses.replace(config, seed=1))[0]
    assert not torch.equal(other[1, 3][0], seen[1])


def test_sampling_leaves_torch_generator_alone(photos):
    training, _, _ = classification.datasets(tiny(data=str(photos), limit=None))
    state = torch.get_rng_state()
    training[0, 3]
    assert torch.equal(state, torch.get_rng_state())


def test_accumulated_passes_see_the_same_images():
    whole = list(data.BatchSampler(20, 8, 1, seed=1, rank=0, world=1))
    parts = list(data.BatchSampler(20, 8, 2, seed=1, rank=0, world=1))
    assert len(whole) == 2 and [a + b for a, b in zip(parts[::2], parts[1::2])] == whole


def test_every_randaugment_operation_keeps_the_image_format():
    torch.manual_seed(0)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for operation in augment.OPERATIONS:
        for level, signed in ((0.0, 0.0), (0.9, -0.9), (1.0, 1.0)):
            out = operation(image, level, signed)
            assert out.size == image.size and out.mode == "RGB"
    unchanged = [np.array_equal(np.asarray(augment.RandAugment()(image)[0]), np.asarray(image)) for _ in range(400)]
    assert 0.18 < np.mean(unchanged) < 0.36  # neither operation applied: 1/4, and a few that change nothing


def test_randaugment_matches_timm_operations():
    timm = pytest.importorskip("timm.data.auto_augment")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3), dtype=np.uint8)).resize((48, 60))
    bicubic = dict(resample=Image.BICUBIC, fillcolor=tuple(augment.FILL))
    level = 0.9
    expected = [timm.auto_contrast(image), timm.equalize(image), timm.invert(image), timm.rotate(image, 27, **bicubic),
                timm.posterize(image, 1), timm.solarize(image, 26), timm.solarize_add(image, 99),
                timm.color(image, 1.81), timm.contrast(image, 1.81), timm.brightness(image, 1.81),
                timm.sharpness(image, 1.81)]
    for operation, theirs in zip(augment.OPERATIONS, expected):
        assert np.array_equal(np.asarray(operation(image, level, level)), np.asarray(theirs))
    shifts = (timm.shear_x, 0.27), (timm.shear_y, 0.27), (timm.translate_x_rel, 0.405), (timm.translate_y_rel, 0.405)
    for operation, (theirs, amount) in zip(augment.OPERATIONS[11:], shifts):
        ours = operation(image, level, -level)
        assert np.array_equal(np.asarray(ours), np.asarray(theirs(image, -amount, **bicubic)))


def test_mix_weighs_labels_by_pixels():
    images = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    for seed in range(20):
        mixed, own = augment.mix(images, 0.0, 1.0, np.random.default_rng(seed))
        assert mixed[0].mean().item() == pytest.approx(1 - own) and mixed[1].mean().item() == pytest.approx(own)
        mixed, own = augment.mix(images, 0.8, 0.0, np.random.default_rng(seed))
        assert torch.allclose(mixed[0], torch.full((3, 8, 8), 1 - own))
    assert augment.mix(images, 0.0, 0.0, np.random.default_rng(0))[1] == 1


def test_mixed_cross_entropy_is_that_of_soft_targets():
    logits, labels = torch.randn(6, 5), torch.arange(6) % 5
    hot = torch.nn.functional.one_hot(labels, 5).float()
    targets = 0.9 * (0.3 * hot + 0.7 * hot.flip(0)) + 0.1 / 5
    expected = torch.nn.functional.cross_entropy(logits, targets)
    assert torch.allclose(mixed_cross_entropy(logits, labels, 0.3, 0.1), expected)


def test_corrupt_image_is_named(photos):
    bad = photos / "val" / "dog" / "2.jpg"
    bad.write_bytes(bad.read_bytes()[:100])
    _, val, _ = classification.datasets(tiny(data=str(photos), limit=None, val_limit=None))
    with pytest.raises(ValueError, match="dog/2.jpg cannot be read as an image"):
        list(val)


def test_folder_errors_say_what_is_missing(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        classification.datasets(tiny(data=str(tmp_path / "absent")))
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="one folder per class"):
        classification.datasets(tiny(data=str(tmp_path / "empty")))
    (photos / "val" / "dog").rename(photos / "val" / "wolf")
    with pytest.raises(ValueError, match="dog.*wolf"):
        classification.datasets(tiny(data=str(photos)))
    (photos / "val").rename(photos / "valid")
    with pytest.raises(FileNotFoundError, match="no val/ or test/"):
        classification.datasets(tiny(data=str(photos)))


def test_limit_takes_classes_in_turn(photos):
    training, val, _ = classification.datasets(tiny(data=str(photos), limit=5, val_limit=2))
    assert sorted(training[0, i][1] for i in range(len(training))) == [0, 0, 0, 1, 1]
    assert [label for _, label in val] == [0, 1]
