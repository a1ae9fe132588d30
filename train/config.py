"""The configuration of a run: one dataclass, filled from defaults, then a recipe, then the command line.

Imports no torch, so that a mistake in a command is answered at once.
"""
import dataclasses
import importlib.util
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from train.words import nearest

RECIPES = Path(__file__).parent / "recipes"
PUBLISHED = Path(__file__).parent / "published.yaml"

# The first word of a model's name, its family -> its task.
TASK_OF_FAMILY = {"swin": "classification", "volo": "classification", "upernet": "segmentation",
                  "mask": "detection", "cascade": "detection"}


RECORDS = ("hf", "wds")  # what --data begins with, before a colon, where it is no folder


def key(group, default, help, only=()):
    """A field of Config. help: its line in --help. only: the tasks or families of models that it concerns."""
    default = dict(default_factory=default) if callable(default) else dict(default=default)
    only = (only,) if isinstance(only, str) else only
    return field(**default, metadata={"group": group, "help": help, "only": only})


@dataclass
class Config:
    model: str = key("model", "swin_t", "architecture, as models.create_model knows it")
    attn: str | None = key("model", None, "kind of attention; null: the architecture's own")
    img_size: int = key("model", 224, "side of the images; dense tasks: short side when evaluating")
    num_classes: int | None = key("model", None, "classes; null: as many as the data has")
    patch_size: int | None = key("model", None, "pixels along the side of a patch")
    window_size: int | None = key("model", None, "side of an attention window in patches")
    drop_path_rate: float | None = key("model", None, "stochastic depth of the last block")
    model_args: dict = key("model", dict, "other arguments of the architecture: '{embed_dim: 64}'")
    weights: str | None = key("model", None, "start from these, for fine-tuning; null: fresh ones")
    fresh_head: bool = key("model", False, "of weights, leave out the classifier even if it fits: other classes")

    data: str | None = key("data", None, "folder of the images, hf:DATASET or wds:SHARDS; null: scenes")
    limit: int | None = key("data", None, "so many training images, of all classes alike")
    val_limit: int | None = key("data", None, "so many validation images, of all classes alike")
    exif: str = key("data", "apply", "where it is unclear whether annotations follow EXIF orientation: apply or ignore",
                    ("segmentation", "detection"))
    masks: str = key("data", "required", "required: objects without a mask are refused; optional: they are boxes alone",
                     "detection")
    zero_label: str = key("data", "ignore", "label 0: ignore, it is unlabelled; class, it is the first class",
                          "segmentation")
    bad_images: int | None = key("data", None, "unreadable training images that a run bears; null: 0.1 %, at least 10")
    out: str | None = key("data", None, "folder of the run; null: runs/MODEL-ATTN-DATA, numbered")
    tensorboard: bool = key("data", False, "write TensorBoard's events into that folder, too")
    verbose: bool = key("data", False, "print the whole configuration at the start")

    epochs: int = key("schedule", 300, "passes over the training images")
    cooldown_epochs: float = key("schedule", 0.0, "of these, the last so many at min_lr")
    max_steps: int | None = key("schedule", None, "optimiser steps after which the run ends; null: epochs")
    batch_size: int = key("schedule", 1024, "images per optimiser step, of all ranks and passes together")
    accumulate: int = key("schedule", 1, "passes per optimiser step")
    lr: float = key("schedule", 1e-3, "peak learning rate")
    warmup_lr: float = key("schedule", 1e-6, "learning rate of the first step")
    min_lr: float = key("schedule", 1e-5, "learning rate at the end")
    schedule: str = key("schedule", "cosine", "of lr: cosine, linear or steps")
    cosine_from: str = key("schedule", "warmup", "where the cosine starts: warmup, at its end; zero, at epoch 0")
    lr_per: str = key("schedule", "step", "lr changes with every step or every epoch")
    lr_late: bool = key("schedule", False, "a step takes the rate of the one before")
    milestones: tuple = key("schedule", (8.0, 11.0), "steps: epochs after which lr is divided by ten")
    warmup_epochs: float = key("schedule", 20.0, "epochs of linear warm-up")
    weight_decay: float = key("schedule", 0.05, "of AdamW, for what decay names")
    decay: str = key("schedule", "weights", "weights, not biases, norms, positions; published: as there")
    betas: tuple = key("schedule", (0.9, 0.999), "momenta of AdamW")
    clip_grad: float = key("schedule", 0.0, "largest norm of the gradient; 0: no clipping")
    ema: float = key("schedule", 0.0, "decay of an average of the weights, to be evaluated; 0: none")
    fill_last: bool = key("schedule", False, "fill the last batch of an epoch instead of leaving it out")
    select: str = key("schedule", "best", "epoch of best.pt: best or last")

    scale: tuple = key("augmentation", (0.08, 1.0), "share of the area that a random crop keeps; 1,1: no crop",
                       "classification")
    interpolation: str = key("augmentation", "bicubic", "of crops and RandAugment; random: bilinear or bicubic",
                             "classification")
    resize: tuple = key("augmentation", (0.5, 2.0), "ratio to img_size, from and to", ("segmentation", "detection"))
    crop: float = key("augmentation", 0.5, "probability of a crop before the resizing", "detection")
    flip: float = key("augmentation", 0.5, "probability of a horizontal flip")
    randaugment: float = key("augmentation", 0.0, "mean magnitude of RandAugment, 0 to 10; 0: off", "classification")
    randaugment_std: float = key("augmentation", 0.5, "standard deviation of that magnitude", "classification")
    crop_last: bool = key("augmentation", False, "with token_labels: crop after RandAugment", "volo")
    mixup: float = key("augmentation", 0.0, "alpha; 0: off; with cutmix, a batch takes either", "classification")
    cutmix: float = key("augmentation", 0.0, "alpha; 0: off", "classification")
    mix_token: float = key("augmentation", 0.0, "alpha: two images exchange a box of tokens; 0: off", "volo")
    erasing: float = key("augmentation", 0.0, "probability that noise replaces a rectangle", "classification")

    label_smoothing: float = key("task", 0.0, "probability spread over all classes", "classification")
    crop_pct: float = key("task", 0.9, "validation: centre of an image of img_size / crop_pct", "classification")
    token_labels: str | None = key("task", None, "folder of label maps, CLASS/IMAGE.pt; null: image labels", "volo")
    published_label_crop: bool = key("task", False,
                                     "crop label maps with rows and columns exchanged, as published", "volo")
    dense_weight: float = key("task", 0.5, "weight of the tokens' loss", "volo")
    ground_truth: bool = key("task", False, "with token_labels: mix the image's label in", "volo")
    auxiliary_weight: float = key("task", 0.4, "weight of the auxiliary head's loss", "segmentation")

    seed: int = key("machine", 0, "of weights, order, augmentation and stochastic depth")
    device: str = key("machine", "auto", "auto, cpu or cuda; auto: cuda where there is one")
    amp: str = key("machine", "auto", "bf16, fp16 or none; auto: bf16 on cuda, none on cpu")
    compile: bool = key("machine", False, "compile the model with torch.compile")
    checkpointing: bool = key("machine", False, "recompute blocks in backward: less memory, more time")
    workers: int | None = key("machine", None, "processes per rank that read images; null: its share of the cores")
    prefetch: int = key("machine", 2, "batches that each of these keeps ready")
    grad_exchange: str = key("machine", "fp32", "precision of the gradients that ranks exchange: fp32 or bf16")
    profile: int = key("machine", 0, "steps to record with torch.profiler, in trace.json; 0: none")
    save_minutes: float = key("machine", 15.0, "between two checkpoints; one more ends each epoch")
    timeout_minutes: float = key("machine", 10.0, "of several ranks: how long one may stand still until all end")


KEYS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)
NAMES = {int: "a whole number", float: "a number", bool: "true or false", tuple: "two numbers, as 0.9,0.999",
         dict: "a YAML mapping, as '{embed_dim: 64}'", str: "a text"}
# A resumed run may differ in these alone: they change neither the weights nor the images.
FREE = ("data", "weights", "out", "val_limit", "bad_images", "device", "compile", "checkpointing", "workers",
        "profile", "prefetch", "save_minutes", "timeout_minutes", "tensorboard", "verbose")


def family_of(model):
    return model.split("_")[0]


def task_of(model):
    """"classification", "segmentation" or "detection"."""
    return TASK_OF_FAMILY.get(family_of(model), "classification")


def concerns(name, model=None):
    """Whether key `name` has an effect on a model; without one: on every model."""
    only = KEYS[name].metadata["only"]
    return not only or model is not None and (task_of(model) in only or family_of(model) in only)


def resolve(options, recipe=None, fitted=()):
    """Dataclass defaults < recipe < fitted < options -> (Config, notes: lines about choices that were made).

    options: {key: value or text}. recipe: path, or name of a shipped one; None: that of the model, or without data that
    of the scenes. fitted: {key: value} of the recipe that follow from the data, see small_data. Raises ValueError for
    an unknown key or a value that does not fit.
    """
    config, notes = Config(), []
    model = options.get("model", config.model)
    path = recipe_path(model, options.get("data"), recipe, options.get("attn"))
    if path.exists():
        values = read_recipe(path)
        notes.append(f"recipe {path.stem}: {path}")
    elif recipe:
        raise FileNotFoundError(f"no recipe at {path}; --recipe takes a YAML file, and there is: {_shipped()}")
    else:
        values = {}
        notes.append(f"no recipe is shipped for {model} (there is: {_shipped()}): plain defaults, no augmentation "
                     "beyond crop and flip")
    values = {**values, **dict(fitted)}
    for name, value in {**values, **options}.items():
        setattr(config, name, cast(name, value))
    notes += _changed(config, values, options)

    for name in options:
        if not concerns(name, model):
            notes.append(f"{name} has no effect on {model}: it is for {' and '.join(KEYS[name].metadata['only'])}")
    if config.warmup_epochs + config.cooldown_epochs >= config.epochs > 0:
        notes.append(_fit_into_epochs(config, values, options))
    usual = values.get("batch_size")
    if usual and "lr" not in options and config.batch_size != usual:
        notes.append(f"lr {config.lr:g} was meant for batches of {usual}; for {config.batch_size}, proportional would "
                     f"be --lr {config.lr * config.batch_size / usual:.2g}")
    check(config)
    return config, notes


def _changed(config, values, options):
    """A line on the options that differ from what the recipe has, beside those that the first line of a run tells."""
    told = ("model", "attn", "data", "out", "verbose")
    before = {name: cast(name, values.get(name, getattr(Config(), name))) for name in options if name not in told}
    changed = [f"{name} {getattr(config, name)} (recipe: {value})"
               for name, value in before.items() if getattr(config, name) != value]
    return [f"given: {', '.join(changed)}"] if changed else []


def _fit_into_epochs(config, values, options):
    """Keeps the recipe's shares of warm-up and cool-down in a run too short for their epochs -> a note."""
    recipe_epochs = cast("epochs", values.get("epochs", 300))
    parts = {name: cast(name, values.get(name, KEYS[name].default)) for name in ("warmup_epochs", "cooldown_epochs")}
    for name, epochs in parts.items():
        if name not in options:
            setattr(config, name, epochs * config.epochs / recipe_epochs)
    if config.warmup_epochs + config.cooldown_epochs >= config.epochs:
        name = "cooldown_epochs" if config.cooldown_epochs >= config.epochs else "warmup_epochs"
        raise ValueError(f"{name} = {getattr(config, name):g} leaves none of the {config.epochs} epochs for training; "
                         "expected less than --epochs")
    config.lr_per = config.lr_per if "lr_per" in options else "step"
    return (f"warm-up of {config.warmup_epochs:.3g} and cool-down of {config.cooldown_epochs:.3g} epochs, the recipe's "
            f"shares, because its {parts['warmup_epochs']:g} and {parts['cooldown_epochs']:g} do not fit into "
            f"{config.epochs}")


def recipe_path(model, data=None, recipe=None, attn=None):
    """Where the recipe is: `recipe`, a file or the name of a shipped one, else that of the model, or without data of
    the scenes. The file need not exist.

    attn: plain Swin, None or "window", was published with a recipe of its own.
    """
    if recipe:
        shipped = RECIPES / f"{recipe}.yaml"
        return shipped if not Path(recipe).exists() and shipped.exists() else Path(recipe)
    if not data:
        return RECIPES / f"scenes_{family_of(model)}.yaml"
    own = RECIPES / f"{model}_window.yaml"
    return own if attn in (None, "window") and own.exists() else RECIPES / f"{model}.yaml"


def read_recipe(path, above=()):
    """A YAML file of Config keys -> dict. The key `base` names a recipe beside it, whose keys hold where the file has
    none. above: names of those that are based on it.

    Raises ValueError for an unknown key, naming the nearest, and for one that stands twice.
    """
    values = _read_mapping(path)
    base = values.pop("base", None)
    if base is not None:
        above = (*above, Path(path).stem)
        if not isinstance(base, str) or Path(base).name != base or base in above:
            raise ValueError(f"{path}: base = {base!r} does not fit; expected the name of another recipe beside it, "
                             "without .yaml")
        values = {**read_recipe(Path(path).with_name(f"{base}.yaml"), above), **values}
    for name in values:
        if name not in KEYS:
            raise ValueError(f"unknown key {name!r} in {path}; {nearest(str(name), KEYS)}`run.py train MODEL --help` "
                             "lists all")
    return values


def _read_mapping(path):
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        depth = 0
        for event in yaml.parse(text):  # a few lines of aliases, or of brackets, fill the memory
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 20:
                raise ValueError("it has aliases, *name, or brackets in brackets; write values out")
        node, values = yaml.compose(text), yaml.safe_load(text)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no recipe at {path}; there is: {_shipped()}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error})") from error
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; expected a mapping of configuration keys to values")
    names = [name.value for name, _ in node.value]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"{path}: {twice[0]} stands twice; expected each key once")
    return values


def published(recipe):
    """(source, {key: value}) of what was published for a recipe, by its name; (None, {}) where nothing was."""
    entries = yaml.safe_load(PUBLISHED.read_text())
    values = dict(entries.get(recipe, {}))
    while "base" in values:
        values = {**entries[values.pop("base")], **values}
    return values.pop("source", None), values


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
            return _whole(value)
        if kind is tuple:
            first, second = value.split(",") if isinstance(value, str) else value
            return float(first), float(second)
        if kind is dict:
            entries = dict(yaml.safe_load(value) if isinstance(value, str) else value)
            return {str(name): entry for name, entry in entries.items()}
        return kind(value)
    except (ValueError, TypeError, KeyError, OverflowError, yaml.YAMLError):
        raise ValueError(f"{name} = {value!r} does not fit; expected {NAMES[kind]}") from None


def _whole(value):
    """An int of 8, 8.0, "8" or "8e0"; large numbers keep all of their digits."""
    try:
        return int(value) if isinstance(value, str) else value.__index__()
    except (ValueError, AttributeError):
        number = float(value)
    if number != int(number):
        raise ValueError
    return int(number)


def check(config):
    """Raises ValueError for the first value out of its range, saying what was expected."""
    def expect(fits, name, expected):
        if not fits:
            raise ValueError(f"{name} = {getattr(config, name)!r} does not fit; expected {expected}")

    for name in KEYS:
        value = getattr(config, name)
        if isinstance(value, int) and name != "seed":
            expect(value < 2 ** 31, name, f"less than 2**31 = {2 ** 31}")
        if isinstance(value, float | tuple):
            expect(all(map(math.isfinite, value if isinstance(value, tuple) else (value,))), name, "finite numbers")
    expect(0 <= config.seed < 2 ** 63, "seed", "0 to 2**63 - 1")
    for name in ("img_size", "num_classes", "patch_size", "window_size", "epochs", "batch_size", "accumulate", "limit",
                 "val_limit", "max_steps", "prefetch"):
        expect(getattr(config, name) is None or getattr(config, name) > 0, name, "1 or more")
    for name in ("lr", "warmup_lr", "min_lr", "warmup_epochs", "cooldown_epochs", "weight_decay", "clip_grad",
                 "mixup", "cutmix", "mix_token", "dense_weight", "auxiliary_weight", "randaugment_std", "save_minutes",
                 "profile"):
        expect(getattr(config, name) >= 0, name, "0 or more")
    for name in ("flip", "crop", "erasing", "label_smoothing"):
        expect(0 <= getattr(config, name) <= 1, name, "0 to 1")
    expect(0 < config.timeout_minutes <= 1e6, "timeout_minutes", "more than 0, up to a million")
    expect(0 <= config.ema < 1, "ema", "0 (none) to below 1")
    expect(0 <= config.randaugment <= 10, "randaugment", "0 (off) to 10")
    expect(0 < config.scale[0] <= config.scale[1] <= 1, "scale", "two rising shares, as 0.08,1")
    expect(config.interpolation in ("bicubic", "random"), "interpolation", "bicubic or random")
    expect(0 < config.crop_pct <= 2, "crop_pct", "above 0, up to 2")
    expect(not config.mix_token or not (config.mixup or config.cutmix), "mix_token",
           "0 beside mixup or cutmix: an image is mixed once")
    records = str(config.data).partition(":")[0] in RECORDS
    expect(not records or task_of(config.model) == "classification", "data", f"a folder, for {task_of(config.model)}")
    expect(not config.token_labels or not records, "token_labels", "null: they go with the photographs of a folder")
    expect(not config.token_labels or config.data, "token_labels", "null without --data: they belong to photographs")
    expect(config.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
    expect(0 < config.resize[0] <= config.resize[1], "resize", "two rising ratios, as 0.5,2")
    expect(config.schedule in ("cosine", "linear", "steps"), "schedule", "cosine, linear or steps")
    expect(config.cosine_from in ("warmup", "zero"), "cosine_from", "warmup or zero")
    expect(config.lr_per in ("step", "epoch"), "lr_per", "step or epoch")
    expect(config.select in ("best", "last"), "select", "best or last")
    expect(config.masks in ("required", "optional"), "masks", "required or optional")
    expect(config.exif in ("apply", "ignore"), "exif", "apply or ignore")
    expect(config.zero_label in ("ignore", "class"), "zero_label", "ignore or class")
    expect(config.bad_images is None or config.bad_images >= 0, "bad_images", "0 or more")
    expect(config.grad_exchange in ("fp32", "bf16"), "grad_exchange", "fp32 or bf16")
    expect(config.decay in ("weights", "published"), "decay", "weights or published")
    expect(0 < config.milestones[0] <= config.milestones[1], "milestones", "two rising epochs, as 8,11")
    expect(config.amp in ("auto", "bf16", "fp16", "none"), "amp", "auto, bf16, fp16 or none")
    expect(config.workers is None or config.workers >= 0, "workers", "0 or more")
    expect(not config.tensorboard or importlib.util.find_spec("tensorboard"), "tensorboard",
           "the package tensorboard, which is not installed: `pip install tensorboard`")


def model_overrides(config):
    """What a Config says about the architecture, as keyword arguments of models.create_model."""
    named = {name: getattr(config, name) for name in ("patch_size", "window_size", "drop_path_rate")}
    named = {name: value for name, value in named.items() if value is not None}
    if config.checkpointing:
        named["checkpointing"] = True
    return {**named, **config.model_args}


def to_dict(config):
    """Plain types only, so that YAML and torch.load(weights_only=True) read it back."""
    values = dataclasses.asdict(config)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _shipped():
    return ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
