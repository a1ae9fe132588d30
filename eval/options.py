"""Options of `run.py eval` and `run.py predict`: the command line over what the checkpoint was trained with over the defaults."""
import argparse

import torch

from models import create_model, load_weights
from train import config as configuration

TRAINED = ("attn", "img_size", "crop_pct", "num_classes", "patch_size", "window_size", "model_args", "seed")  # taken from a checkpoint
OPTIONS = TRAINED + ("data", "val_limit", "batch_size", "device", "amp", "workers")


def parser(prog, description, images=False):
    """With the options that every evaluation has: the model, its weights and OPTIONS; or, with `images`, words: a model and files."""
    parser = configuration.Parser(prog=prog, description=description)
    of_model = "architecture; default: the one in the checkpoint, else swin_t"
    if images:
        parser.add_argument("words", nargs="*", metavar="[MODEL] IMAGE", help=f"photographs, after the {of_model}")
    else:
        parser.add_argument("model", nargs="?", default=None, help=of_model)
    parser.add_argument("--weights", help="checkpoint of this project or published weights; default: none, an untrained model")
    parser.add_keys(OPTIONS)
    parser.add_argument("--limit", dest="val_limit", default=argparse.SUPPRESS, metavar="VAL_LIMIT", help="the same as --val-limit")
    return parser


def kind(model):
    """"classifier", "segmenter" or "detector"."""
    return {"upernet": "segmenter", "mask": "detector", "cascade": "detector"}.get(model.split("_")[0], "classifier")


def settle(options, weights, photographs=False):
    """Options over what the checkpoint was trained with over defaults -> (Config, names of the checkpoint's classes or None).

    photographs: the model will see some, even without `data`: what is not known is then as in the recipe for them, not for the scenes.
    """
    saved, classes = checkpoint_facts(weights) if weights else ({}, None)
    if options["model"] and saved and options["model"] != saved["model"]:
        raise ValueError(f"{weights} was trained as {saved['model']}, not as {options['model']}; name that model or none")
    options["model"] = options["model"] or saved.get("model", "swin_t")
    if not saved:  # the scenes have a size of their own, and so have the photographs of each model's recipe
        recipe = configuration.RECIPES / f"{options['model']}.yaml" if photographs or options.get("data") else configuration.scenes_recipe(options["model"])
        saved = configuration.read_recipe(recipe) if recipe.exists() else {}
    config = configuration.Config(batch_size=128)
    for name, value in [(name, saved[name]) for name in TRAINED if name in saved] + list(options.items()):
        setattr(config, name, configuration.cast(name, value))
    configuration.check(config)
    return config, classes


def load_model(config, weights):
    """The model of a Config, with the weights in a file, or fresh ones for None."""
    model = create_model(config.model, attn=config.attn, num_classes=config.num_classes, img_size=config.img_size,
                         **configuration.model_overrides(config))
    return load_weights(model, weights) if weights else model


def heading(config, weights, what, world, device):
    """What is about to be evaluated, in two lines."""
    return (f"eval {config.model}, attn {config.attn or 'default'}, {weights or 'UNTRAINED: no --weights were given'}\n"
            f"  {what}, {config.num_classes} classes, {world} x {device}")


def checkpoint_facts(path):
    """(configuration, class names) inside a checkpoint of train.loop; ({}, None) for any other file, which load_weights judges."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return dict(checkpoint["config"]), list(checkpoint["classes"])
    except Exception:
        return {}, None
