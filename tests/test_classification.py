"""Folders of images, their augmentation, mixing and loss."""
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from photographs import image_folder
from train import augment, classification, data
from train.classification import mixed_cross_entropy
from train.draws import Draws
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


@pytest.mark.parametrize("groups", [None, [0] * 13 + [1] * 9])
def test_filled_batches_leave_no_image_out(groups):
    shares = [list(data.BatchSampler(22, 8, 2, 1, rank, 2, groups, fill_last=True)) for rank in range(2)]
    seen = [index for share in shares for batch in share for _, index in batch]
    steps = 3  # of 8: 22 images, or with groups 14 + 10, in pairs
    assert len(seen) == 8 * steps and set(seen) == set(range(22)) and all(len(share) == 2 * steps for share in shares)
    assert len(data.BatchSampler(22, 8, 2, 1, 0, 2, groups, fill_last=True)) == 2 * steps
    if groups:
        assert all(len({groups[index] for _, index in batch}) == 1 for share in shares for batch in share)


def test_every_randaugment_operation_keeps_the_image_format():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    for operation in augment.OPERATIONS:
        for level, signed in ((0.0, 0.0), (0.9, -0.9), (1.0, 1.0)):
            out = operation(image, level, signed)
            assert out.size == image.size and out.mode == "RGB"
    unchanged = [np.array_equal(augment.RandAugment()(image, Draws(seed))[0], image) for seed in range(400)]
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
        difference = np.asarray(operation(image, level, -level), int) - np.asarray(theirs(image, -amount, **bicubic))
        assert np.abs(difference).max() <= 1 and np.count_nonzero(difference) < 10


@pytest.mark.parametrize("size, crop_pct, short", [(32, 0.9, 35), (32, 1.0, 32), (24, 1.15, 20)])
def test_validation_takes_the_centre_of_a_resized_image(size, crop_pct, short):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    resized = image.resize((int(short * 70 / 50), short), Image.BICUBIC)
    padded = Image.new("RGB", (size, size))
    left, top = round((resized.width - size) / 2), round((short - size) / 2)
    padded.paste(resized, (-left, -top))
    got = augment.validation_transform(size, crop_pct)(image)
    assert got.dtype == torch.uint8 and np.array_equal(got, padded)


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
    with pytest.raises(FileNotFoundError, match="no val/ or validation/ or test/, and is no folder with a"):
        classification.datasets(tiny(data=str(photos)))


def test_limit_takes_classes_in_turn(photos):
    training, val, _ = classification.datasets(tiny(data=str(photos), limit=5, val_limit=2))
    assert sorted(training[0, i][1] for i in range(len(training))) == [0, 0, 0, 1, 1]
    assert [label for _, label in val] == [0, 1]
    assert [training.name(i)[-9:] for i in (0, 2, 3, 4)] == ["cat/0.png", "cat/2.jpg", "dog/0.png", "dog/1.jpg"]


def test_hidden_names_are_no_classes_and_no_photographs_at_any_depth(photos):
    before = classification.datasets(tiny(data=str(photos), limit=None))[0].images.samples
    for hidden in (".ipynb_checkpoints/0.jpg", "cat/._1.jpg", "cat/.Trash-1000/1.jpg", "dog/more/.x/2.png"):
        (photos / "train" / hidden).parent.mkdir(parents=True, exist_ok=True)
        (photos / "train" / hidden).write_bytes(b"junk")
    training, _, classes = classification.datasets(tiny(data=str(photos), limit=None))
    assert training.images.samples == before and classes == ["cat", "dog"] and training.notes == []
    (photos / "train" / "cat" / "Thumbs.db").touch()
    (photos / "train" / "notes.txt").touch()  # no class
    for name, kind in (("7.jfif", "jpeg"), ("8.GIF", "gif"), ("more/9.png", "png")):
        (photos / "train" / "dog" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (9, 9)).save(photos / "train" / "dog" / name, format=kind)
    training, _, _ = classification.datasets(tiny(data=str(photos), limit=None))
    assert len(training) == len(before) + 3
    assert training.notes == ["left out: 1 files that Pillow does not read (.db)"]
    assert classification.datasets(tiny(data=str(photos), limit=5))[0].notes == training.notes
    (photos / "train" / "cat" / "Thumbs.db").rename(photos / "val" / "cat" / "Thumbs.db")
    photos = photos.rename(photos.with_name(".photos"))  # what hides the whole folder hides nothing in it
    training, val, _ = classification.datasets(tiny(data=str(photos), limit=None, val_limit=2))
    assert len(training) == len(before) + 3 and training.notes == [] and val.notes == [
        "left out: 1 files that Pillow does not read (.db)"]


@pytest.mark.parametrize("H, W", [(2, 100), (100, 2), (3, 205), (205, 3)])
def test_of_a_strip_the_centre_alone_is_resized(monkeypatch, H, W):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (H, W, 3), dtype=np.uint8))
    for size, crop_pct in ((32, 0.9), (32, 1.0), (24, 1.15)):
        monkeypatch.setattr(augment, "WHOLE", 16)
        strip = augment.validation_transform(size, crop_pct)(image)
        monkeypatch.setattr(augment, "WHOLE", 1e9)
        whole = augment.validation_transform(size, crop_pct)(image)
        assert strip.shape == (size, size, 3) and (strip != whole).float().mean() < 0.01
        assert (strip.int() - whole).abs().max() <= 2  # grey values, where positions are rounded


@pytest.mark.parametrize("size, whole", [((32, 2), True), ((2, 33), False)])
def test_strips_begin_where_the_long_side_is_more_than_sixteen_short_ones(monkeypatch, size, whole):
    made, resize = [], augment.F.resize
    monkeypatch.setattr(augment.F, "resize", lambda *arguments: made.append(1) or resize(*arguments))
    augment.validation_transform(32, 0.9)(Image.new("RGB", size))
    assert bool(made) == whole


def test_long_strips_take_little_memory(monkeypatch):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda image, size, *rest: sizes.append(size) or resize(
        image, size, *rest))
    for size in ((6000, 2), (2, 6000)):
        assert augment.validation_transform(224, 0.9)(Image.new("RGB", size)).shape == (224, 224, 3)
    assert max(width * height for width, height in sizes) < 2e6
