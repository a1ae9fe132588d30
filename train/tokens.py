"""Training with tokens: mix-token, and label maps with a target for every token.

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858, and
its published code. One difference: the published crop of a label map takes rows for columns; here the map is cropped as
the image is, unless published_label_crop is set.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from train.photographs import trying


def draw_swap(rng, alpha, h, w):
    """The box of mix-token -> ((h, w) bool, share of tokens that stay with their image). rng: numpy Generator."""
    share = math.sqrt(1 - rng.beta(alpha, alpha))
    swap = torch.zeros(h, w, dtype=torch.bool)
    top, bottom = _interval(rng, h, int(h * share))
    left, right = _interval(rng, w, int(w * share))
    swap[top:bottom, left:right] = True
    return swap, 1 - (bottom - top) * (right - left) / (h * w)


def _interval(rng, size, length):
    centre = int(rng.integers(size))
    return max(0, centre - length // 2), min(size, centre + length // 2)


def dense_targets(maps, matrices, labels, h, w, num_classes, smoothing, ground_truth):
    """What a label map says of each token of an augmented image -> (class targets (B, C), token targets (B, h, w, C)).

    maps: (B, 2, n, rows, columns), scores and classes of the n best classes at each place of the photograph; the others
        score 0.
    matrices: (B, 3, 3), see augment.TrainingTransform.
    ground_truth: mixes a tenth of the label into the class target, half where both agree.

    Scores are read bilinearly at four points a token and averaged, and are 0 outside the photograph; their softmax is
    the target, that of their mean over all tokens the class token's. Smoothing as published adds to one and takes from
    none: t * (1 - s + s / C) + s / C.
    """
    B, _, _, rows, columns = maps.shape
    top_scores, top_classes = maps[:, 0].float(), maps[:, 1].long()
    scores = torch.zeros(B, num_classes, rows, columns, device=maps.device).scatter_(1, top_classes, top_scores)

    y = (torch.arange(2 * h, device=maps.device) + 0.5) / (2 * h)
    x = (torch.arange(2 * w, device=maps.device) + 0.5) / (2 * w)
    y, x = torch.meshgrid(y, x, indexing="ij")
    points = torch.stack([x, y, torch.ones_like(x)], -1) @ matrices[:, None].transpose(-1, -2)
    points = points[..., :2]  # (B, 2h, 2w, 2): x, y in the photograph
    inside = ((points >= 0) & (points <= 1)).all(-1)  # (B, 2h, 2w)
    sampled = F.grid_sample(scores, 2 * points - 1, padding_mode="border", align_corners=False) * inside[:, None]
    tokens = F.avg_pool2d(sampled, 2)  # (B, C, h, w)

    off = smoothing / num_classes
    smooth = lambda target: target * (1 - smoothing + off) + off
    class_targets = smooth(tokens.mean((2, 3)).softmax(1))
    token_targets = smooth(tokens.permute(0, 2, 3, 1).softmax(-1))
    if ground_truth:
        truth = F.one_hot(labels, num_classes) * (1 - smoothing) + off
        share = 0.9 - 0.4 * (class_targets.argmax(1) == labels)[:, None]
        class_targets = class_targets * share + truth * (1 - share)
    return class_targets, token_targets


class TokenLabels:
    """Label maps of the images of a folder tree: item i is that of image i, (2, n, rows, columns) float32.

    folder: holds <class>/<name of the image without its ending>.pt, each a tensor of scores and classes, published as
        (2, 5, 18, 18).
    tree: torchvision's ImageFolder.
    images: the tree, or a Subset of it.
    """

    def __init__(self, folder, tree, images):
        indices = getattr(images, "indices", range(len(tree)))
        self.classes, image_of = len(tree.classes), {}
        for index in indices:
            image, label = tree.samples[index]
            path = Path(folder) / tree.classes[label] / f"{Path(image).stem}.pt"
            if path in image_of:
                raise ValueError(f"token_labels: {image_of[path]} and {image} share one name, and so one label map; "
                                 "rename or remove one of them")
            image_of[path] = image
        self.paths = list(image_of)
        there = {path for name in tree.classes for path in (Path(folder) / name).glob("*.pt")}
        missing = [str(path) for path in self.paths if path not in there]
        if missing:
            named = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise FileNotFoundError(f"token_labels: {len(missing)} of {len(self.paths)} images have no label map; "
                                    f"missing are {named}. Expected one file per training image")

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            label_map = trying(lambda: torch.load(path, map_location="cpu", weights_only=True)).float()
        except OSError as error:
            raise OSError(f"{path} could not be read: {error.strerror or error}") from error
        except Exception as error:  # damaged bytes make the unpickler raise anything
            raise ValueError(f"{path} cannot be read as a label map ({error}); replace the file") from error
        if label_map.ndim != 4 or label_map.shape[0] != 2:
            raise ValueError(f"{path} holds shape {tuple(label_map.shape)}; "
                             "expected (2, classes, rows, columns): scores, then class indices")
        if not label_map.isfinite().all():
            raise ValueError(f"{path} holds infinite scores or none (NaN); expected numbers")
        least, most = label_map[1].min(), label_map[1].max()
        if not (0 <= least and most < self.classes):
            raise ValueError(f"{path} names classes {least:g} to {most:g}; "
                             f"expected indices of {self.classes} classes")
        return label_map
