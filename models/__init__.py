"""Architectures by name: `create_model("swin_t", attn="elsa")`."""
import difflib
import inspect

import torch.nn as nn

from models import mask_rcnn, swin, upernet, volo
from models.weights import load_weights

# name -> (class, the numbers of this size). The class names its attentions, the default first, in `attentions`.
MODELS = {name: (architecture, config)
          for architecture, configs in ((swin.Swin, swin.CONFIGS), (volo.VOLO, volo.CONFIGS), (upernet.UPerNet, upernet.CONFIGS),
                                        (mask_rcnn.MaskRCNN, mask_rcnn.CONFIGS), (mask_rcnn.CascadeMaskRCNN, mask_rcnn.CASCADE_CONFIGS))
          for name, config in configs.items()}


def list_models():
    """Names that create_model knows."""
    return sorted(MODELS)


def create_model(name, *, attn=None, num_classes=None, img_size=224, **overrides):
    """Builds a model with fresh weights.

    Args:
        name: one of list_models().
        attn: kind of attention, e.g. "elsa"; None: the architecture's own ("window" for Swin, "outlook" for VOLO).
        num_classes: width of the logits; None: 1000, for segmenters 150, for detectors 80. 0: a classifier gives pooled features instead of logits.
        img_size: side of the images in pixels, for VOLO's position embedding (which is interpolated for images of another size).
            Swin has none and ignores it.
        overrides: any other argument of the architecture or of its backbone, e.g. drop_path_rate=0.2, patch_size=2,
            checkpointing=True.

    Returns: an nn.Module, images (B, 3, H, W) -> logits (B, num_classes), segmenters (B, num_classes, H, W). In training mode VOLO
    gives its tokens' logits, too, and segmenters those of their auxiliary head.
    Raises ValueError for an unknown name, attention or override, with the nearest known one.
    """
    architecture, config = MODELS[_known("model", name, list_models())]
    own = _arguments(architecture)
    of_backbone = [option for parent in getattr(architecture, "backbone_class", nn.Module).__mro__ for option in _arguments(parent)]
    for override in overrides:
        _known(f"override of {name}", override, [option for option in dict.fromkeys(own + of_backbone)
                                                 if option not in ("attn", "num_classes", "img_size")])
    attn = architecture.attentions[0] if attn is None else _known(f"attn of {name}", attn, architecture.attentions)
    given = {} if num_classes is None else {"num_classes": num_classes}
    if "img_size" in own:
        given["img_size"] = img_size
    return architecture(attn=attn, **given, **{**config, **overrides})


def _arguments(architecture):
    """Names of the arguments of its own, not those that it passes on."""
    parameters = inspect.signature(architecture.__init__).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind == parameter.POSITIONAL_OR_KEYWORD and parameter.name != "self"]


def _known(what, value, choices):
    if value not in choices:
        nearest = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"Did you mean {nearest[0]!r}? " if nearest else ""
        raise ValueError(f"unknown {what}: {value!r}. {hint}There is: {', '.join(choices)}")
    return value
