"""Mean intersection over union on ADE20K, on any folder of its layout, or on the rendered scenes."""
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image

from eval import evaluating, refuse_other_names
from models.upernet import resize_rows, source_rows
from train import data, segmentation
from train.ade_folder import IGNORED, named_classes
from train.device import autocast
from train.distributed import max_over_ranks, sum_over_ranks
from train.progress import rate_of
from train.run_folder import replace_atomically

METRICS = {"miou": "mIoU", "mean_accuracy": "mean accuracy", "pixel_accuracy": "pixel accuracy"}  # per cent
DUMPS, MULTI_SCALE = "folder", True  # what `run.py eval` can be asked for
STRIP = 2 ** 23  # probabilities that are in memory at a time
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale evaluation, as published


def dataset(config, classes, multi_scale=False):
    """(Dataset, names of the classes). classes: names of the checkpoint's classes, or None: those of the data.

    multi_scale: every photograph at six scales, each mirrored, too. Raises ValueError where the checkpoint and the data
    name other classes, or the same in another order. Where one of them has numbers for names, the other's hold.
    """
    names = segmentation.Scenes.classes if config.data is None else named_classes(config.data)
    numbers = [str(number) for number in range(1, len(classes or ()) + 1)]
    if classes and names and (list(classes) != numbers or len(names) != len(classes)):
        refuse_other_names(classes, names, config.data)
    classes = names or classes or segmentation.class_names(config)
    ratios = RATIOS if multi_scale else (1.0,)
    return segmentation.validation_set(config, classes, ratios, flip=multi_scale), classes


def loader(dataset, batch_size, rank, world, workers):
    """Every photograph once over all ranks, in lists of at most `batch_size` whose views are of the same sizes."""
    return data.validation_loader(dataset, batch_size, rank, world, workers, by_shape=True)


def evaluate(model, loader, device, amp="none", dump=None):
    """Scores of a segmenter over all ranks, each of which brings its part of the photographs in `loader`.

    loader: yields lists of (views, labels (H, W), name), see predict(). dump: folder for the predictions, PNGs where 1
    is the first class. Returns scores(), "loss": mean cross-entropy of the labelled pixels, "images", and "seconds" of
    the slowest rank.
    """
    matrix, loss, images, start = None, 0.0, 0, time.perf_counter()
    with evaluating(model):
        for views, labels, name, coarse in with_logits(model, loader, device, amp):
            labels = labels.to(device)
            predicted = torch.empty_like(labels)
            for rows, probabilities in strips(views, coarse, labels.shape):
                num_classes, predicted[rows] = len(probabilities), probabilities.argmax(0)
                log = probabilities.clamp_min(1e-12).log()[None]
                of_pixels = F.nll_loss(log, labels[None, rows], ignore_index=IGNORED, reduction="none")
                loss += float(of_pixels.double().sum())
            counted = confusion(labels, predicted, num_classes)
            matrix = counted if matrix is None else matrix + counted
            images += 1
            if dump:
                path = Path(dump) / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                label_map = Image.fromarray((predicted + 1).to(torch.uint8).cpu().numpy())
                replace_atomically(path, lambda file: label_map.save(file, format="png"))
    seconds = max_over_ranks(time.perf_counter() - start, device)
    num_classes = max_over_ranks(0 if matrix is None else len(matrix), device)  # a rank may have had no photograph
    if matrix is None:
        matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
    matrix = sum_over_ranks(matrix)
    loss, images = sum_over_ranks(torch.tensor([loss, images], dtype=torch.float64, device=device)).tolist()
    return {**scores(matrix), "loss": loss / max(1, int(matrix.sum())), "images": int(images), "seconds": seconds}


def table(result, classes):
    """The scores as text: of every class, then their means."""
    lines = [f"{'class':<24} {'IoU':>7} {'accuracy':>9}"]
    for name, iou, accuracy in zip(classes, result["iou"], result["accuracy"]):
        lines.append(f"{name:<24.24} {iou:>7.2f} {accuracy:>9.2f}")
    lines.append(f"mIoU {result['miou']:.2f}  mean accuracy {result['mean_accuracy']:.2f}  "
                 f"pixel accuracy {result['pixel_accuracy']:.2f}  {result['images']} images  "
                 f"{rate_of(result['images'] / result['seconds'])} images/s")
    return "\n".join(lines)


def predict(model, views, size, device="cpu", amp="none"):
    """Mean over the views of the classes' probabilities, strip after strip of the photograph, see strips().

    views: [(image (3, h, w) float32, whether it is mirrored), ...]. size: (H, W) of the photograph.
    """
    return strips(views, coarse_logits(model, [image for image, _ in views], device, amp), size)


def with_logits(model, loader, device, amp):
    """Of every photograph in the lists of `loader`: views, labels, name, coarse_logits() of the views."""
    for samples in loader:
        images = [image for views, _, _ in samples for image, _ in views]
        coarse = iter(coarse_logits(model, images, device, amp, len(samples)))
        for views, labels, name in samples:
            yield views, labels, name, [next(coarse) for _ in views]


def coarse_logits(model, images, device, amp, most=1):
    """[(1, classes, h / 4, w / 4), ...] of images (3, h, w) float32. Those of one size go through the model together,
    at most `most`, which changes what it gives by rounding alone."""
    of_size, coarse = {}, [None] * len(images)
    for place, image in enumerate(images):
        of_size.setdefault(image.shape, []).append(place)
    for places in of_size.values():
        for chosen in (places[first:first + most] for first in range(0, len(places), most)):
            batch = torch.stack([images[place] for place in chosen]).to(device, non_blocking=True)
            with autocast(torch.device(device), amp):
                logits = model(batch, coarse=True)
            for place, own in zip(chosen, logits.split(1)):
                coarse[place] = own
    return coarse


def strips(views, coarse, size):
    """Mean over the views of the classes' probabilities: yields (slice of rows, (classes, rows, W) float32). All rows
    at once would take 600 MB a megapixel.

    coarse: logits of each view. As published they are resized to the view's size and then to the photograph's, (H, W),
    before the softmax.
    """
    H, W = size
    step = max(1, STRIP // (coarse[0].shape[1] * W))
    for top in range(0, H, step):
        rows = slice(top, min(top + step, H))
        total = 0
        for (image, mirrored), logits in zip(views, coarse):
            h, w = image.shape[1:]
            upper, lower, _ = source_rows(h, H, rows.start, rows.stop)
            first, last = int(upper[0]), int(lower[-1]) + 1
            logits = resize_rows(logits, (h, w), first, last).float()
            probabilities = resize_rows(logits, (H, W), rows.start, rows.stop, first, h).softmax(1)[0]
            total = total + (probabilities.flip(2) if mirrored else probabilities)
        yield rows, total / len(views)


def confusion(labels, predicted, num_classes):
    """(classes, classes) int64: [i, j] counts the pixels of class i that were predicted as j. 255 is ignored."""
    valid = labels != IGNORED
    pairs = labels[valid].long() * num_classes + predicted[valid].long()
    return torch.bincount(pairs, minlength=num_classes ** 2).reshape(num_classes, num_classes)


def scores(matrix):
    """Of a confusion matrix: {"miou", "mean_accuracy", "pixel_accuracy": per cent, "iou", "accuracy": per class, NaN
    where absent}.

    A class that neither labels nor predictions have is left out of miou, one that the labels lack out of mean_accuracy.
    """
    matrix = matrix.double().cpu()
    hit, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = 100 * hit / (labelled + predicted - hit), 100 * hit / labelled  # 0 / 0 is NaN
    return {"miou": iou.nanmean().item(), "mean_accuracy": accuracy.nanmean().item(),
            "pixel_accuracy": (100 * hit.sum() / matrix.sum()).item(),
            "iou": iou.tolist(), "accuracy": accuracy.tolist()}
