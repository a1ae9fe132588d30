"""Top-1 and top-5 accuracy on ImageNet, on any folder tree of that layout, or on the rendered scenes; and the speed of it."""
import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from eval import options
from train import data
from train.device import autocast, join_ranks, leave_ranks

WNIDS = Path(__file__).with_name("imagenet_wnids.txt")  # class index -> WordNet id, which is the name of ImageNet's folders


@torch.no_grad()
def evaluate(model, loader, device, amp="none"):
    """Accuracy of a classifier over all ranks, each of which brings its share of the images in `loader`.

    model: images (B, 3, H, W) float32 -> logits (B, classes). Its training mode is restored afterwards. amp: "bf16", "fp16" or "none".
    Returns {"top1", "top5": per cent, "loss": mean cross-entropy, "images": how many, "seconds": of the slowest rank, loading
    included}. Top-5 of fewer than five classes counts all of them.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, images
    start = time.perf_counter()
    for images, labels in loader:
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        with autocast(device, amp):
            logits = model(images)
        logits = logits.float()  # (B, classes)
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=device)])
    totals = sums.tolist()  # waits for the device
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        totals = sums.tolist()
    model.train(training)
    top1, top5, loss, images = totals
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images),
            "seconds": float(seconds)}


def run(config, weights, classes):
    """`run.py eval` of a classifier: prints top-1, top-5 and images per second, and returns the result of evaluate().

    config: Config. weights: file or None. classes: names of the checkpoint's classes, or None.
    """
    rank, world, device = join_ranks(config.device)
    try:
        images, config.num_classes = evaluation_set(config, classes)
        model = options.load_model(config, weights)
        workers = config.workers if config.workers is not None else data.default_workers(config)
        loader = data.validation_loader(images, math.ceil(config.batch_size / world), rank, world, workers)
        if rank == 0:
            what = f"{len(images)} images of {config.data or 'held-out rendered scenes'} at {config.img_size} px"
            print(options.heading(config, weights, what, world, device), flush=True)
        result = evaluate(model.to(device), loader, device, config.amp)
        if rank == 0:
            print(f"top-1 {result['top1']:.2f}  top-5 {result['top5']:.2f}  {result['images']} images  "
                  f"{result['images'] / result['seconds']:.1f} images/s")
        return result
    finally:
        leave_ranks()


def evaluation_set(config, classes):
    """(Dataset, width of the classifier). The labels are classes of the model, whichever part of its classes the folder has."""
    if config.data is None:
        return data.held_out_scenes(config), config.num_classes or len(data.Scenes.classes)
    images = data.image_folder(data.evaluation_folder(config.data), data.validation_transform(config.img_size, config.crop_pct))
    indices, width = class_indices(images.classes, classes, config.num_classes)
    images.target_transform = indices.__getitem__
    return data.balanced(images, config.val_limit), width


def class_indices(folders, classes, num_classes):
    """Which class of the model each folder is -> (list of indices, number of classes).

    By name where the checkpoint names its classes; by WordNet id where the folders are ImageNet classes, all or some, and the model
    has 1000; else by alphabetical order, which needs as many folders as classes. Raises ValueError where none applies.
    """
    wnids = WNIDS.read_text().split()
    if classes is None and num_classes in (None, len(wnids)) and set(folders) <= set(wnids):
        classes = wnids
    if classes is not None:
        unknown = [folder for folder in folders if folder not in classes]
        if unknown:
            raise ValueError(f"--data has folders that are no classes of the model: {unknown[:5]}; its classes are {list(classes[:5])}...")
        return [classes.index(folder) for folder in folders], num_classes or len(classes)
    if num_classes not in (None, len(folders)):
        raise ValueError(f"--data has {len(folders)} folders, the model {num_classes} classes, and the folders' names do not say which is "
                         "which; expected as many folders as classes, or ImageNet's WordNet ids (n01440764, ...)")
    return list(range(len(folders))), len(folders)
