"""Average precision of boxes and masks on COCO, on any folder of its layout, or on the rendered scenes."""
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch.utils.data import DataLoader, Subset

from eval import options
from train import data
from train.device import autocast, join_ranks, leave_ranks
from train.run_folder import replace_atomically

CLASSES = Path(__file__).with_name("coco_classes.txt")  # names of the 80 classes, in the order of published detectors
METRICS = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large", "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")


@torch.no_grad()
def evaluate(model, loader, device, amp="none"):
    """Average precision of a detector over all ranks, each of which brings its share of the photographs in `loader`.

    loader: yields (image (3, H, W) float32, size, original size, image id, annotations), see train.detection.Photographs.
    Returns {"box", "mask": {metric: per cent, NaN where nothing to find is of that size}, "classes": [(box AP, mask AP), ...], "results":
    detections as COCO's JSON has them, but with labels from 0, "box_ap", "box_ap50", "mask_ap", "images", and of the slowest rank
    "seconds"}.
    """
    training = model.training
    model.eval()
    photographs, start = [], time.perf_counter()
    for image, size, original, image_id, annotations in loader:
        with autocast(torch.device(device), amp):
            found = model(image[None].to(device, non_blocking=True), [size], [original])[0]
        photographs.append((image_id, tuple(original), annotations, results(found, image_id)))
    seconds = torch.tensor(time.perf_counter() - start, device=device)
    model.train(training)
    classes, answer = model.num_classes, [None]
    if dist.is_initialized():
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, photographs)
        photographs = [photograph for part in parts for photograph in part]
    photographs.sort(key=lambda photograph: photograph[0])
    if not dist.is_initialized() or dist.get_rank() == 0:
        answer = [scores(photographs, classes)]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    answer = {**answer[0], "images": len(photographs), "seconds": float(seconds)}
    return {**answer, "results": [entry for *_, entries in photographs for entry in entries]}


def results(found, image_id):
    """Detections of a photograph, what a model gives for it, as entries of COCO's results JSON; category_id is the label, from 0."""
    boxes = found["boxes"].cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    masks = rle.encode(np.asfortranarray(found["masks"].cpu().numpy().astype(np.uint8).transpose(1, 2, 0))) if len(boxes) else []
    return [{"image_id": image_id, "category_id": label, "bbox": box, "score": score, "segmentation": mask}
            for label, box, score, mask in zip(found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), masks)]


def scores(photographs, classes):
    """The twelve numbers of COCO, for boxes and for masks, and the AP of every class: see evaluate().

    photographs: [(image id, (h, w), annotations, results), ...]. classes: how many.
    """
    images = [{"id": image_id, "height": h, "width": w} for image_id, (h, w), _, _ in photographs]
    annotations = [annotation for _, _, entries, _ in photographs for annotation in entries]
    truth = COCO({"images": images, "categories": [{"id": i, "name": str(i)} for i in range(classes)],
                  "annotations": [{**annotation, "id": i + 1} for i, annotation in enumerate(annotations)]})
    answer, per_class = {}, []
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        # Copied, because boxes would be taken for masks, and areas written into what is ours.
        entries = [{key: value for key, value in entry.items() if key != ("segmentation" if kind == "bbox" else "bbox")}
                   for *_, found in photographs for entry in found]
        evaluation = COCOeval_faster(truth, truth.loadRes(entries), kind, print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        answer[name] = {metric: 100 * float(value) if value >= 0 else float("nan") for metric, value in zip(METRICS, evaluation.stats)}
        precision = evaluation.eval["precision"][:, :, :, 0, -1]  # (thresholds of IoU, recalls, classes): all sizes, 100 detections
        per_class.append([100 * float(p[p >= 0].mean()) if (p >= 0).any() else float("nan") for p in np.moveaxis(precision, 2, 0)])
    return {**answer, "classes": list(zip(*per_class)), "box_ap": answer["box"]["AP"], "box_ap50": answer["box"]["AP50"],
            "mask_ap": answer["mask"]["AP"]}


def loader(dataset, rank, world, workers):
    """Every photograph once over all ranks, one at a time."""
    return DataLoader(Subset(dataset, range(rank, len(dataset), world)), batch_size=None, num_workers=workers)


def table(result, classes):
    """The scores as text: of every class, then COCO's twelve."""
    rows = [f"{name:<24.24} {box:>7.2f} {mask:>8.2f}" for name, (box, mask) in zip(classes, result["classes"])]
    rows = [f"{'class':<24} {'box AP':>7} {'mask AP':>8}", *rows, "", f"{'':<24} {'box':>7} {'mask':>8}"]
    return "\n".join(rows + [f"{metric:<24} {result['box'][metric]:>7.2f} {result['mask'][metric]:>8.2f}" for metric in METRICS])


def run(config, weights, classes, dump=None):
    """`run.py eval` of a detector: prints the scores, and returns the result of evaluate().

    config: Config. weights: file or None. classes: names of the checkpoint's classes, or None. dump: file for the detections, COCO's
    results JSON.
    """
    from train import detection  # not above: the task trains with evaluate()
    rank, world, device = join_ranks(config.device)
    try:
        photographs, names = detection.validation_set(config)
        if classes is not None and list(classes) != names:
            differing = [(ours, theirs) for ours, theirs in zip(classes, names) if ours != theirs]
            raise ValueError(f"--data has {len(names)} classes, the checkpoint {len(classes)}; expected the same, in the order of their ids. "
                             f"The first that differ: {differing[:3]}")
        config.num_classes = config.num_classes or len(names)
        if config.num_classes < len(names):
            raise ValueError(f"num_classes = {config.num_classes}, but the data has {len(names)}; expected at least as many")
        model = options.load_model(config, weights)
        workers = config.workers if config.workers is not None else data.default_workers(config)
        if rank == 0:
            what = f"{len(photographs)} images of {config.data or 'held-out rendered scenes'}, short side {config.img_size} px"
            print(options.heading(config, weights, what, world, device), flush=True)
        result = evaluate(model.to(device), loader(photographs, rank, world, workers), device, config.amp)
        if rank == 0:
            if dump:
                write_results(result["results"], photographs.category_ids, dump)
            print(table(result, names))
            print(f"box AP {result['box_ap']:.2f}  box AP50 {result['box_ap50']:.2f}  mask AP {result['mask_ap']:.2f}  "
                  f"{result['images']} images  {result['images'] / result['seconds']:.2f} images/s")
        return result
    finally:
        leave_ranks()


def write_results(entries, category_ids, path):
    """Detections as COCO's results JSON, under the data's own category ids."""
    entries = [{**entry, "category_id": category_ids[entry["category_id"]],
                "segmentation": {**entry["segmentation"], "counts": entry["segmentation"]["counts"].decode()}} for entry in entries]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda file: file.write(json.dumps(entries).encode()))
