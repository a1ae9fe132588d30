"""train/augment.py: filters, erasing, what is cropped last; what draws of it look like is in test_augmentation.py."""
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.ops import roi_align
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms import functional as F

from pictures import A, X, recipe, samples
from train import augment, classification, tokens
from train.config import Config, resolve
from train.device import to_device
from train.draws import Draws
from train.photographs import MEAN, STD, to_tensor


def test_crops_at_bicubic_are_torchvisions():
    transform = augment.TrainingTransform(Config(img_size=64, flip=0.5))
    for seed in range(20):
        pixels = transform(Image.fromarray(A), Draws(seed))[0].numpy()
        torch.manual_seed(seed)
        box = RandomResizedCrop.get_params(Image.fromarray(A), (0.08, 1.0), (3 / 4, 4 / 3))
        image = rows_first(F.crop(Image.fromarray(A), *box), 64, Image.BICUBIC)
        assert_rounded_alike(pixels, F.hflip(image) if torch.rand(()) < 0.5 else image)


def rows_first(image, size, resample):
    """Pillow's resize, as it was before its version 13 took columns first where they shrink more."""
    return image.resize((size, image.height), resample).resize((size, size), resample)


def assert_rounded_alike(ours, theirs):
    """But for a few bytes, which differ by one."""
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    assert difference.max() <= 1 and difference.mean() < 0.02


def test_numbers_are_those_of_torchs_generator():
    for seed in (0, 1, 12345, 2 ** 40 + 7, 2 ** 63 - 1):
        torch.manual_seed(seed)
        draws = Draws(seed)
        for low, high in ((0, 1), (0.08, 1), (-0.3, 0.3)):
            assert [torch.empty(1).uniform_(low, high).item() for _ in range(5)] == [
                draws.uniform(low, high) for _ in range(5)]
        assert torch.randint(15, (5,)).tolist() == [draws.below(15) for _ in range(5)]
        assert [torch.randn(()).item() for _ in range(5)] == [draws.normal() for _ in range(5)]
        assert torch.rand(()).item() == draws.uniform()


@pytest.mark.parametrize("H, W", [(375, 500), (300, 301), (20, 900), (900, 20), (3, 3), (1, 50)])
def test_boxes_are_those_of_torchvision(H, W):
    for seed in range(50):
        torch.manual_seed(seed)
        expected = RandomResizedCrop.get_params(torch.empty(3, H, W, device="meta"), (0.08, 1.0), (3 / 4, 4 / 3))
        assert augment.draw_box(H, W, (0.08, 1.0), Draws(seed)) == tuple(expected)


def test_bytes_are_normalised_on_the_device():
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3, 2).reshape(2, 8, 32, 3)
    images, labels = to_device((pixels, torch.tensor([3, 5])), torch.device("cpu"))
    assert all(torch.equal(ours, to_tensor(image.numpy())) for ours, image in zip(images, pixels, strict=True))
    steps = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    assert images.is_contiguous() and (images - steps(pixels.permute(0, 3, 1, 2))).abs().max() < 1e-6
    assert labels.tolist() == [3, 5] and to_device([images], images.device)[0] is images


def test_operations_take_the_filter_they_are_given():
    for resample in (Image.BILINEAR, Image.BICUBIC):
        expected = Image.fromarray(A).rotate(27, resample, fillcolor=(124, 116, 104))
        assert np.array_equal(augment.OPERATIONS[3](Image.fromarray(A), 0.9, 0.9, resample), expected)


@pytest.mark.parametrize("resampling", [Image.BILINEAR, Image.BICUBIC])
@pytest.mark.parametrize("size", [(64, 64), (97, 31), (1, 1), (1, 40), (40, 2), (3, 3)])
def test_lines_slide_as_in_pillows_transform(resampling, size):
    """Shears, and shifts by whole pixels and by parts of them, out of the image, too."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    pixels[:size[1] // 2, :size[0] // 2] = 255
    image = Image.fromarray(pixels)
    different = 0
    for slope, offset in [(0, 0), (0.2871, 0), (-0.2693, 0), (0, 7), (0, -3.5), (0.1043, -2.2519), (0, 200), (0, -200)]:
        for axis, matrix in ((1, [1, slope, offset, 0, 1, 0]), (0, [1, 0, 0, slope, 1, offset])):
            ours = np.asarray(augment.slide(image, slope, offset, axis, resampling), int)
            theirs = image.transform(size, Image.Transform.AFFINE, matrix, resampling, fillcolor=tuple(augment.FILL))
            difference = np.abs(ours - np.asarray(theirs, int))
            assert difference.max() <= 1
            different += np.count_nonzero(difference)
    assert different <= 16 * pixels.size * 1e-3


def test_operations_that_move_lines_along_themselves_slide(monkeypatch):
    axes = []
    monkeypatch.setattr(augment, "slide", lambda image, slope, offset, axis, resampling: axes.append(axis))
    for operation in augment.OPERATIONS:
        if isinstance(operation, augment.Affine):
            operation(Image.fromarray(A), 0.5, 0.5)
    assert axes == [1, 0, 1, 0]


@pytest.mark.parametrize("interpolation, low, high", [("bicubic", 0, 0), ("random", 0.4, 0.6)])
def test_every_operation_is_drawn_for_itself(interpolation, low, high, monkeypatch):
    images = []  # of each, what its operations were given: (level, signed level, filter)
    monkeypatch.setattr(augment, "OPERATIONS", (augment.OPERATIONS[3],))
    monkeypatch.setattr(augment.Affine, "__call__", lambda self, image, *given: images[-1].append(given) or image)
    for seed in range(600):
        images.append([])
        augment.RandAugment(9.0, 0.5, interpolation)(Image.fromarray(X), Draws(seed))
    levels, signed, filters = (np.array(values) for values in zip(*sum(images, [])))
    pairs = [(first[2], second[2]) for first, second in (pair for pair in images if len(pair) == 2)]
    assert 0.45 < len(levels) / 1200 < 0.55 and 0.2 < len(pairs) / 600 < 0.3
    assert low <= np.mean(filters == Image.BILINEAR) <= high
    assert low <= np.mean([first != second for first, second in pairs]) <= high
    assert abs(levels.mean() - 0.9) < 0.006 and 0.044 < levels.std() < 0.054 and levels.max() == 1
    assert np.array_equal(np.abs(signed), levels) and 0.45 < np.mean(signed < 0) < 0.55


def test_posterising_to_no_bits_gives_black():
    for bits in range(1, 5):
        assert np.array_equal(augment.OPERATIONS[4](Image.fromarray(A), 1 - bits / 4, 0),
                              ImageOps.posterize(Image.fromarray(A), bits))
    assert not np.asarray(augment.OPERATIONS[4](Image.fromarray(A), 1.0, 0)).any()


def test_erasing_leaves_everything_else_alone():
    images, state = torch.zeros(200, 2, 40, 24, dtype=torch.float64), torch.get_rng_state()
    erased = augment.erase(images, 1.0, np.random.default_rng(0))
    assert erased.dtype == torch.float64 and not images.any() and torch.equal(state, torch.get_rng_state())
    assert torch.equal(erased, augment.erase(images, 1.0, np.random.default_rng(0)))
    for where in (erased != 0).all(1):
        rows, across = where.any(1), where.any(0)
        assert torch.equal(where, rows[:, None] & across) and rows.sum() < 40 and across.sum() < 24
        assert 0.015 < where.double().mean() < 0.36
    assert len(torch.unique(erased[erased != 0])) == (erased != 0).sum()
    for thin in (torch.zeros(50, 3, 40, 1), torch.zeros(50, 3, 1, 40)):  # no rectangle is smaller than the image
        assert not augment.erase(thin, 1.0, np.random.default_rng(0)).any()
    assert not augment.erase(images, 0.0, np.random.default_rng(0)).any()


class Tokens:
    """A model that keeps what it is given."""

    def token_grid(self, H, W):
        return H // 8, W // 8

    def __call__(self, images, swap):
        self.images, self.swap = images, swap
        return torch.zeros(len(images), 2)


@pytest.mark.parametrize("erasing", [0.0, 0.5])
def test_mix_token_comes_after_erasing_which_draws_only_where_it_is_on(erasing):
    config, model = recipe("volo_d1", erasing=erasing), Tokens()
    images, labels = torch.zeros(16, 3, 32, 32), torch.zeros(16, dtype=torch.long)
    ours, expected = np.random.default_rng(5), np.random.default_rng(5)
    classification.loss(model, (images, labels), config, ours)
    augment.mix(images, 0.0, 0.0, expected)
    if erasing:
        assert torch.equal(model.images, augment.erase(images, erasing, expected)) and model.images.any()
    assert torch.equal(model.swap, tokens.draw_swap(expected, 1.0, 4, 4)[0])
    assert (model.images is images) == (not erasing) and ours.random() == expected.random()


def test_with_token_labels_the_whole_photograph_is_mirrored_and_then_augmented():
    transform, image = augment.TrainingTransform(recipe("volo_d1", token_labels="maps", flip=1.0)), Image.fromarray(A)
    for seed in range(8):
        pixels, draws = transform(image, Draws(seed))[0].numpy(), Draws(seed)
        draws.uniform()
        whole, _ = augment.RandAugment(9.0, 0.5, "random")(F.hflip(image), draws)
        top, left, height, width = augment.draw_box(whole.height, whole.width, (0.08, 1.0), draws)
        crop = whole.crop((left, top, left + width, top + height))
        assert_rounded_alike(pixels, rows_first(crop, 224, augment.draw_filter("random", draws)))


def test_only_token_labels_crop_last():
    last, first = recipe("volo_d1"), recipe("volo_d1", crop_last=False)
    of = lambda config: next(samples(A, 1, 3, "volo_d1", **config))[0]
    assert last.crop_last and np.array_equal(of({}), of(dict(crop_last=False)))
    assert not first.crop_last and not np.array_equal(of(dict(token_labels="maps")), of({}))


def test_label_maps_can_be_cropped_as_published():
    """TokenLabeling gives (top, left, bottom, right) to roi_align, which takes (left, top, right, bottom)."""
    label_map = torch.stack([torch.rand(3, 18, 18), torch.arange(3)[:, None, None].expand(3, 18, 18)])
    changes = dict(randaugment=0.0, token_labels="maps")
    for exchanged in (True, False):
        for flip in (0.0, 1.0):
            options = dict(changes, flip=flip, published_label_crop=exchanged)
            (_, matrix), = samples(A, 1, 4, "volo_d1", **options)
            (pixels, right), = samples(A, 1, 4, "volo_d1", **dict(options, published_label_crop=False))
            width, height = abs(right[0, 0]), right[1, 1]
            left = right[0, 2] if not flip else 1 - right[0, 2]  # of the mirrored photograph
            box = [left, right[1, 2], left + width, right[1, 2] + height]
            box = torch.tensor([box[i] for i in ((1, 0, 3, 2) if exchanged else range(4))])
            targets = tokens.dense_targets(label_map[None], torch.tensor(matrix)[None].float(), torch.zeros(1).long(),
                                           14, 14, 3, 0.0, False)[1]
            scores = label_map[:1].flip(3) if flip else label_map[:1]
            expected = roi_align(scores, [box[None].float() * 18 - 0.5], (14, 14), sampling_ratio=2)
            assert torch.allclose(targets[0], expected[0].permute(1, 2, 0).softmax(-1), atol=1e-5)
            assert np.array_equal(pixels, next(samples(A, 1, 4, "volo_d1", **options))[0])


def test_interpolation_is_one_of_two():
    with pytest.raises(ValueError, match="interpolation = 'nearest' does not fit; expected bicubic or random"):
        resolve(dict(model="swin_t", interpolation="nearest"))
    assert recipe("swin_t").interpolation == recipe("volo_d3").interpolation == "random"
