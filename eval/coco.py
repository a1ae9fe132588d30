"""Average precision of boxes and masks on COCO, on any folder of its layout, or on the rendered scenes."""
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle

from eval import evaluating, refuse_other_names
from train import data, detection
from train.device import autocast
from train.distributed import from_rank_0, gather_to_rank_0, max_over_ranks
from train.progress import rate_of
from train.run_folder import replace_atomically

METRICS = {"box_ap": "box AP", "box_ap50": "box AP50", "mask_ap": "mask AP"}  # per cent
UNKNOWN = {name: None for name in ("box", "mask", "classes", *METRICS)}  # scores of data without annotations
DUMPS, MULTI_SCALE = "file", False  # what `run.py eval` can be asked for
CLASSES = Path(__file__).with_name("coco_classes.txt")  # names of the 80 classes, in the order of published detectors
# COCO's twelve numbers.
SUMMARY = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large",
           "AR 1", "AR 10", "AR 100", "AR small", "AR medium", "AR large")


def dataset(config, classes):
    """(Dataset, names of the classes). classes: names of the checkpoint's classes, which have to be those of the data,
    or None."""
    photographs, names = detection.validation_set(config)
    if classes is not None:
        refuse_other_names(classes, names, config.data)
    return photographs, names


def loader(dataset, batch_size, rank, world, workers):
    """Every photograph once over all ranks, in lists of at most `batch_size` that are padded to the same size.

    Not, as in training, to the size of the largest: features at the lower and right border see the padding, in windows
    and convolutions, and more of it would change what is found.
    """
    return data.validation_loader(dataset, batch_size, rank, world, workers, by_shape=True)


def evaluate(model, loader, device, amp="none", dump=None):
    """Average precision of a detector over all ranks, each of which brings its part of the photographs in `loader`.

    loader: yields lists of (image (3, H, W) float32, size, original size, index, annotations), see
    train.detection.Photographs. dump: file for the detections, COCO's results JSON. Returns {"box", "mask": {metric:
    per cent, NaN where nothing to find is of that size}, "classes": [(box AP, mask AP), ...], "box_ap", "box_ap50",
    "mask_ap", "images", and of the slowest rank "seconds"}; of a test set without annotations None for the scores.
    Raises ValueError when that is not to be dumped.
    """
    source = loader.dataset.dataset  # the loader has a part of the data set
    if not source.annotated and not dump:
        raise ValueError("the data has no annotations, so that nothing can be scored; --dump FILE writes what is found")
    photographs, start = [], time.perf_counter()
    with evaluating(model):
        for samples in loader:
            # On a CPU more at a time take no less time, but more memory.
            at_a_time = len(samples) if device.type == "cuda" else 1
            for first in range(0, len(samples), at_a_time):
                part = samples[first:first + at_a_time]
                for (_, _, original, index, annotations), found in zip(part, detect(model, part, device, amp)):
                    photographs.append((index, tuple(original), annotations, results(found, index)))
    seconds = max_over_ranks(time.perf_counter() - start, device)
    photographs = gather_to_rank_0(photographs)  # the others need theirs no longer
    answer = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        photographs.sort(key=lambda photograph: photograph[0])
        answer = scores(photographs, model.num_classes) if source.annotated else UNKNOWN
        answer = {**answer, "images": len(photographs)}
        if dump:
            write_results([entry for *_, found in photographs for entry in found], source, dump)
    return {**from_rank_0(answer), "seconds": seconds}


def detect(model, samples, device, amp="none"):
    """What a detector finds in samples whose images are padded to one size: as it gives it, a dict an image. They go
    through it together, which changes what it gives by rounding alone."""
    images, sizes, originals, *_ = zip(*samples)
    with autocast(device, amp):
        return model(torch.stack(images).to(device, non_blocking=True), sizes, originals)


def table(result, classes):
    """The scores as text: of every class, then COCO's twelve, then the most important in one line."""
    speed = f"{result['images']} images  {rate_of(result['images'] / result['seconds'])} images/s"
    if result["box_ap"] is None:
        return f"no scores: the data has no annotations  {speed}"
    lines = [f"{'class':<24} {'box AP':>7} {'mask AP':>8}"]
    for name, (box, mask) in zip(classes, result["classes"]):
        lines.append(f"{name:<24.24} {box:>7.2f} {mask:>8.2f}")
    lines += ["", f"{'':<24} {'box':>7} {'mask':>8}"]
    for metric in SUMMARY:
        lines.append(f"{metric:<24} {result['box'][metric]:>7.2f} {result['mask'][metric]:>8.2f}")
    lines.append(f"box AP {result['box_ap']:.2f}  box AP50 {result['box_ap50']:.2f}  mask AP {result['mask_ap']:.2f}  "
                 + speed)
    return "\n".join(lines)


def results(detections, index):
    """Detections of a photograph, what a model gives for it, as entries of COCO's results JSON.

    image_id is the index of the photograph, category_id the label, from 0.
    """
    boxes = detections["boxes"].cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    masks = detections["masks"].cpu().numpy().astype(np.uint8).transpose(1, 2, 0)
    codes = rle.encode(np.asfortranarray(masks)) if len(boxes) else []
    labels, scores = detections["labels"].tolist(), detections["scores"].tolist()
    return [{"image_id": index, "category_id": label, "bbox": box, "score": score, "segmentation": code}
            for label, box, score, code in zip(labels, boxes.tolist(), scores, codes)]


def scores(photographs, num_classes):
    """The twelve numbers of COCO, for boxes and for masks, and the AP of every class: see evaluate().

    photographs: [(index, (h, w), annotations, results), ...]. In the scores of masks an object without one is a region
    to be ignored, its box: what is found there is neither right nor wrong.
    """
    sizes = {index: size for index, size, _, _ in photographs}
    annotations = [annotation for _, _, entries, _ in photographs for annotation in entries]
    truth, answer, per_class = as_truth(annotations, sizes, num_classes), {}, []
    for name, kind, other in (("box", "bbox", "segmentation"), ("mask", "segm", "bbox")):
        if kind == "segm" and any(annotation["segmentation"] is None for annotation in annotations):
            regions = [annotation if annotation["segmentation"] is not None
                       else as_crowd(annotation, *sizes[annotation["image_id"]]) for annotation in annotations]
            truth = as_truth(regions, sizes, num_classes)
        # Copied, because boxes would be taken for masks, and areas written into what is ours.
        entries = [{key: value for key, value in entry.items() if key != other}
                   for *_, found in photographs for entry in found]
        evaluation = COCOeval_faster(truth, truth.loadRes(entries), kind, print_function=lambda *_: None)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        answer[name] = {metric: 100 * float(value) if value >= 0 else float("nan")
                        for metric, value in zip(SUMMARY, evaluation.stats)}
        # (thresholds of IoU, recalls, classes): all sizes, 100 detections
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        per_class.append([100 * float(p[p >= 0].mean()) if (p >= 0).any() else float("nan")
                          for p in np.moveaxis(precision, 2, 0)])
    return {**answer, "classes": list(zip(*per_class)), "box_ap": answer["box"]["AP"],
            "box_ap50": answer["box"]["AP50"], "mask_ap": answer["mask"]["AP"]}


def as_truth(annotations, sizes, num_classes):
    """Annotations of images {index: (h, w)} as the evaluator takes them."""
    return COCO({"images": [{"id": index, "height": h, "width": w} for index, (h, w) in sizes.items()],
                 "categories": [{"id": i, "name": str(i)} for i in range(num_classes)],
                 "annotations": [{**annotation, "id": i + 1} for i, annotation in enumerate(annotations)]})


def as_crowd(annotation, height, width):
    """A box without a mask as a crowd that fills it."""
    x, y, w, h = annotation["bbox"]
    code, = rle.frPyObjects([[x, y, x + w, y, x + w, y + h, x, y + h]], height, width)
    return {**annotation, "iscrowd": 1, "segmentation": code}


def write_results(entries, dataset, path):
    """Detections as COCO's results JSON, under the data's own ids of images and categories, without those of other
    classes, which a model may have."""
    written = []
    for entry in entries:
        if entry["category_id"] >= len(dataset.category_ids):
            continue
        code = {**entry["segmentation"], "counts": entry["segmentation"]["counts"].decode()}
        written.append({**entry, "image_id": dataset.image_id(entry["image_id"]),
                        "category_id": dataset.category_ids[entry["category_id"]], "segmentation": code})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_atomically(path, lambda file: file.write(json.dumps(written).encode()))
