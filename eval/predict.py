"""`run.py predict`: what a model sees in photographs, drawn into them, with a JSON file beside each."""
import json
from pathlib import Path

import numpy as np
import torch

from eval import ade20k, coco, imagenet
from eval.drawing import colour, draw_label_map, draw_objects, with_legend
from eval.options import load_model, make_parser, settle
from train import detection, segmentation
from train.augment import validation_transform
from train.config import task_of
from train.device import autocast
from train.distributed import join_ranks
from train.photographs import load_image
from train.run_folder import replace_atomically

DRAWN = 0.3  # score from which on a detection is drawn


def main(argv):
    given, weights, images, out = parse(argv)
    config, classes = settle(given, weights, photographs=True)
    task = task_of(config.model)
    predict = {"classification": classify, "segmentation": segment, "detection": detect}[task]
    if classes is None and config.data and task != "classification":
        classes = segmentation.class_names(config) if predict is segment else detection.validation_set(config)[1]
    _, _, device = join_ranks(config.device)
    config.num_classes = config.num_classes or (len(classes) if classes else None)
    model = load_model(config, weights).to(device).eval()
    classes = classes or published_classes(task, config.num_classes)
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        drawn, found = predict(model, load_image(path), classes, config, device)
        content = json.dumps({"image": str(path), "model": config.model, **found}, indent=1) + "\n"
        replace_atomically(out / f"{path.stem}.png", lambda file: drawn.save(file, format="png"))
        replace_atomically(out / f"{path.stem}.json", lambda file: file.write(content.encode()))
        print(f"{path} -> {out / path.stem}.png, .json  {summary(found)}", flush=True)


def published_classes(task, num_classes):
    """Names of the classes of published weights; numbers where there are others."""
    names = {"classification": imagenet.WNIDS, "detection": coco.CLASSES}.get(task)
    names = names.read_text().splitlines() if names else []
    num_classes = num_classes or len(names) or segmentation.ADE20K_CLASSES
    return names if len(names) == num_classes else [str(i) for i in range(num_classes)]


def parse(argv):
    """(options for settle, weights, paths of the images, folder of the results); raises ValueError."""
    parser = make_parser("run.py predict", "Draw what a model sees into images.", images=True)
    parser.add_argument("--out", default="runs/predict", help="folder for the drawn images and the JSON files")
    given = vars(parser.parse(argv))
    weights, words, out = given.pop("weights"), given.pop("words"), Path(given.pop("out"))
    given["model"] = words.pop(0) if words and not Path(words[0]).suffix else None
    images = [Path(word) for word in dict.fromkeys(words)]
    if not images:
        raise ValueError("predict needs images: name their files, after the model if you name one")
    if not weights:
        raise ValueError("predict needs --weights: an untrained model sees nothing")
    stems = [image.stem for image in images]
    same = sorted({stem for stem in stems if stems.count(stem) > 1})
    if same:
        raise ValueError(f"several images are called {', '.join(same)}, and the results take their names; "
                         "predict them one after the other")
    return given, weights, images, out


@torch.no_grad()
def classify(model, image, classes, config, device):
    """(image with the five likeliest classes written on it, {"top5": [{"class", "probability"}]})."""
    pixels = validation_transform(config.img_size, config.crop_pct)(image)
    with autocast(device, config.amp):
        logits = model(pixels[None].to(device))
    best = logits[0].float().softmax(0).topk(min(5, len(classes)))
    found = [{"class": classes[i], "probability": round(p, 4)}
             for p, i in zip(best.values.tolist(), best.indices.tolist())]
    lines = [(None, f"{entry['class']}  {100 * entry['probability']:.1f}%") for entry in found]
    return with_legend(image, lines), {"top5": found}


@torch.no_grad()
def segment(model, image, classes, config, device):
    """(image under the colours of its classes, with a legend, {"classes": [{"class", "share"}]}), the largest first.

    share: of the pixels.
    """
    pixels = np.asarray(image)
    views = segmentation.views(pixels, config.img_size)
    label_map = np.empty(pixels.shape[:2], np.int64)
    for rows, probabilities in ade20k.predict(model, views, label_map.shape, device, config.amp):
        label_map[rows] = probabilities.argmax(0).cpu().numpy()
    shares = np.bincount(label_map.flatten(), minlength=len(classes)) / label_map.size
    present = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i]]
    drawn = draw_label_map(pixels, label_map, len(classes))
    lines = [(colour(i), f"{classes[i]}  {100 * shares[i]:.1f}%") for i in present[:20]]
    found = [{"class": classes[i], "share": round(float(shares[i]), 4)} for i in present]
    return with_legend(drawn, lines), {"classes": found}


@torch.no_grad()
def detect(model, image, classes, config, device):
    """(image with what scores above DRAWN, {"objects": [{"class", "score", "box", "segmentation"}]}), best first.

    box: x0, y0, x1, y1 in pixels. segmentation: COCO's run-length code. The JSON has all detections, down to a score
    of 0.05.
    """
    pixels = np.asarray(image)
    padded, size = detection.resize_and_pad(pixels, config.img_size)
    with autocast(device, config.amp):
        found = model(padded[None].to(device), [size], [pixels.shape[:2]])[0]
    objects = []
    for result in coco.results(found, 0):
        x, y, w, h = result["bbox"]
        rle = result["segmentation"]
        objects.append({
            "class": classes[result["category_id"]],
            "score": round(result["score"], 4),
            "box": [round(side, 2) for side in (x, y, x + w, y + h)],
            "segmentation": {**rle, "counts": rle["counts"].decode()},
        })
    drawn = [i for i, entry in enumerate(objects) if entry["score"] > DRAWN]
    masks = [found["masks"][i].cpu().numpy() for i in drawn]
    return draw_objects(pixels, [objects[i] for i in drawn], masks), {"objects": objects}


def summary(found):
    """The first three classes, each with its share, score or probability."""
    entries = next(iter(found.values()))
    return ", ".join(f"{entry['class']} {100 * list(entry.values())[1]:.1f}%" for entry in entries[:3])
