"""train/photographs.py: sizes, resizing as OpenCV has it, normalised pixels."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.photographs import fit_size, resize, to_tensor


@settings(deadline=None, max_examples=100)
@given(H=st.integers(1, 2000), W=st.integers(1, 2000), short=st.integers(1, 800), ratio=st.floats(1, 5))
def test_fitted_sizes_touch_one_limit_and_keep_the_shape(H, W, short, ratio):
    long = int(short * ratio)
    h, w = fit_size(H, W, short, long)
    assert min(h, w) <= max(1, short) and max(h, w) <= max(1, long)
    assert min(h, w) == short or max(h, w) == long
    assert abs(h * W - w * H) <= 0.5 * (H + W) or 1 in (h, w)  # each side is rounded by half a pixel at most
    assert fit_size(W, H, short, long) == (w, h)


@pytest.mark.parametrize("size", [(7, 9), (20, 30), (3, 5), (33, 10)])
def test_resized_pixels_are_rounded_mixtures_of_the_four_nearest(size):
    """OpenCV's INTER_LINEAR, which has no low-pass filter."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (13, 17, 3), dtype=np.uint8)

    def neighbours(old, new):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, old - 1), (at - low)
    (top, bottom, v), (left, right, u) = neighbours(13, size[0]), neighbours(17, size[1])
    values, v, u = pixels.astype(float), v[:, None, None], u[:, None]
    upper = values[top][:, left] * (1 - u) + values[top][:, right] * u
    lower = values[bottom][:, left] * (1 - u) + values[bottom][:, right] * u
    expected = upper * (1 - v) + lower * v
    ours = resize(pixels, size)
    assert ours.dtype == np.uint8 and ours.shape == (*size, 3)
    assert np.abs(ours - expected).max() <= 0.5 + 1e-3


def test_pixels_are_normalised_by_channel():
    image = to_tensor(np.uint8([[[0, 128, 255], [255, 0, 0]]]))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, red first
    expected = [[(value / 255 - mean[c]) / std[c] for value in values]
                for c, values in enumerate([(0, 255), (128, 0), (255, 0)])]
    assert image.shape == (3, 1, 2) and image.dtype == torch.float32
    assert image[:, 0].tolist() == [pytest.approx(row, rel=1e-5) for row in expected]
