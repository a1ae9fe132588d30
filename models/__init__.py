"""Architectures by name, `create_model("swin_t", attn="elsa")`, and trained models, `load_model("runs/mine")`."""
import difflib
import inspect
from dataclasses import dataclass
from pathlib import Path

import torch.nn as nn

from models import mask_rcnn, swin, upernet, volo
from models.weights import load_checkpoint, load_weights, read

__all__ = ["Meta", "create_model", "list_models", "load_model", "load_weights"]

# name -> (class, the numbers of this size). The class names its attentions, the default first, in `attentions`.
MODELS = {
    **{name: (swin.Swin, config) for name, config in swin.CONFIGS.items()},
    **{name: (volo.VOLO, config) for name, config in volo.CONFIGS.items()},
    **{name: (upernet.UPerNet, config) for name, config in upernet.CONFIGS.items()},
    **{name: (mask_rcnn.MaskRCNN, config) for name, config in mask_rcnn.CONFIGS.items()},
    **{name: (mask_rcnn.CascadeMaskRCNN, config) for name, config in mask_rcnn.CASCADE_CONFIGS.items()},
}

NEEDED = {"model", "attn", "num_classes", "img_size", "crop_pct", "model_args"}  # of the configuration in a checkpoint
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; what published weights expect, and ours


def list_models():
    """Names that create_model knows."""
    return sorted(MODELS)


def create_model(name, *, attn=None, num_classes=None, img_size=224, pretrained=False, **overrides):
    """Builds a model, with fresh weights or `pretrained` ones.

    Args:
        name: one of list_models().
        attn: kind of attention, e.g. "elsa"; None: the architecture's own ("window" for Swin, "outlook" for VOLO).
        num_classes: width of the logits; None: 1000, for segmenters 150, for detectors 80. 0: a classifier gives
            pooled features instead of logits.
        img_size: side of the images in pixels, for VOLO's position embedding (which is interpolated for images of
            another size). Swin has none and ignores it.
        pretrained: True: the weights that the authors published for this model and attention, fetched where they are
            not there yet; or a file. Whatever load_weights takes fits here, too. A classifier of another number of
            classes stays fresh, and a line on stderr says so.
        overrides: any other argument of the architecture or of its backbone, e.g. drop_path_rate=0.2, patch_size=2,
            checkpointing=True, in_chans=1 for images of one channel. Pretrained weights for three are then summed for
            one, and for more repeated and scaled, as timm does.

    Returns: an nn.Module, images (B, in_chans, H, W) -> logits (B, num_classes), segmenters (B, num_classes, H, W). In
    training mode VOLO gives its tokens' logits, too, and segmenters those of their auxiliary head. Detectors take and
    give what models.mask_rcnn.MaskRCNN.forward says. All have `num_features`, the channels before the classifier, and
    reset_classifier(num_classes).
    Raises ValueError for an unknown name, attention or override, with the nearest known one, and what load_weights
    raises.
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
        model = architecture(**arguments, **{**config, **overrides})
    except (TypeError, RuntimeError, ArithmeticError, LookupError) as error:
        if not overrides:
            raise
        raise ValueError(f"{name} cannot be made with {overrides} ({type(error).__name__}: {error}); expected values "
                         "of the same kind as its defaults") from error
    model.created = (name, arguments["attn"], img_size, overrides.get("window_size"))  # what weights are published for
    if pretrained:
        load_weights(model, "published" if pretrained is True else pretrained, classifier="fitting")
    return model


@dataclass
class Meta:
    """What a model of load_model expects and means: its images are RGB, of 0 to 1, less `mean`, divided by `std`."""
    model: str  # as create_model knows it
    attn: str | None
    task: str  # "classification", "segmentation" or "detection"
    classes: list  # names of the logits
    img_size: int  # side of the images, of dense tasks the short one
    crop_pct: float  # of classification: the centre of an image of img_size / crop_pct
    mean: tuple = MEAN
    std: tuple = STD
    amp: str = "auto"  # precision, as `run.py predict` has it: bf16 on a GPU


def load_model(path):
    """A trained model and what it expects, out of a run of this project.

    Args:
        path: a run's folder, whose best.pt is taken, or a checkpoint of a run.

    Returns: (model, Meta), the model in evaluation mode on the CPU, made as it was trained, with the moving average of
    its weights where there is one. eval.image.predict_image(model, meta, image) shows it a photograph.
    Raises FileNotFoundError where there is no checkpoint, and ValueError for one that is damaged, as load_weights does,
    or that is not of this project and does not say what model it is of: for that there is create_model(pretrained=...).
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.pt"
    checkpoint = read(path)
    config = checkpoint.get("config") if isinstance(checkpoint, dict) else None
    classes = checkpoint.get("classes") if isinstance(config, dict) else None
    ours = isinstance(classes, list) and all(isinstance(name, str) for name in classes) and NEEDED <= config.keys()
    if not ours or not isinstance(config["num_classes"], int):
        raise ValueError(f"{path} is no checkpoint of this project, which would say what model it is of; published and "
                         f"other weights go into create_model(NAME, attn=ATTENTION, pretrained={str(path)!r})")
    overrides = {name: config[name] for name in ("patch_size", "window_size") if config.get(name) is not None}
    try:
        model = create_model(config["model"], attn=config["attn"], num_classes=config["num_classes"],
                             img_size=config["img_size"], **{**overrides, **config["model_args"]})
    except (ValueError, TypeError, RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is damaged, or of a newer version: its configuration makes no model ({error})"
                         ) from error
    load_checkpoint(model, checkpoint, path)
    names = [*classes, *map(str, range(len(classes), config["num_classes"]))]  # a model may have more than it names
    meta = Meta(config["model"], config["attn"], model.task, names, config["img_size"], config["crop_pct"])
    return model.eval(), meta


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
