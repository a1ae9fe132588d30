"""What a trained model sees in one photograph, for programs: what `run.py predict` computes, without drawing or files.

    from eval.image import load_model, predict_image
    model, meta = load_model("runs/swin_t-elsa-photos")
    predict_image(model, meta, "tabby.jpg")
"""
import numpy as np
from PIL import Image

from eval import evaluating
from eval.predict import classify, detect, segment
from models import load_model
from train.photographs import load_image, shown

__all__ = ["load_model", "predict_image"]
PREDICTIONS = {"classification": classify, "segmentation": segment, "detection": detect}


def predict_image(model, meta, image):
    """What a model sees in a photograph, the numbers of `run.py predict`.

    Args:
        model, meta: as load_model gives them; the model on any device, in either mode, which is restored.
        image: a path, a PIL image, or an array (H, W, 3) of uint8, RGB.

    Returns: for classification {"top5": [{"class", "probability"}, ...]}, for segmentation {"classes": [{"class",
    "share" of the pixels}, ...]}, for detection {"objects": [{"class", "score", "box", "segmentation"}, ...]}: the
    likeliest, largest or best first; see classify, segment and detect of eval.predict.
    Raises ValueError or OSError for what is no photograph, as train.photographs.load_image does.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"image is an array {image.shape} of {image.dtype}; expected (H, W, 3) of uint8, RGB")
        image = Image.fromarray(image)
    image = shown(image) if isinstance(image, Image.Image) else load_image(image)
    with evaluating(model):
        _, found = PREDICTIONS[meta.task](model, image, meta.classes, meta, next(model.parameters()).device)
    return found
