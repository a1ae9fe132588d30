"""Folders of a few small photographs, in the layout that each task reads."""
import json

import numpy as np
from PIL import Image
from pycocotools import mask as oracle

COCO_IDS = (7, 3, 90)  # of the categories in the file, with gaps and out of order; in order: green, red, blue


def image_folder(root, counts, classes=("cat", "dog")):
    """ImageFolder's layout: noise of odd sizes, `counts` {split: images of each class}; the first PNGs with alpha, the
    second greyscale JPEGs."""
    rng = np.random.default_rng(0)
    for split, count in counts.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(rng.integers(0, 255, (20 + i, 31, 3), dtype=np.uint8))
                if i == 0:
                    image.convert("RGBA").save(folder / "0.png")
                else:
                    (image.convert("L") if i == 1 else image).save(folder / f"{i}.jpg")
    return root


def ade_folder(root, training=5):
    """ADE20K's layout with three classes: photographs of odd sizes, whose left half is class 1 (red), right half 2
    (green), top row unlabelled. training: how many, of five sizes."""
    for split, count in (("training", training), ("validation", 3)):
        images, annotations = root / "images" / split, root / "annotations" / split
        images.mkdir(parents=True)
        annotations.mkdir(parents=True)
        for i in range(count):
            H, W = 40 + 3 * (i % 5), 50 - 5 * (i % 5)
            pixels, labels = np.zeros((H, W, 3), np.uint8), np.full((H, W), 2, np.uint8)
            pixels[:, :W // 2, 0], pixels[:, W // 2:, 1] = 200, 200
            labels[:, :W // 2], labels[0] = 1, 0
            Image.fromarray(pixels).save(images / f"{i}.jpg", quality=95)
            Image.fromarray(labels).save(annotations / f"{i}.png")
    (root / "classes.json").write_text('["red", "green", "blue"]')
    return root


def coco_folder(root):
    """COCO's layout: photographs of odd sizes with a red and a green rectangle, each kind of segmentation, a crowd, an
    object too small, one out of the image, and an image without objects."""
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train", 5), ("val", 4)):
        folder = root / f"{split}2017"
        folder.mkdir()
        images, annotations = [], []
        for i in range(count):
            H, W = 60 + 7 * i, 90 - 11 * i
            pixels = np.full((H, W, 3), 40, np.uint8)
            images.append({"id": 100 - i, "file_name": f"{i}.png", "height": H, "width": W})
            rectangles = [(7, 5, 8, 20, 30), (3, 30, 20, 15, 25)] if i < count - 1 else []
            for number, (category, x, y, w, h) in enumerate(rectangles):
                pixels[y:y + h, x:x + w, number] = 220
                annotations.append({
                    "id": len(annotations) + 1, "image_id": 100 - i, "category_id": category, "bbox": [x, y, w, h],
                    "area": w * h, "iscrowd": 0, "segmentation": segmentations(x, y, w, h, H, W)[(i + number) % 3]})
            if i == 0:
                annotations += nothing_to_learn_from(H, W)
            Image.fromarray(pixels).save(folder / f"{i}.png")
        categories = [{"id": i, "name": name} for i, name in zip(COCO_IDS, ("red", "green", "blue"))]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def segmentations(x, y, w, h, H, W):
    """A rectangle as a polygon, as a compressed run-length code, and as a plain one."""
    mask = np.zeros((H, W), np.uint8)
    mask[y:y + h, x:x + w] = 1
    compressed = oracle.encode(np.asfortranarray(mask))["counts"].decode()
    column_wise = mask.T.flatten()
    changes = np.flatnonzero(np.diff(column_wise)) + 1
    plain = [len(run) for run in np.split(column_wise, changes)]
    return ([[x, y, x + w, y, x + w, y + h, x, y + h]], {"size": [H, W], "counts": compressed},
            {"size": [H, W], "counts": plain})


def nothing_to_learn_from(H, W):
    """Annotations of the first photograph: a crowd, an object narrower than a pixel, one out of the image."""
    of = {"image_id": 100, "iscrowd": 0}
    return [{**of, "id": 50, "category_id": 7, "bbox": [40, 30, 20, 20], "area": 400, "iscrowd": 1,
             "segmentation": {"size": [H, W], "counts": [H * 40, H * 20, H * (W - 60)]}},
            {**of, "id": 51, "category_id": 7, "bbox": [40, 30, 0.5, 20], "area": 10,
             "segmentation": [[40, 30, 40.5, 30, 40.5, 50]]},
            {**of, "id": 52, "category_id": 90, "bbox": [-30, 3, 20, 20], "area": 10,
             "segmentation": [[-30, 3, -10, 3, -10, 23]]}]


def mutated(content, rng):
    """Bytes with a few of them changed, a piece of them lost, doubled or zero, or the rest cut off."""
    content, kind = bytearray(content), rng.integers(5)
    start, length = int(rng.integers(len(content))), int(rng.integers(1, 20))
    if kind == 0:
        for at in rng.integers(len(content), size=rng.integers(1, 5)):
            content[at] = rng.integers(256)
    elif kind == 1:
        del content[start:start + length]
    elif kind == 2:
        content[start:start] = content[start:start + length]
    elif kind == 3:
        content[start:start + length] = bytes(length)
    else:
        del content[start:]
    return bytes(content)
