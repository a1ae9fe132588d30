"""The configuration of a run: one dataclass, filled from defaults, then a recipe, then the command line."""
import argparse
import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

RECIPES = Path(__file__).parent / "recipes"


def key(default, help):
    """A field of Config. `help` is both its documentation and its line in --help."""
    default = dict(default_factory=default) if callable(default) else dict(default=default)
    return field(**default, metadata={"help": help})


@dataclass
class Config:
    # What is trained, on what, where to
    model: str = key("swin_t", "architecture, as models.create_model knows it")
    attn: str | None = key(None, "kind of attention; null: the architecture's own")
    data: str | None = key(None, "folder with train/ and val/ or test/, one folder per class inside; null: rendered scenes")
    token_labels: str | None = key(None, "VOLO: folder of label maps, <class>/<image name>.pt beside each of data's train/; null: image labels")
    weights: str | None = key(None, "start from these weights, for fine-tuning; null: fresh ones")
    fresh_head: bool = key(False, "of `weights`, leave out the classifier: the data has other classes")
    out: str | None = key(None, "folder of the run; null: runs/<model>-<attn>-<data>, numbered if taken")
    limit: int | None = key(None, "use only this many training images, equally many of each class; scenes: images per epoch")
    val_limit: int | None = key(None, "use only this many validation images, equally many of each class")

    # Architecture; null leaves the choice to the model
    img_size: int = key(224, "side of the images in pixels; segmentation: of the crops, and short side when evaluating; detection: short side")
    num_classes: int | None = key(None, "classes; null: as many as the data has")
    patch_size: int | None = key(None, "pixels along the side of a patch")
    window_size: int | None = key(None, "side of an attention window in patches")
    drop_path_rate: float | None = key(None, "stochastic depth of the last block")
    checkpointing: bool = key(False, "recompute blocks in the backward pass: less memory, more time")
    model_args: dict = key(dict, "any other argument of the architecture, as YAML: '{embed_dim: 64, depths: [2, 2, 4, 2]}'")

    # Schedule
    epochs: int = key(300, "passes over the training images")
    batch_size: int = key(1024, "images per optimiser step, over all ranks and accumulated passes together")
    accumulate: int = key(1, "backward passes per optimiser step; each sees batch_size / accumulate / ranks images")
    lr: float = key(1e-3, "peak learning rate")
    warmup_lr: float = key(1e-6, "learning rate of the first step")
    min_lr: float = key(1e-5, "learning rate at the end")
    schedule: str = key("cosine", "of the learning rate after the warm-up: cosine; linear, which falls from the first step on; or steps")
    milestones: tuple = key((8.0, 11.0), "schedule steps: epochs after which the learning rate is divided by ten")
    warmup_epochs: float = key(20.0, "epochs of linear warm-up; a cosine runs from its end to the last step")
    weight_decay: float = key(0.05, "decay of AdamW; norms, biases and relative position biases are not decayed")
    betas: tuple = key((0.9, 0.999), "momenta of AdamW")
    clip_grad: float = key(0.0, "largest norm of the gradient; 0: no clipping")
    ema: float = key(0.0, "decay per step of a moving average of the weights, which is then what is evaluated; 0: none")

    # Augmentation and regularisation
    scale: tuple = key((0.08, 1.0), "share of the image's area that a random crop keeps, from and to; 1,1: whole image, resized")
    resize: tuple = key((0.5, 2.0), "segmentation, detection: ratio to img_size by which the photograph is resized, from and to")
    crop: float = key(0.5, "detection: probability that the photograph is cropped before it is resized")
    flip: float = key(0.5, "probability of a horizontal flip")
    randaugment: float = key(0.0, "mean magnitude of RandAugment, 0 to 10; 0: off")
    randaugment_std: float = key(0.5, "standard deviation of that magnitude")
    mixup: float = key(0.0, "alpha of mixup; 0: off. With cutmix, each batch takes one of the two at random")
    cutmix: float = key(0.0, "alpha of cutmix; 0: off")
    mix_token: float = key(0.0, "VOLO: alpha of mix-token, where a box of tokens changes places between two images; 0: off")
    dense_weight: float = key(0.5, "VOLO: weight of the loss of the tokens beside that of the image")
    auxiliary_weight: float = key(0.4, "segmentation: weight of the auxiliary head's loss")
    ground_truth: bool = key(False, "with token_labels: mix the image's label into the target of the class token")
    erasing: float = key(0.0, "probability that a rectangle is replaced by noise")
    label_smoothing: float = key(0.0, "probability mass spread over all classes")
    crop_pct: float = key(0.9, "validation: the image is resized to img_size / crop_pct, then its centre is taken; above 1: in a black frame")

    # Machine
    seed: int = key(0, "of weights, order, augmentation and stochastic depth")
    device: str = key("auto", "auto, cpu or cuda; auto: cuda where there is one")
    amp: str = key("auto", "autocast: bf16, fp16 or none; auto: bf16 on cuda, none on cpu")
    compile: bool = key(False, "compile the model with torch.compile")
    workers: int | None = key(None, "processes per rank that read and augment images; null: none for scenes, else up to 8")


KEYS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
NAMES = {int: "a whole number", float: "a number", bool: "true or false", tuple: "two numbers, as 0.9,0.999",
         dict: "a YAML mapping, as '{embed_dim: 64}'", str: "a text"}
# A resumed run may differ in these alone: they change neither the weights nor the images.
FREE = ("data", "weights", "out", "val_limit", "device", "compile", "checkpointing", "workers")


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch_size for --batch-size, never guesses at abbreviations, and names the nearest unknown option."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse(self, argv):
        argv = [re.sub(r"^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in argv]
        known, unknown = self.parse_known_intermixed_args(argv)
        for word in unknown:
            if word.startswith("-"):
                option = word.split("=")[0]
                raise ValueError(f"unknown option {option}; {_nearest(option, self._option_string_actions)}--help lists all")
            raise ValueError(f"{word!r} is not the value of any option; --help lists all")
        return known

    def error(self, message):  # argparse's own would print the whole usage before the one line that matters
        raise ValueError(message)

    def add_keys(self, names):
        """Options for these keys of Config; one that is not given is absent from the result."""
        for name in names:
            optional = dict(nargs="?", const=True) if TYPES[name] is bool else {}
            self.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=KEYS[name].metadata["help"],
                              metavar=name.upper(), **optional)


def parse_train(argv):
    """Command line of `run.py train` -> (Config, resume, notes).

    resume: None, True (the newest run of this name) or a path. notes: lines to print about choices that were made.
    """
    parser = Parser(prog="run.py train", description="Train a classifier, a segmenter or a detector.")
    parser.add_argument("model", nargs="?", default="swin_t", help=KEYS["model"].metadata["help"])
    parser.add_argument("--recipe", default=None, help="YAML file of keys; default: train/recipes/<model>.yaml, without --data scenes_<family>.yaml")
    parser.add_argument("--resume", nargs="?", const=True, default=None, metavar="RUN",
                        help="continue the newest run of this name, or the given folder or checkpoint")
    parser.add_keys(name for name in KEYS if name != "model")
    options = vars(parser.parse(argv))
    recipe, resume = options.pop("recipe"), options.pop("resume")
    config, notes = resolve(options, recipe)
    return config, resume, notes


def resolve(options, recipe=None):
    """Dataclass defaults < recipe < options -> (Config, notes). Raises ValueError for an unknown key or a value that does not fit.

    options: {key: value or text}. recipe: path, or name of a shipped one; None: that of the model, or without data that of the scenes.
    """
    config, notes = Config(), []
    model = options.get("model", config.model)
    path = Path(recipe) if recipe else RECIPES / f"{model}.yaml" if options.get("data") else scenes_recipe(model)
    if recipe and not path.exists() and (RECIPES / f"{recipe}.yaml").exists():
        path = RECIPES / f"{recipe}.yaml"
    if path.exists():
        values = read_recipe(path)
        notes.append(f"recipe {path.stem}: {path}")
    elif recipe:
        raise FileNotFoundError(f"no recipe at {path}; --recipe takes a YAML file, and there is: {_shipped()}")
    else:
        values = {}
        notes.append(f"no recipe is shipped for {options.get('model')} (there is: {_shipped()}): plain defaults, no augmentation beyond "
                     "crop and flip")
    for name, value in {**values, **options}.items():
        setattr(config, name, cast(name, value))

    if config.warmup_epochs >= config.epochs > 0:
        share = cast("warmup_epochs", values.get("warmup_epochs", 20)) / cast("epochs", values.get("epochs", 300))
        if "warmup_epochs" in options or share >= 1:
            raise ValueError(f"warmup_epochs = {config.warmup_epochs:g} leaves none of the {config.epochs} epochs for training; "
                             "expected less than --epochs")
        notes.append(f"warm-up of {share * config.epochs:.3g} epochs, the recipe's share, because its {config.warmup_epochs:g} do not fit "
                     f"into {config.epochs}")
        config.warmup_epochs = share * config.epochs
    usual = values.get("batch_size")
    if usual and "lr" not in options and config.batch_size != usual:
        notes.append(f"lr {config.lr:g} was meant for batches of {usual}; for {config.batch_size}, proportional would be "
                     f"--lr {config.lr * config.batch_size / usual:.2g}")
    check(config)
    return config, notes


def scenes_recipe(model):
    """The recipe of rendered scenes: one for each family of architectures."""
    return RECIPES / f"scenes_{model.split('_')[0]}.yaml"


def read_recipe(path):
    """A YAML file of Config keys -> dict. The key `base` names a recipe beside it, whose keys hold where the file has none.

    Raises ValueError for an unknown key, naming the nearest.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no recipe at {path}; there is: {_shipped()}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a mapping of configuration keys to values")
    base = values.pop("base", None)
    if base is not None:
        values = {**read_recipe(Path(path).with_name(f"{base}.yaml")), **values}
    for name in values:
        if name not in KEYS:
            raise ValueError(f"unknown key {name!r} in {path}; {_nearest(str(name), KEYS)}`run.py train --help` lists all")
    return values


def cast(name, value):
    """`value`, from YAML or as text, in the type of key `name`. Raises ValueError naming both."""
    kind = TYPES[name]
    if isinstance(kind, types.UnionType):  # X | None
        if value is None or str(value).lower() in ("null", "none"):
            return None
        kind = typing.get_args(kind)[0]
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int:
            if float(value) != int(float(value)):
                raise ValueError
            return int(float(value))
        if kind is tuple:
            first, second = value.split(",") if isinstance(value, str) else value
            return float(first), float(second)
        if kind is dict:
            return dict(yaml.safe_load(value) if isinstance(value, str) else value)
        return kind(value)
    except (ValueError, TypeError, KeyError, OverflowError, yaml.YAMLError):
        raise ValueError(f"{name} = {value!r} does not fit; expected {NAMES[kind]}") from None


def check(config):
    def expect(fits, name, expected):
        if not fits:
            raise ValueError(f"{name} = {getattr(config, name)!r} does not fit; expected {expected}")

    for name in ("img_size", "num_classes", "patch_size", "window_size", "epochs", "batch_size", "accumulate", "limit", "val_limit"):
        expect(getattr(config, name) is None or getattr(config, name) > 0, name, "1 or more")
    for name in ("lr", "warmup_lr", "min_lr", "warmup_epochs", "weight_decay", "clip_grad", "mixup", "cutmix", "mix_token", "dense_weight",
                 "auxiliary_weight",
                 "randaugment_std"):
        expect(getattr(config, name) >= 0, name, "0 or more")
    for name in ("flip", "crop", "erasing", "label_smoothing"):
        expect(0 <= getattr(config, name) <= 1, name, "0 to 1")
    expect(0 <= config.ema < 1, "ema", "0 (none) to below 1")
    expect(0 <= config.randaugment <= 10, "randaugment", "0 (off) to 10")
    expect(0 < config.scale[0] <= config.scale[1] <= 1, "scale", "two rising shares, as 0.08,1")
    expect(0 < config.crop_pct <= 2, "crop_pct", "above 0, up to 2")
    expect(not config.mix_token or not (config.mixup or config.cutmix), "mix_token", "0 beside mixup or cutmix: an image is mixed once")
    expect(not config.token_labels or config.data, "token_labels", "null without --data: they belong to photographs")
    expect(config.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
    expect(0 < config.resize[0] <= config.resize[1], "resize", "two rising ratios, as 0.5,2")
    expect(config.schedule in ("cosine", "linear", "steps"), "schedule", "cosine, linear or steps")
    expect(0 < config.milestones[0] <= config.milestones[1], "milestones", "two rising epochs, as 8,11")
    expect(config.amp in ("auto", "bf16", "fp16", "none"), "amp", "auto, bf16, fp16 or none")
    expect(config.workers is None or config.workers >= 0, "workers", "0 or more")


def model_overrides(config):
    """What a Config says about the architecture, as keyword arguments of models.create_model."""
    named = {name: getattr(config, name) for name in ("patch_size", "window_size", "drop_path_rate")}
    named = {name: value for name, value in named.items() if value is not None}
    if config.checkpointing:
        named["checkpointing"] = True
    return {**named, **config.model_args}


def to_dict(config):
    """Plain types only, so that YAML and torch.load(weights_only=True) read it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}


def refuse_other(config, saved):
    """Raises ValueError when a run with configuration `saved` (a dict) cannot be continued under `config`."""
    ours = to_dict(config)
    other = [f"{name}: {saved.get(name)!r} -> {ours[name]!r}" for name in KEYS if name not in FREE and ours[name] != saved.get(name)]
    if other:
        raise ValueError("--resume: the run was started with another configuration, and would not end as it would have; start a new run, "
                         "or give the old values. Different are " + ", ".join(other))


def _nearest(word, known):
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {match[0]}? " if match else ""


def _shipped():
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
