"""Training with tokens: mix-token, and label maps with a target for every token.

Source: Jiang et al., "All Tokens Matter: Token Labeling for Training Better Vision Transformers", arXiv 2104.10858, and its published
code. One difference: the published crop of a label map takes rows for columns; here the map is cropped as the image is.
"""
import math
from pathlib import Path

import torch
import torch.nn.functional as F


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


def dense_targets(maps, places, labels, h, w, num_classes, smoothing, ground_truth):
    """What a label map says of each token of an augmented image -> (class targets (B, C), token targets (B, h, w, C)).

    maps: (B, 2, n, rows, columns), scores and classes of the n best classes at each place of the photograph; the others score 0.
    places: (B, 3, 3), see train.data.TrainingTransform. Scores are read bilinearly at four places a token and averaged, and are 0 outside
    the photograph; their softmax is the target, that of their mean over all tokens the class token's. Smoothing as published adds
    to one and takes from none: t * (1 - s + s / C) + s / C. ground_truth: mixes a tenth of the label into the class target,
    half where both agree.
    """
    B, _, _, rows, columns = maps.shape
    scores = torch.zeros(B, num_classes, rows, columns, device=maps.device).scatter_(1, maps[:, 1].long(), maps[:, 0].float())
    y, x = torch.meshgrid((torch.arange(2 * h, device=maps.device) + 0.5) / (2 * h), (torch.arange(2 * w, device=maps.device) + 0.5) / (2 * w),
                          indexing="ij")
    at = torch.stack([x, y, torch.ones_like(x)], -1) @ places[:, None].transpose(-1, -2)  # (B, 2h, 2w, 3): x, y, 1
    inside = ((at[..., :2] >= 0) & (at[..., :2] <= 1)).all(-1)  # (B, 2h, 2w)
    read = F.grid_sample(scores, 2 * at[..., :2] - 1, padding_mode="border", align_corners=False) * inside[:, None]
    tokens = F.avg_pool2d(read, 2)  # (B, C, h, w)
    off = smoothing / num_classes
    class_targets, token_targets = (tokens.mean((2, 3)).softmax(1) * (1 - smoothing + off) + off,
                                    tokens.permute(0, 2, 3, 1).softmax(-1) * (1 - smoothing + off) + off)
    if ground_truth:
        truth = F.one_hot(labels, num_classes) * (1 - smoothing) + off
        share = 0.9 - 0.4 * (class_targets.argmax(1) == labels)[:, None]
        class_targets = class_targets * share + truth * (1 - share)
    return class_targets, token_targets


class TokenLabels:
    """Label maps of the images of a folder tree: item i is that of image i, (2, n, rows, columns) float32.

    folder: holds <class>/<name of the image without its ending>.pt, each a tensor of scores and classes, published as (2, 5, 18, 18).
    tree: torchvision's ImageFolder; images: it, or a Subset of it.
    """

    def __init__(self, folder, tree, images):
        indices = getattr(images, "indices", range(len(tree)))
        self.classes = len(tree.classes)
        self.paths = []
        for index in indices:
            image = Path(tree.samples[index][0])
            self.paths.append(Path(folder) / image.parent.name / f"{image.stem}.pt")
        there = {path for name in tree.classes for path in (Path(folder) / name).glob("*.pt")}
        missing = [str(path) for path in self.paths if path not in there]
        if missing:
            raise FileNotFoundError(f"token_labels: {len(missing)} of {len(self.paths)} images have no label map; missing are "
                                    f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Expected one file per training image")

    def __getitem__(self, index):
        path = self.paths[index]
        try:
            label_map = torch.load(path, map_location="cpu", weights_only=True).float()
        except Exception as error:  # damaged bytes make the unpickler raise anything
            raise ValueError(f"{path} cannot be read as a label map ({error}); replace the file") from error
        if label_map.ndim != 4 or label_map.shape[0] != 2:
            raise ValueError(f"{path} holds shape {tuple(label_map.shape)}; expected (2, classes, rows, columns): scores, then class indices")
        if not (0 <= label_map[1].min() and label_map[1].max() < self.classes):
            raise ValueError(f"{path} names classes {label_map[1].min():g} to {label_map[1].max():g}; expected indices of {self.classes} classes")
        return label_map
