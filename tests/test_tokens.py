"""train/tokens.py and the losses on tokens: boxes add up, label maps follow their images."""
import errno
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import Subset
from torchvision.datasets import ImageFolder

from train import augment, classification, loop, photographs, tokens
from train.classification import token_cross_entropy
from train.config import RECIPES, Config, resolve
from train.draws import Draws
from training import train

VOLO = dict(
    model="volo_d1", model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[2, 4], stem_dim=4),
    img_size=32, patch_size=4, drop_path_rate=0.1, mix_token=1.0,
    batch_size=8, epochs=2, warmup_epochs=0.5, limit=24, val_limit=9, device="cpu",
)
PLAIN = dict(img_size=32, scale=(1.0, 1.0), flip=0.0)


# Mix-token

@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 1 << 30), h=st.integers(1, 28), w=st.integers(1, 28), alpha=st.sampled_from([0.2, 1.0, 5.0]))
def test_box_is_a_rectangle_and_the_share_is_what_it_leaves(seed, h, w, alpha):
    swap, own = tokens.draw_swap(np.random.default_rng(seed), alpha, h, w)
    assert swap.shape == (h, w) and own == pytest.approx(1 - swap.float().mean().item())
    assert torch.equal(swap, swap.any(1)[:, None] & swap.any(0))  # as many rows in each column
    assert 0 <= own <= 1


def test_sides_of_the_box_are_shares_of_the_sides_of_the_map():
    rng = SimpleNamespace(beta=lambda *_: 0.75, integers=lambda size: size // 2)  # half of each side, in the middle
    swap, own = tokens.draw_swap(rng, 1.0, 8, 20)
    assert swap[2:6, 5:15].all() and swap.sum() == 40 and own == 0.75
    rng.integers = lambda size: size - 1  # in the corner
    assert tokens.draw_swap(rng, 1.0, 8, 20)[0][5:, 14:].all()


def test_boxes_cover_what_their_alpha_says():
    """Beta(1, 1) would take half of the image on average.

    Rounding down and the border leave 0.27, as in the published code.
    """
    shares = [1 - tokens.draw_swap(np.random.default_rng(seed), 1.0, 14, 14)[1] for seed in range(2000)]
    assert 0.26 < np.mean(shares) < 0.29 and max(shares) > 0.7


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1 << 16), B=st.integers(1, 5), h=st.integers(1, 4), w=st.integers(1, 4),
       smoothing=st.sampled_from([0.0, 0.1]))
def test_loss_is_that_of_soft_targets_that_add_up(seed, B, h, w, smoothing):
    generator = torch.Generator().manual_seed(seed)
    logits, token_logits = torch.randn(B, 6, generator=generator), torch.randn(B, h, w, 6, generator=generator)
    labels = torch.randint(6, (B,), generator=generator)
    _, own = tokens.draw_swap(np.random.default_rng(seed), 1.0, h, w)
    hot = F.one_hot(labels, 6) * (1 - smoothing) + smoothing / 6
    mixed = own * hot + (1 - own) * hot.flip(0)
    assert torch.allclose(mixed.sum(1), torch.ones(B))
    expected = -(mixed * logits.log_softmax(1)).sum(1).mean()
    for b in range(B):
        expected = expected - 0.5 * (hot[b] * token_logits[b].log_softmax(-1)).sum(-1).mean() / B
    loss = token_cross_entropy(logits, token_logits, labels, None, own, smoothing, 0.5)
    assert torch.allclose(loss, expected, atol=1e-5)
    dense = hot, hot[:, None, None].expand(B, h, w, 6)  # the same targets, given as a label map's
    assert torch.allclose(token_cross_entropy(logits, token_logits, labels, dense, own, 0.0, 0.5), expected, atol=1e-5)


# Label maps

def quadrants(score=20.0):
    """A label map whose quarters belong to classes 0, 1 over 2, 3."""
    classes = torch.tensor([[[0.0, 1], [2, 3]]]).repeat_interleave(9, 1).repeat_interleave(9, 2)  # (1, 18, 18)
    return torch.stack([torch.full_like(classes, score), classes])


def targets(place, h=4, w=4, **changes):
    given = dict(labels=torch.tensor([3]), num_classes=5, smoothing=0.0, ground_truth=False)
    places = torch.tensor(np.asarray(place), dtype=torch.float32)[None]
    return tokens.dense_targets(quadrants()[None], places, h=h, w=w, **{**given, **changes})


def bilinear(grid, x, y):
    """(C, rows, columns) read at x, y, 0 to 1 over the whole grid: centres of cells have their values."""
    C, rows, columns = grid.shape
    x, y = min(max(x * columns - 0.5, 0), columns - 1), min(max(y * rows - 0.5, 0), rows - 1)
    i, j = min(int(y), rows - 2), min(int(x), columns - 2)
    upper = (1 - x + j) * grid[:, i, j] + (x - j) * grid[:, i, j + 1]
    lower = (1 - x + j) * grid[:, i + 1, j] + (x - j) * grid[:, i + 1, j + 1]
    return (1 - y + i) * upper + (y - i) * lower


@pytest.mark.parametrize("smoothing, ground_truth", [(0.0, False), (0.1, True)])
def test_targets_are_those_of_a_loop_over_tokens(smoothing, ground_truth):
    rng = np.random.default_rng(0)
    B, C, h, w, n = 3, 6, 4, 5, 2
    classes = rng.permuted(np.tile(np.arange(C), (B, 7, 9, 1)), axis=-1)[..., :n].transpose(0, 3, 1, 2)
    best = rng.normal(2, 2, (B, n, 7, 9))
    places = np.array([[[1, 0, 0], [0, 1, 0], [0, 0, 1]], [[0.6, 0.1, 0.1], [-0.1, 0.7, 0.2], [0, 0, 1]],
                       [[-0.9, 0, 1.2], [0.2, 0.8, 0.3], [0, 0, 1]]])
    labels = rng.integers(C, size=B)
    maps, matrices = (torch.tensor(x, dtype=torch.float32) for x in (np.stack([best, classes], 1), places))
    of_class, of_tokens = tokens.dense_targets(
        maps, matrices, torch.tensor(labels), h, w, C, smoothing, ground_truth)
    softmax = lambda x: np.exp(x) / np.exp(x).sum()
    smooth = lambda t: t * (1 - smoothing + smoothing / C) + smoothing / C
    for b in range(B):
        grid = np.zeros((C, 7, 9))
        np.put_along_axis(grid, classes[b], best[b], 0)
        scores = np.zeros((h, w, C))
        for i, j, dy, dx in itertools.product(range(h), range(w), (0.25, 0.75), (0.25, 0.75)):
            x, y, _ = places[b] @ [(j + dx) / w, (i + dy) / h, 1]
            if 0 <= x <= 1 and 0 <= y <= 1:
                scores[i, j] += bilinear(grid, x, y) / 4
        expected = smooth(softmax(scores.mean((0, 1))))
        if ground_truth:
            share = 0.5 if expected.argmax() == labels[b] else 0.9
            truth = np.eye(C)[labels[b]] * (1 - smoothing) + smoothing / C
            expected = share * expected + (1 - share) * truth
        assert of_class[b].numpy() == pytest.approx(expected, abs=1e-5)
        assert of_tokens[b].numpy() == pytest.approx(smooth(np.apply_along_axis(softmax, -1, scores)), abs=1e-5)


def test_whole_image_keeps_its_map():
    of_class, of_tokens = targets(np.eye(3))
    assert torch.equal(of_tokens[0].argmax(-1), torch.tensor([[0, 0, 1, 1]] * 2 + [[2, 2, 3, 3]] * 2))
    assert torch.allclose(of_class[0, :4], torch.tensor(0.25), atol=0.01) and of_class[0, 4] < 0.01
    assert torch.allclose(of_tokens.sum(-1), torch.ones(1, 4, 4))


def test_flips_and_crops_move_the_map():
    flipped = targets([[-1, 0, 1], [0, 1, 0], [0, 0, 1]])[1][0].argmax(-1)
    assert torch.equal(flipped, torch.tensor([[1, 1, 0, 0]] * 2 + [[3, 3, 2, 2]] * 2))
    lower_left = targets([[0.5, 0, 0], [0, 0.5, 0.5], [0, 0, 1]])
    assert (lower_left[1][0].argmax(-1) == 2).all() and lower_left[0].argmax() == 2
    upper_half = targets([[1, 0, 0], [0, 0.5, 0], [0, 0, 1]], h=2, w=6)[1][0].argmax(-1)
    assert torch.equal(upper_half, torch.tensor([[0, 0, 0, 1, 1, 1]] * 2))


def test_uncovered_places_know_nothing():
    right_of_it = targets([[1, 0, 0.5], [0, 1, 0], [0, 0, 1]])[1][0]
    assert torch.equal(right_of_it[:, :2].argmax(-1), torch.tensor([[1, 1]] * 2 + [[3, 3]] * 2))
    assert torch.allclose(right_of_it[:, 2:], torch.tensor(0.2))


def test_smoothing_and_ground_truth():
    of_class, of_tokens = targets([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], smoothing=0.1)  # all of class 3, the label
    assert torch.allclose(of_tokens[..., 3], torch.tensor(1 - 0.1 + 0.02 + 0.02), atol=1e-4)
    assert torch.allclose(of_tokens[..., 0], torch.tensor(0.02), atol=1e-4)
    agreed = targets([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], ground_truth=True)[0]
    assert torch.allclose(agreed, torch.tensor([[0.0, 0, 0, 1, 0]]), atol=1e-4)
    denied = targets([[0.5, 0, 0.5], [0, 0.5, 0.5], [0, 0, 1]], ground_truth=True, labels=torch.tensor([4]))[0]
    assert torch.allclose(denied, torch.tensor([[0.0, 0, 0, 0.9, 0.1]]), atol=1e-4)


@pytest.mark.parametrize("options", [dict(scale=(0.2, 1.0)), dict(flip=1.0), dict(randaugment=9.0),
                                     dict(scale=(0.3, 1.0), flip=0.5, randaugment=9.0),
                                     dict(scale=(0.3, 1.0), flip=0.5, randaugment=9.0, crop_last=True,
                                          token_labels="maps")])
def test_map_goes_wherever_the_image_goes(options):
    """An image whose colours say where it was: what arrives at a pixel must have come from where `place` says."""
    H, W = 120, 160
    y, x = np.mgrid[:H, :W]
    red, green = 255 * (x + 0.5) / W, 255 * (y + 0.5) / H
    image = Image.fromarray(np.stack([red, green, np.full_like(red, 230)], -1).astype(np.uint8))
    operations = augment.OPERATIONS
    geometric = tuple(operation for operation in operations if isinstance(operation, augment.Affine))
    augment.OPERATIONS = geometric  # the others change colours
    try:
        transform = augment.TrainingTransform(Config(**{**PLAIN, "img_size": 64, **options}))
        errors = []
        for seed in range(20):
            pixels, place = transform(image, Draws(seed))
            pixels = pixels.permute(2, 0, 1) / 255
            rows, columns = (np.mgrid[:64, :64] + 0.5) / 64
            at = np.stack([columns, rows, np.ones_like(rows)], -1) @ place.T
            # Blue is 230 wherever the image is: what one operation pushed out of the frame and another brought back
            # is filled.
            inside = ((at[..., :2] > 0.05) & (at[..., :2] < 0.95)).all(-1) & (pixels[2].numpy() > 0.895)
            for channel in (0, 1):
                errors.append(np.abs(pixels[channel].numpy() - at[..., channel])[inside])
        # A pixel off is 1 / 64 = 0.0156; the interpolation overshoots beside what is filled.
        errors = np.concatenate(errors)
        assert len(errors) > 20 * 1000 and np.quantile(errors, 0.98) < 0.012 and errors.max() < 0.1
    finally:
        augment.OPERATIONS = operations


def test_an_image_has_the_map_of_its_class_and_name(tmp_path):
    samples = [(str(tmp_path / "cat" / name), 0) for name in ("0.jpg", "more/1.png", "0.png")]
    (tmp_path / "maps" / "cat").mkdir(parents=True)
    for name in ("0", "1"):
        torch.save(torch.zeros(2, 1, 1, 1), tmp_path / "maps" / "cat" / f"{name}.pt")
    tree = ImageFolder.__new__(ImageFolder)
    tree.classes, tree.samples = ["cat"], samples
    labels = tokens.TokenLabels(tmp_path / "maps", tree, Subset(tree, [0, 1]))
    assert [path.name for path in labels.paths] == ["0.pt", "1.pt"] and labels[1].shape == (2, 1, 1, 1)
    with pytest.raises(ValueError, match="0.jpg and .*0.png share one name"):
        tokens.TokenLabels(tmp_path / "maps", tree, tree)


@pytest.fixture
def photos(tmp_path):
    """An ImageFolder tree of two classes, and a label map for every training image."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            (tmp_path / "maps" / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8))
                image.save(tmp_path / "photos" / split / name / f"{i}.png")
                if split == "train":
                    scores = torch.stack([torch.full((2, 18, 18), 9.0), torch.full((2, 18, 18), float(label))])
                    scores[0, 1], scores[1, 1] = 0, 1 - label
                    torch.save(scores.half(), tmp_path / "maps" / name / f"{i}.pt")
    return tmp_path


def test_samples_bring_their_own_map(photos):
    config = Config(**PLAIN, data=str(photos / "photos"), token_labels=str(photos / "maps"), limit=6)
    training, _, _ = classification.datasets(config)
    for index in range(6):
        image, label, label_map, matrix = training[0, index]
        assert image.shape == (32, 32, 3) and label_map.shape == (2, 2, 18, 18) and torch.equal(matrix, torch.eye(3))
        assert (label_map[1, 0] == label).all() and (label_map[0, 0] == 9).all()


@pytest.mark.parametrize("attn", ["outlook", "elsa"])
def test_trains_on_label_maps(photos, attn, tmp_path):
    history = train(Config(**{
        **VOLO, "attn": attn, "data": str(photos / "photos"), "token_labels": str(photos / "maps"), "limit": None,
        "ground_truth": True, "label_smoothing": 0.1, "flip": 0.5, "randaugment": 9.0, "out": str(tmp_path / "run"),
    }))
    assert len(history) == 2 and all(math.isfinite(row["train_loss"]) for row in history)


def test_what_is_wrong_with_label_maps_is_said(photos):
    def datasets():
        config = Config(**PLAIN, data=str(photos / "photos"), token_labels=str(photos / "maps"))
        return classification.datasets(config)[0]

    broken = photos / "maps" / "dog" / "0.pt"
    for content, words in (
        (torch.zeros(3, 18, 18), "(2, classes, rows, columns)"),
        (torch.full((2, 5, 18, 18), 2.0), "2 classes"),
        (torch.full((2, 5, 18, 18), -1.0), "classes -1 to -1"),
        (torch.full((2, 5, 18, 18), float("nan")), "(NaN)"),
        (b"junk", "cannot be read"),
    ):
        broken.write_bytes(content) if isinstance(content, bytes) else torch.save(content, broken)
        with pytest.raises(ValueError, match="0.pt") as error:
            datasets()[0, 8]
        assert words in str(error.value)
    broken.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 16 images have no label map.*dog/0.pt"):
        datasets()


def test_label_maps_on_a_failing_disk_are_asked_for_three_times(photos, monkeypatch):
    training, _, _ = classification.datasets(
        Config(**PLAIN, data=str(photos / "photos"), token_labels=str(photos / "maps")))
    load, failures = torch.load, []

    def fail(*arguments, **options):
        if failures:
            raise failures.pop()
        return load(*arguments, **options)
    monkeypatch.setattr(torch, "load", fail)
    monkeypatch.setattr(photographs, "PAUSES", (0, 0))
    failures += [OSError(errno.EIO, "Input/output error")] * 2
    assert training[0, 8][2].shape == (2, 2, 18, 18)
    failures += [OSError(errno.EIO, "Input/output error")] * 3
    with pytest.raises(OSError, match="dog/0.pt could not be read: Input/output error"):
        training[0, 8]


# Training VOLO

def test_resumed_run_ends_bit_identical(tmp_path, monkeypatch):
    def run(name, **changes):
        config = Config(**{**VOLO, "attn": "elsa", "out": str(tmp_path / name), **changes})
        history = train(config)
        return history, torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]

    history, whole = run("whole")
    def power_cut(*arguments):
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(loop, "close_epoch", power_cut)
        with pytest.raises(InterruptedError):
            run("parts")
    config = Config(**{**VOLO, "attn": "elsa", "out": str(tmp_path / "parts")})
    resumed = train(config, resume=True)
    parts = torch.load(tmp_path / "parts" / "last.pt", weights_only=True)["model"]
    assert [row["train_loss"] for row in resumed] == [row["train_loss"] for row in history]
    assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


def test_fine_tuning_starts_from_the_given_weights(tmp_path):
    train(Config(**{**VOLO, "epochs": 1, "warmup_epochs": 0.0, "out": str(tmp_path / "first")}))
    first = str(tmp_path / "first" / "last.pt")
    still = dict(epochs=1, warmup_epochs=0.0, lr=0.0, min_lr=0.0, mix_token=0.0, weights=first)
    train(Config(**{**VOLO, **still, "out": str(tmp_path / "second"), "img_size": 48}))
    load = lambda name: torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
    trained, tuned = load("first"), load("second")
    assert tuned["pos_embed"].shape == (1, 6, 6, 24) and torch.equal(trained["head.weight"], tuned["head.weight"])
    train(Config(**{**VOLO, **still, "out": str(tmp_path / "third"), "num_classes": 11, "fresh_head": True}))
    other, body = load("third"), "network.2.0.mlp.fc1.weight"
    assert other["head.weight"].shape == (11, 24) and torch.equal(trained[body], other[body])


@pytest.mark.parametrize("changes, words", [
    (dict(model="swin_t", patch_size=2, window_size=2, model_args={}), "swin_t has none"),
])
def test_tokens_need_a_model_that_has_them(changes, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        train(Config(**{**VOLO, **changes, "out": str(tmp_path / "run")}))


@pytest.mark.parametrize("options, words", [(dict(mix_token=1, mixup=0.8), "mix_token = 1.0.*an image is mixed once"),
                                            (dict(token_labels="maps"), "token_labels = 'maps'.*without --data"),
                                            (dict(mix_token=-1), "mix_token = -1.0.*0 or more")])
def test_options_that_do_not_fit_together(options, words):
    with pytest.raises(ValueError, match=words):
        resolve(dict(model="volo_d1", **options))


@pytest.mark.parametrize("name, lr, drop_path, crop_pct", [("volo_d1", 1.6e-3, 0.1, 0.96), ("volo_d2", 1e-3, 0.2, 0.96),
                                                           ("volo_d3", 1e-3, 0.5, 0.96)])
def test_recipes_are_the_published_ones(name, lr, drop_path, crop_pct):
    config, _ = resolve(dict(model=name, data="photos"))
    assert (config.lr, config.drop_path_rate, config.crop_pct) == (lr, drop_path, crop_pct)
    assert (config.epochs, config.batch_size, config.warmup_epochs) == (310, 1024, 20)
    assert (config.weight_decay, config.min_lr, config.clip_grad) == (0.05, 1e-5, 0)
    assert (config.mix_token, config.dense_weight, config.mixup, config.cutmix, config.erasing) == (1, 0.5, 0, 0, 0.25)


@pytest.mark.parametrize("name, size, batch_size, drop_path", [
    ("volo_d1_384", 384, 512, 0.1), ("volo_d2_384", 384, 384, 0.2), ("volo_d3_448", 448, 240, 0.5)])
def test_fine_tuning_recipes_are_the_published_ones(name, size, batch_size, drop_path):
    config, _ = resolve(dict(model=name[:7], data="photos"), recipe=name)
    assert (config.img_size, config.batch_size, config.drop_path_rate) == (size, batch_size, drop_path)
    assert (config.lr, config.min_lr, config.weight_decay) == (8e-6, 4e-6, 1e-8)
    assert (config.epochs, config.warmup_epochs) == (40, 5)
    assert config.ground_truth and config.mix_token == 1


def test_every_shipped_recipe_is_valid():
    for path in RECIPES.glob("*.yaml"):
        config, _ = resolve(dict(data=None if path.stem.startswith("scenes") else "photos"), recipe=path)
        assert config.img_size >= 32
