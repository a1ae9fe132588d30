"""Photographs and their pixels: reading, resizing, normalising. What all tasks share."""
import math

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision.datasets.folder import default_loader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; what published weights expect


def load_image(path):
    """A photograph as an RGB PIL image. Raises FileNotFoundError or ValueError, naming the file."""
    try:
        return default_loader(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except Exception as error:  # Pillow raises whatever its decoders do
        raise ValueError(f"{path} cannot be read as an image ({error}); replace or delete the file") from error


def fit_size(H, W, short, long):
    """(h, w), of the same shape as (H, W), as large as a short side of `short` and a long side of `long` allow."""
    factor = min(int(long) / max(H, W), int(short) / min(H, W))
    return max(1, math.floor(H * factor + 0.5)), max(1, math.floor(W * factor + 0.5))


def resize(pixels, size):
    """(H, W, 3) uint8 -> (h, w, 3) uint8.

    Bilinear, without low-pass filter and rounded, as OpenCV has it, which published dense models saw.
    """
    image = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float()
    return interpolate(image, tuple(size), mode="bilinear")[0].round().permute(1, 2, 0).byte().numpy()


def to_tensor(pixels):
    """(H, W, 3), 0 to 255 -> (3, H, W) float32, normalised."""
    normalised = (pixels / np.float32(255) - np.float32(MEAN)) / np.float32(STD)
    return torch.from_numpy(normalised.transpose(2, 0, 1).astype(np.float32)).contiguous()
