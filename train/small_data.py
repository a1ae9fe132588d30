"""Which recipe suits the photographs of --data, where none is named: below some number of them none of the published.

Imports no torch, as config.py.
"""
import math
import os
from pathlib import Path

from train import config
from train.layout import count_training

# Training photographs from which on a published recipe is taken: ImageNet has 1,281,167, ADE20K 20,210, COCO 118,287.
LARGE = {"classification": 100_000, "segmentation": 10_000, "detection": 10_000}
FRESH = {"swin": "small_swin", "volo": "small_volo", "upernet": "small_upernet", "mask": "small_mask",
         "cascade": "small_mask"}  # recipe without weights, by the family of the model
STEPS = 1000  # that a run should have
MAX_EPOCHS = 100  # each is evaluated and saved


def resolve(options, recipe=None, from_rank_0=lambda function: function()):
    """config.resolve, where without a `recipe` the data decide on it. from_rank_0(function): what function() gives on
    rank 0, whose photographs are counted."""
    chosen = from_rank_0(lambda: choose(options)) if options.get("data") and not recipe else None
    if chosen is None:
        return config.resolve(options, recipe)
    recipe, fitted, said = chosen
    settled, notes = config.resolve(options, recipe, fitted)
    return settled, [notes[0], said, *notes[1:]]


def choose(options):
    """(name of a recipe, {key: value} that follow from the number of photographs, a line that says so) for a small
    data set; None for a large one, and for one that cannot be counted: what it lacks is said when it is read.

    options: {key: value or text}, "data" among them.
    """
    data, weights, limit = (config.cast(name, options.get(name)) for name in ("data", "weights", "limit"))
    model = options.get("model", config.KEYS["model"].default)
    task, family = config.task_of(model), config.family_of(model)
    if data is None or family not in FRESH or not Path(data).is_dir():
        return None
    count = min(count_training(data, task, LARGE[task]), limit or math.inf)
    if not 0 < count < LARGE[task]:
        return None
    recipe = f"finetune_{task}" if weights else FRESH[family]
    values = config.read_recipe(config.recipe_path(model, data, recipe))
    fitted = fit(count, values["batch_size"], values["epochs"],
                 config.cast("batch_size", options.get("batch_size", 0)))
    published = config.recipe_path(model, data, attn=options.get("attn")).stem
    start = "fine-tunes the weights" if weights else "starts from nothing, as there are no --weights"
    return recipe, fitted, (f"{count:,} training photographs, fewer than {LARGE[task]:,}: this recipe {start}; "
                            f"--recipe {published} takes the published one")


def fit(count, batch_size, epochs, given=0):
    """{"epochs", "batch_size"} for `count` photographs: eight steps an epoch or more, as far as batches of eight allow,
    and epochs that make STEPS, at most MAX_EPOCHS. batch_size, epochs: of the recipe, the most and the least. given: a
    batch size that the user wants instead, or 0."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    fitting = min(batch_size, max(8, 2 ** int(math.log2(max(1, count / 8)))), count)
    fitting = given or -(-fitting // world) * world  # as many for each rank
    wanted = math.ceil(STEPS / max(1, count // fitting))
    return {"epochs": max(epochs, min(wanted, MAX_EPOCHS)), **({} if given else {"batch_size": fitting})}
