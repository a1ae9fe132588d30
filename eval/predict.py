"""`run.py predict`: what a model sees in photographs, drawn into them, with a JSON file beside each."""
import colorsys
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eval import ade20k, coco, imagenet, options
from train import data, detection, segmentation
from train.device import autocast, join_ranks

DRAWN = 0.3  # score from which on a detection is drawn


def main(argv):
    parser = options.parser("run.py predict", "Draw what a model sees into images.", images=True)
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
        raise ValueError(f"several images are called {', '.join(same)}, and the results take their names; predict them one after the other")
    config, classes = options.settle(given, weights, photographs=True)
    see, own = {"classifier": (classified, imagenet.WNIDS), "segmenter": (segmented, None), "detector": (detected, coco.CLASSES)}[
        options.kind(config.model)]
    if classes is None and config.data and see is not classified:
        classes = segmentation.class_names(config) if see is segmented else detection.validation_set(config)[1]
    _, _, device = join_ranks(config.device)
    config.num_classes = config.num_classes or (len(classes) if classes else None)
    model = options.load_model(config, weights).to(device).eval()
    if classes is None:  # of published weights
        width = config.num_classes or {classified: 1000, segmented: segmentation.ADE20K_CLASSES, detected: 80}[see]
        names = own.read_text().splitlines() if own else []
        classes = names if len(names) == width else [str(i) for i in range(width)]
    out.mkdir(parents=True, exist_ok=True)
    for path in images:
        image = data.load_image(path)
        drawn, found = see(model, image, classes, config, device)
        drawn.save(out / f"{path.stem}.png")
        (out / f"{path.stem}.json").write_text(json.dumps({"image": str(path), "model": config.model, **found}, indent=1) + "\n")
        print(f"{path} -> {out / path.stem}.png, .json  {summary(found)}", flush=True)


@torch.no_grad()
def classified(model, image, classes, config, device):
    """(image with the five likeliest classes written on it, {"top5": [{"class", "probability"}]})."""
    with autocast(device, config.amp):
        logits = model(data.validation_transform(config.img_size, config.crop_pct)(image)[None].to(device))
    best = logits[0].float().softmax(0).topk(min(5, len(classes)))
    found = [{"class": classes[i], "probability": round(p, 4)} for p, i in zip(best.values.tolist(), best.indices.tolist())]
    lines = [(None, f"{entry['class']}  {100 * entry['probability']:.1f}%") for entry in found]
    return with_legend(image, lines), {"top5": found}


@torch.no_grad()
def segmented(model, image, classes, config, device):
    """(image under the colours of its classes, with a legend, {"classes": [{"class", "share" of the pixels}]}), the largest first."""
    pixels = np.asarray(image)
    views = segmentation.views(pixels, config.img_size, (1.0,), flip=False)
    label_map = ade20k.predict(model, views, pixels.shape[:2], device, config.amp).argmax(0).cpu().numpy()
    shares = np.bincount(label_map.flatten(), minlength=len(classes)) / label_map.size
    present = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i]]
    palette = np.array([colour(i) for i in range(len(classes))])
    drawn = Image.fromarray((0.45 * pixels + 0.55 * palette[label_map]).astype(np.uint8))
    lines = [(colour(i), f"{classes[i]}  {100 * shares[i]:.1f}%") for i in present[:20]]
    return with_legend(drawn, lines), {"classes": [{"class": classes[i], "share": round(float(shares[i]), 4)} for i in present]}


@torch.no_grad()
def detected(model, image, classes, config, device):
    """(image with the masks, boxes and names of what scores above DRAWN, {"objects": [{"class", "score", "box", "segmentation"}]}), best first.

    box: x0, y0, x1, y1 in pixels. segmentation: COCO's run-length code. The JSON has all detections, down to a score of 0.05.
    """
    pixels = np.asarray(image)
    shown, size = detection.shown(pixels, config.img_size)
    with autocast(device, config.amp):
        found = model(shown[None].to(device), [size], [pixels.shape[:2]])[0]
    entries = [{"class": classes[entry["category_id"]], "score": round(entry["score"], 4),
                "box": [round(side, 2) for side in (x, y, x + w, y + h)],
                "segmentation": {**entry["segmentation"], "counts": entry["segmentation"]["counts"].decode()}}
               for entry in coco.results(found, 0) for x, y, w, h in [entry["bbox"]]]
    drawn = [i for i, entry in enumerate(entries) if entry["score"] > DRAWN]
    painted = pixels.astype(np.float32)
    for i in reversed(drawn):  # the best on top
        mask = found["masks"][i].cpu().numpy()
        painted[mask] = 0.5 * painted[mask] + 0.5 * np.array(colour(i))
    canvas = Image.fromarray(painted.astype(np.uint8))
    scale = max(1, -(-256 // canvas.width))
    canvas = canvas.resize((canvas.width * scale, canvas.height * scale), Image.NEAREST)
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for i in reversed(drawn):
        x0, y0, x1, y1 = (scale * side for side in entries[i]["box"])
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=colour(i), width=2)
        text = f"{entries[i]['class']} {100 * entries[i]['score']:.0f}%"
        left, top = max(0, min(x0, canvas.width - font.getlength(text) - 4)), max(0, y0 - 18)
        draw.rectangle((left, top, left + font.getlength(text) + 4, top + 18), fill=colour(i))
        draw.text((left + 2, top), text, fill="black", font=font)
    return canvas, {"objects": entries}


def summary(found):
    key, entries = next(iter(found.items()))
    return ", ".join(f"{entry['class']} {100 * list(entry.values())[1]:.1f}%" for entry in entries[:3])


def colour(i):
    """A colour (r, g, b) for class i: hues a golden angle apart, so that neighbouring numbers differ most."""
    return tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(i * 0.618034 % 1, (0.9, 0.6)[i // 7 % 2], (1.0, 0.75)[i // 14 % 2]))


def with_legend(image, lines):
    """The image, at least 256 pixels wide, with a strip to its right: a text a line, after a square of its colour if it has one."""
    if image.width < 256:
        image = image.resize((256, round(256 * image.height / image.width)), Image.NEAREST)
    font = ImageFont.load_default(14)
    width = 36 + max(int(font.getlength(text)) for _, text in lines)
    canvas = Image.new("RGB", (image.width + width, max(image.height, 20 * len(lines) + 8)), "white")
    canvas.paste(image, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for i, (fill, text) in enumerate(lines):
        top = 4 + 20 * i
        if fill:
            draw.rectangle((image.width + 8, top + 2, image.width + 22, top + 16), fill=fill, outline="black")
        draw.text((image.width + (28 if fill else 8), top), text, fill="black", font=font)
    return canvas
