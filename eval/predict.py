"""`run.py predict`: what a model sees in photographs, drawn into them, with a JSON file beside each."""
import difflib
import glob
import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from eval import ade20k, attention_maps, class_names, coco
from eval.drawing import colour, draw_label_map, draw_objects, with_legend
from eval.options import load_model, make_parser, settle, weights_file
from eval.tasks import TASKS
from models import list_models
from train import detection, segmentation
from train.augment import validation_transform
from train.config import task_of
from train.device import autocast, to_device
from train.distributed import join_ranks
from train.photographs import load_image, suffixes, visible_files
from train.progress import Remaining
from train.run_folder import replace_atomically
from train.runs import refuse_inputs

DRAWN, AT_MOST = 0.3, 30  # detections that are drawn: from which score on, how many


def main(argv):
    """-> exit status: 0, or 1 where photographs could not be read; these are named at the end."""
    given, weights, images, out, maps = parse(argv)
    config, classes = settle(given, weights, photographs=True)
    task = task_of(config.model)
    predict = {"classification": classify, "segmentation": segment, "detection": detect}[task]
    if config.data:
        classes = TASKS[task].evaluation.dataset(config, classes)[1]
    refuse_inputs("--out", out, config.data)
    places = results_of(images, out)
    _, _, device = join_ranks(config.device)
    config.num_classes = config.num_classes or (len(classes) if classes else None)
    print(f"predict {config.model}, attn {config.attn or 'default'}, {weights}\n  {len(images)} photographs at "
          f"{config.img_size} px on {device}, to {out}/", flush=True)
    model = load_model(config, weights).to(device).eval()
    classes = classes or class_names.published_classes(task, config.num_classes)
    classes = [*classes, *map(str, range(len(classes), config.num_classes or 0))]  # a model may have more than it names
    if maps:
        predict = attention_maps.drawer(model, maps)
    out.mkdir(parents=True, exist_ok=True)
    failed, remaining = [], Remaining(len(images))
    for number, (path, place) in enumerate(zip(images, places), 1):
        try:
            photograph = load_image(path)
        except (ValueError, OSError) as error:
            failed.append(str(error))
            print(f"{number}/{len(images)}  {path}: NOT READ", flush=True)
            continue
        drawn, found = predict(model, photograph, classes, config, device)
        content = json.dumps({"image": str(path), "model": config.model, **found}, indent=1) + "\n"
        replace_atomically(f"{place}.png", lambda file: drawn.save(file, format="png"))
        replace_atomically(f"{place}.json", lambda file: file.write(content.encode()))
        print(f"{number}/{len(images)}  {path} -> {place}.png, .json  {summary(found)}{remaining.after(number)}",
              flush=True)
    if failed:
        print(f"{len(failed)} of {len(images)} photographs could not be read:\n  " + "\n  ".join(failed),
              file=sys.stderr)
    return 1 if failed else 0


def parse(argv):
    """(options for settle, weights, paths of the images, folder of the results, attention_maps.Asked or None).

    Raises ValueError.
    """
    parser = make_parser("run.py predict", "Draw what a model sees into images.", images=True)
    attention_maps.add_options(parser)
    parser.add_argument("--out", default="runs/predict", help="folder for the drawn images and the JSON files")
    given = vars(parser.parse(argv))
    maps = attention_maps.asked(given)
    weights, words, out = given.pop("weights"), given.pop("words"), Path(given.pop("out"))
    given["model"] = words.pop(0) if words and words[0] in list_models() else None
    if not words:
        raise ValueError("predict needs images: name files or folders, after the model if you name one")
    if not weights:
        raise ValueError("predict needs --weights: an untrained model sees nothing")
    weights = weights_file(weights)
    images = [image for number, word in enumerate(words) for image in photographs(word, number == 0)]
    return given, weights, list(dict.fromkeys(images)), out, maps


def photographs(word, first=False):
    """[Path, ...] of what a word names: a file, a folder, of which it is all photographs at any depth, or a pattern.

    first: it might have been meant as a model. Raises ValueError or FileNotFoundError where there is none.
    """
    path = Path(word)
    if path.is_dir():
        found = [file for file in visible_files(path) if file.suffix.lower() in suffixes()]
        if not found:
            raise FileNotFoundError(f"no photographs in {word}: no file there ends as images do, in .jpg or .png, say")
        return found
    if path.exists():
        return [path]
    found = [Path(name) for name in sorted(glob.glob(word, recursive=True)) if Path(name).is_file()]
    if found:
        return found
    near = difflib.get_close_matches(word, list_models(), n=1) if first else ()
    raise FileNotFoundError(f"no image at {word}" + (f"; did you mean the model {near[0]}?" if near else ""))


def results_of(images, out):
    """[where the results of an image go, without .png and .json, ...]: OUT/<stem>; where that is another image's, of
    this or of an earlier run, with its suffix or with its folders.

    Raises ValueError where a result would take the place of something that predict did not write.
    """
    for folder in {path.parent for path in images}:
        if out.is_dir() and out.samefile(folder):
            raise ValueError(f"--out {out} holds photographs that are to be predicted, and results may take their "
                             "places or be taken for some; name another folder")
    names = [path.stem for path in images]
    typed = lambda path: "-".join(part for part in path.parts if part not in (path.anchor, ".."))
    for longer in (lambda path: path.name, typed, lambda path: typed(path.resolve())):
        times = Counter(name.casefold() for name in names)
        names = [longer(path) if times[name.casefold()] > 1 or of_another(out / name, path) else name
                 for name, path in zip(names, images)]
    for name in names:
        png, text = out / f"{name}.png", out / f"{name}.json"
        if (png.exists() or text.exists()) and predicted(text) is None:
            raise ValueError(f"--out {out} holds {name}.png or {name}.json, which predict did not write; nothing is "
                             "written over it, name another folder")
    return [out / name for name in names]


def of_another(place, image):
    earlier = predicted(place.with_name(f"{place.name}.json"))
    return earlier is not None and not (os.path.exists(earlier) and image.samefile(earlier))


def predicted(path):
    """The image whose results a JSON file holds, or None where predict did not write it, or there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kinds = {"top5", "classes", "objects", "attention"}
    ours = isinstance(content, dict) and "model" in content and content.keys() & kinds
    return content["image"] if ours and isinstance(content.get("image"), str) else None


@torch.no_grad()
def classify(model, image, classes, config, device):
    """(image with the five likeliest classes written on it, {"top5": [{"class", "probability"}]}).

    An ImageNet class, n02123045, has a "name" in words, too.
    """
    images, = to_device([validation_transform(config.img_size, config.crop_pct)(image)[None]], device)
    with autocast(device, config.amp):
        logits = model(images)
    best = logits[0].float().softmax(0).topk(min(5, len(classes)))
    words = class_names.words()
    found = [{"class": classes[i], **({"name": words[classes[i]]} if classes[i] in words else {}),
              "probability": round(p, 4)} for p, i in zip(best.values.tolist(), best.indices.tolist())]
    lines = [(None, f"{called(entry)}  {100 * entry['probability']:.1f}%") for entry in found]
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
    """(image with the best AT_MOST above DRAWN, {"objects": [{"class", "score", "box", "segmentation"}]}), best first.

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
    drawn = drawn[:AT_MOST]
    masks = [found["masks"][i].cpu().numpy() for i in drawn]
    return draw_objects(pixels, [objects[i] for i in drawn], masks), {"objects": objects}


def called(entry):
    """A class in words where it has some."""
    return entry.get("name", entry["class"])


def summary(found):
    """The first three classes, each with its share, score or probability; how many objects are not drawn."""
    kind, entries = next(iter(found.items()))
    if kind == "attention":
        return f"what pixel {tuple(entries['at'])} attends to"
    score = {"top5": "probability", "classes": "share", "objects": "score"}[kind]
    drawable = sum(entry[score] > DRAWN for entry in entries) if kind == "objects" else 0
    left_out = f", and {drawable - AT_MOST} objects that are not drawn" if drawable > AT_MOST else ""
    return ", ".join(f"{called(entry)} {100 * entry[score]:.1f}%" for entry in entries[:3]) + left_out
