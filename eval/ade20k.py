"""Mean intersection over union on ADE20K, on any folder of its layout, or on the rendered scenes."""
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Subset

from eval import options
from train import data
from train.device import autocast, join_ranks, leave_ranks

RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of multi-scale evaluation, as published
IGNORED = 255


def predict(model, views, size, device="cpu", amp="none"):
    """Mean over the views of the classes' probabilities -> (classes, H, W) float32.

    views: [(image (3, h, w) float32, whether it is mirrored), ...]. size: (H, W) of the photograph. As published, logits are
    resized to a view's size, which the model does, and then to the photograph's, before the softmax.
    """
    total = 0
    for image, mirrored in views:
        with autocast(torch.device(device), amp):
            logits = model(image[None].to(device, non_blocking=True))
        probabilities = F.interpolate(logits.float(), tuple(size), mode="bilinear").softmax(1)[0]
        total = total + (probabilities.flip(2) if mirrored else probabilities)
    return total / len(views)


def confusion(labels, predicted, classes):
    """(classes, classes) int64: [i, j] counts the pixels of class i that were predicted as j. labels: 255 is ignored."""
    valid = labels != IGNORED
    return torch.bincount(labels[valid].long() * classes + predicted[valid].long(), minlength=classes ** 2).reshape(classes, classes)


def scores(matrix):
    """Of a confusion matrix: {"miou", "mean_accuracy", "pixel_accuracy": per cent, "iou", "accuracy": per class, NaN where absent}.

    A class that neither labels nor predictions have is left out of miou, one that the labels lack out of mean_accuracy.
    """
    matrix = matrix.double().cpu()
    hit, labelled, predicted = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = 100 * hit / (labelled + predicted - hit), 100 * hit / labelled  # 0 / 0 is NaN
    return {"miou": iou.nanmean().item(), "mean_accuracy": accuracy.nanmean().item(),
            "pixel_accuracy": (100 * hit.sum() / matrix.sum()).item(), "iou": iou.tolist(), "accuracy": accuracy.tolist()}


@torch.no_grad()
def evaluate(model, loader, device, amp="none", dump=None):
    """Scores of a segmenter over all ranks, each of which brings its share of the photographs in `loader`.

    loader: yields (views, labels (H, W), name), see predict(). dump: folder for the predictions, PNGs where 1 is the first class.
    Returns scores(), "loss": mean cross-entropy of the labelled pixels, "images", and "seconds" of the slowest rank.
    """
    training = model.training
    model.eval()
    matrix, loss, images, start = None, 0.0, 0, time.perf_counter()
    for views, labels, name in loader:
        labels = labels.to(device)
        probabilities = predict(model, views, labels.shape, device, amp)
        classes, predicted = len(probabilities), probabilities.argmax(0)
        counted = confusion(labels, predicted, classes)
        matrix = counted if matrix is None else matrix + counted
        loss += float(F.nll_loss(probabilities.clamp_min(1e-12).log()[None], labels[None], ignore_index=IGNORED, reduction="sum"))
        images += 1
        if dump:
            Path(dump).mkdir(parents=True, exist_ok=True)
            Image.fromarray((predicted + 1).to(torch.uint8).cpu().numpy()).save(Path(dump) / f"{name}.png")
    sums = torch.tensor([loss, images], dtype=torch.float64, device=device)
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    if dist.is_initialized():
        shape = torch.tensor(0 if matrix is None else len(matrix), device=device)  # a rank may have had no photograph
        dist.all_reduce(shape, dist.ReduceOp.MAX)
        matrix = torch.zeros(int(shape), int(shape), dtype=torch.int64, device=device) if matrix is None else matrix
        for tensor, operation in ((matrix, dist.ReduceOp.SUM), (sums, dist.ReduceOp.SUM), (seconds, dist.ReduceOp.MAX)):
            dist.all_reduce(tensor, operation)
    model.train(training)
    return {**scores(matrix), "loss": float(sums[0]) / max(1, int(matrix.sum())), "images": int(sums[1]), "seconds": float(seconds)}


def loader(dataset, rank, world, workers):
    """Every photograph once over all ranks, one at a time."""
    return DataLoader(Subset(dataset, range(rank, len(dataset), world)), batch_size=None, num_workers=workers)


def table(result, classes):
    """The scores of every class, as text."""
    rows = [f"{name:<24.24} {iou:>7.2f} {accuracy:>9.2f}" for name, iou, accuracy in zip(classes, result["iou"], result["accuracy"])]
    return "\n".join([f"{'class':<24} {'IoU':>7} {'accuracy':>9}", *rows])


def run(config, weights, classes, multi_scale=False, dump=None):
    """`run.py eval` of a segmenter: prints the scores of every class and their means, and returns the result of evaluate()."""
    from train import segmentation  # not above: the task trains with evaluate()
    rank, world, device = join_ranks(config.device)
    try:
        scenes = config.data is None
        classes = classes or (segmentation.SegmentationScenes.classes if scenes else segmentation.class_names(config))
        config.num_classes = config.num_classes or len(classes)
        photographs = segmentation.validation_set(config, classes, RATIOS if multi_scale else (1.0,), flip=multi_scale)
        model = options.load_model(config, weights)
        workers = config.workers if config.workers is not None else data.default_workers(config)
        if rank == 0:
            what = (f"{len(photographs)} images of {config.data or 'held-out rendered scenes'}, short side {config.img_size} px, "
                    f"{'6 scales, each mirrored too' if multi_scale else 'one scale'}")
            print(options.heading(config, weights, what, world, device), flush=True)
        result = evaluate(model.to(device), loader(photographs, rank, world, workers), device, config.amp, dump)
        if rank == 0:
            print(table(result, classes))
            print(f"mIoU {result['miou']:.2f}  mean accuracy {result['mean_accuracy']:.2f}  pixel accuracy {result['pixel_accuracy']:.2f}  "
                  f"{result['images']} images  {result['images'] / result['seconds']:.2f} images/s")
        return result
    finally:
        leave_ranks()
