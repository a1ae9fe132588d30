"""Top-1 and top-5 accuracy on ImageNet, on any folder tree of that layout, or on the rendered scenes."""
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from eval import evaluating
from train import classification, data
from train.device import autocast, to_device
from train.distributed import max_over_ranks, sum_over_ranks
from train.progress import rate_of

METRICS = {"top1": "top-1", "top5": "top-5"}  # per cent; by the first, the best epoch is chosen
DUMPS, MULTI_SCALE = None, False  # what `run.py eval` can be asked for
# class index -> WordNet id, which is the name of ImageNet's folders
WNIDS = Path(__file__).with_name("imagenet_wnids.txt")


def dataset(config, classes):
    """(Dataset, names of the model's classes): the labels are classes of the model, whichever part of them the data
    has.

    classes: names of the checkpoint's classes, or None. Raises ValueError where they are not those of the data.
    """
    if config.data is None:
        if classes is not None and list(classes) != classification.Scenes.classes:
            raise ValueError(f"without --data a model is shown rendered scenes, whose classes this one does not have: "
                             f"it has {len(classes)}, {list(classes[:5])}...; --data names a folder")
        return classification.Scenes.of(config, validation=True), classes or classification.Scenes.classes
    images = classification.validation_folder(config)
    indices, classes = class_indices(images.classes, classes, config.num_classes)
    images.target_transform = indices.__getitem__
    return classification.balanced(images, config.val_limit), classes


def loader(dataset, batch_size, rank, world, workers):
    """Every image once over all ranks, in batches of `batch_size` of a rank."""
    return data.validation_loader(dataset, batch_size, rank, world, workers)


def evaluate(model, loader, device, amp="none", dump=None):
    """Accuracy of a classifier over all ranks, each of which brings its part of the images in `loader`.

    model: images (B, 3, H, W) float32 -> logits (B, classes). Its training mode is restored afterwards. amp: "bf16",
    "fp16" or "none". dump: None, classifiers have none. Returns {"top1", "top5": per cent, "loss": mean cross-entropy,
    "images": how many, "seconds": of the slowest rank, loading included}. Top-5 of fewer than five classes counts all
    of them.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, loss, images
    start = time.perf_counter()
    with evaluating(model):
        for images, labels in loader:
            images, labels = to_device((images, labels), device)
            with autocast(device, amp):
                logits = model(images)
            logits = logits.float()  # (B, classes)
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]  # (B, 5), best first
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=device)])
    sums.tolist()  # waits for the device
    seconds = max_over_ranks(time.perf_counter() - start, device)
    top1, top5, loss, images = sum_over_ranks(sums).tolist()
    return {"top1": 100 * top1 / images, "top5": 100 * top5 / images, "loss": loss / images, "images": int(images),
            "seconds": seconds}


def table(result, classes):
    """The scores as text: one line."""
    return (f"top-1 {result['top1']:.2f}  top-5 {result['top5']:.2f}  {result['images']} images  "
            f"{rate_of(result['images'] / result['seconds'])} images/s")


def class_indices(folders, classes, num_classes):
    """Which class of the model each folder is -> (list of indices, names of the model's classes).

    By name where the checkpoint names its classes; by WordNet id where the folders are ImageNet classes, all or some,
    and the model has 1000; else by alphabetical order, which needs as many folders as classes. Raises ValueError where
    none applies.
    """
    wnids = WNIDS.read_text().split()
    if classes is None and num_classes in (None, len(wnids)) and set(folders) <= set(wnids):
        classes = wnids
    if classes is not None:
        unknown = [folder for folder in folders if folder not in classes]
        if unknown:
            raise ValueError(f"--data has folders that are no classes of the model: {unknown[:5]}; its classes are "
                             f"{list(classes[:5])}...")
        return [classes.index(folder) for folder in folders], classes
    if num_classes not in (None, len(folders)):
        raise ValueError(f"--data has {len(folders)} folders, the model {num_classes} classes, and the folders' names "
                         "do not say which is which; expected as many folders as classes, or ImageNet's WordNet ids "
                         "(n01440764, ...)")
    return list(range(len(folders))), folders
