"""Architectures by name: `create_model("swin_t", attn="elsa")`."""
import difflib
import inspect

import torch.nn as nn

from models import mask_rcnn, swin, upernet, volo
from models.weights import load_weights

__all__ = ["create_model", "list_models", "load_weights"]

# name -> (class, the numbers of this size). The class names its attentions, the default first, in `attentions`.
MODELS = {
    **{name: (swin.Swin, config) for name, config in swin.CONFIGS.items()},
    **{name: (volo.VOLO, config) for name, config in volo.CONFIGS.items()},
    **{name: (upernet.UPerNet, config) for name, config in upernet.CONFIGS.items()},
    **{name: (mask_rcnn.MaskRCNN, config) for name, config in mask_rcnn.CONFIGS.items()},
    **{name: (mask_rcnn.CascadeMaskRCNN, config) for name, config in mask_rcnn.CASCADE_CONFIGS.items()},
}


def list_models():
    """Names that create_model knows."""
    return sorted(MODELS)


def create_model(name, *, attn=None, num_classes=None, img_size=224, **overrides):
    """Builds a model with fresh weights.

    Args:
        name: one of list_models().
        attn: kind of attention, e.g. "elsa"; None: the architecture's own ("window" for Swin, "outlook" for VOLO).
        num_classes: width of the logits; None: 1000, for segmenters 150, for detectors 80. 0: a classifier gives
            pooled features instead of logits.
        img_size: side of the images in pixels, for VOLO's position embedding (which is interpolated for images of
            another size). Swin has none and ignores it.
        overrides: any other argument of the architecture or of its backbone, e.g. drop_path_rate=0.2, patch_size=2,
            checkpointing=True.

    Returns: an nn.Module, images (B, 3, H, W) -> logits (B, num_classes), segmenters (B, num_classes, H, W). In
    training mode VOLO gives its tokens' logits, too, and segmenters those of their auxiliary head. Detectors take and
    give what models.mask_rcnn.MaskRCNN.forward says.
    Raises ValueError for an unknown name, attention or override, with the nearest known one.
    """
    architecture, config = MODELS[_check_choice("model", name, list_models())]
    options = _arguments(architecture)
    for parent in getattr(architecture, "backbone_class", nn.Module).__mro__:
        options += _arguments(parent)
    known = [option for option in dict.fromkeys(options) if option not in ("attn", "num_classes", "img_size")]
    for override in overrides:
        _check_choice(f"override of {name}", override, known)
    if attn is None:
        attn = architecture.attentions[0]
    arguments = {"attn": _check_choice(f"attn of {name}", attn, architecture.attentions)}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if "img_size" in _arguments(architecture):
        arguments["img_size"] = img_size
    try:
        return architecture(**arguments, **{**config, **overrides})
    except (TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        if not overrides:
            raise
        raise ValueError(f"{name} cannot be made with {overrides} ({type(error).__name__}: {error}); expected values "
                         "of the same kind as its defaults") from error


def _arguments(architecture):
    """Names of the arguments that a class takes itself, not those that it passes on."""
    parameters = inspect.signature(architecture.__init__).parameters.values()
    return [parameter.name for parameter in parameters
            if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and parameter.name != "self"]


def _check_choice(what, value, choices):
    """The value, if it is one of the choices."""
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown {what}: {value!r}. {hint}There is: {', '.join(choices)}")
    return value
