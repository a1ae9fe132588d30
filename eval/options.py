"""Options of `run.py eval` and `run.py predict`: the command line over the checkpoint's configuration."""
import argparse
import json
import os
from pathlib import Path

import torch

from models import create_model, load_weights, published
from train import config as configuration
from train.command_line import Parser

# Taken from a checkpoint.
TRAINED = ("attn", "img_size", "crop_pct", "num_classes", "patch_size", "window_size", "model_args", "seed", "masks",
           "exif", "zero_label")
MODEL_OPTIONS = ("attn", "img_size", "num_classes", "patch_size", "window_size", "model_args")
OPTIONS = TRAINED + ("data", "val_limit", "batch_size", "device", "amp", "workers")


def make_parser(prog, description, images=False):
    """With the options that every evaluation has: the model, its weights and OPTIONS; or, with `images`, words: a model
    and files."""
    parser = Parser(prog=prog, description=description)
    of_model = "architecture; default: the one in the checkpoint, else swin_t"
    if images:
        parser.add_argument("words", nargs="*", metavar="[MODEL] IMAGE", help=f"photographs, after the {of_model}")
    else:
        parser.add_argument("model", nargs="?", default=None, help=of_model)
    parser.add_argument("--weights",
                        help="checkpoint of this project or of others, folder of a run, or `published`: what the "
                             "authors published for this model, see `run.py info --published`; default: none")
    parser.add_keys(OPTIONS)
    parser.add_argument("--limit", dest="val_limit", default=argparse.SUPPRESS, metavar="VAL_LIMIT",
                        help="the same as --val-limit")
    return parser


def settle(options, weights, photographs=False):
    """Options over what the checkpoint was trained with over defaults -> (Config, names of its classes or None).

    photographs: the model will see some, even without `data`: what is not known is then as in the recipe for them, not
    for the scenes. Else a model without --data sees what it was trained on: its folder, or the scenes. Raises
    ValueError or FileNotFoundError where that cannot be.
    """
    if options["model"] and Path(options["model"]).is_file():
        raise ValueError(f"{options['model']} is a file, where the name of a model was expected; weights are named "
                         "with --weights")
    saved, classes = checkpoint_facts(weights) if weights else ({}, None)
    if options["model"] and saved and options["model"] != saved["model"]:
        raise ValueError(f"{weights} was trained as {saved['model']}, not as {options['model']}; "
                         "name that model or none")
    options["model"] = options["model"] or saved.get("model", "swin_t")
    if weights and not photographs and options.get("data") is None:
        if not saved:
            raise ValueError(f"{weights} is no checkpoint of this project, which would say what it was trained on; "
                             "name the photographs with --data. Rendered scenes are for models trained on them")
        options["data"] = saved.get("data") and os.fsdecode(os.fsencode(configuration.cast("data", saved["data"])))
        records = str(options["data"]).partition(":")[0] in configuration.RECORDS  # says itself what is missing
        if options["data"] is not None and not records and not Path(options["data"]).is_dir():
            raise FileNotFoundError(f"{weights} was trained on {options['data']}, which is not here; "
                                    "name its folder with --data")
    if not saved:  # the scenes have a size of their own, and so have the photographs of each model's recipe
        recipe = configuration.recipe_path(options["model"], photographs or options.get("data"),
                                            attn=options.get("attn"))
        saved = configuration.read_recipe(recipe) if recipe.exists() else {}
    task = configuration.task_of(options["model"])
    config = configuration.Config(batch_size=128 if task == "classification" else None)
    for name, value in [(name, saved[name]) for name in TRAINED if name in saved] + list(options.items()):
        setattr(config, name, configuration.cast(name, value))
    configuration.check(config)
    if classes is not None and len(classes) > (config.num_classes or len(classes)):
        raise ValueError(f"{weights} names {len(classes)} classes, and --num-classes is {config.num_classes}; "
                         "expected at least as many")
    return config, classes


def load_model(config, weights):
    """The model of a Config, with the weights in a file, or fresh ones for None."""
    model = create_model(config.model, attn=config.attn, num_classes=config.num_classes, img_size=config.img_size,
                         **configuration.model_overrides(config))
    return load_weights(model, weights) if weights else model


def weights_file(path):
    """What --weights names: a file, or the best checkpoint in the folder of a run. Raises FileNotFoundError."""
    path = Path(path)
    if not path.is_dir():
        return str(path)
    if not (path / "best.pt").is_file():
        raise FileNotFoundError(f"--weights {path}: no best.pt in this folder; expected that of a finished run, or a "
                                "file")
    return str(path / "best.pt")


def checkpoint_facts(path):
    """(configuration, class names) inside a checkpoint of train.loop; ({}, None) for any other file, which load_weights
    judges. Raises FileNotFoundError where there is none."""
    if published.is_name(path):
        return {}, None
    if not Path(path).exists():
        raise FileNotFoundError(f"--weights: no checkpoint at {path}")
    try:
        if str(path).endswith(".safetensors"):  # as run.py export writes it
            from safetensors import safe_open
            with safe_open(path, "pt") as file:
                checkpoint = {key: json.loads(file.metadata()[key]) for key in ("config", "classes")}
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # torch maps no file whose name is not UTF-8
                checkpoint = torch.load(path, map_location="cpu", mmap=str(path).isascii(), weights_only=True)
        saved, classes = dict(checkpoint["config"]), list(checkpoint["classes"])
    except Exception:
        return {}, None
    ours = isinstance(saved.get("model"), str) and all(isinstance(name, str) for name in classes)
    return (saved, classes) if ours else ({}, None)
