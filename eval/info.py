"""`run.py info`: a model's parameters, multiply-adds and memory, or its recipe beside the published one, printed."""
from eval import printed_as_json
from models import published as published_weights
from models.info import info, stages, table
from train.command_line import Parser, shown
from train.config import Config, cast, model_overrides, published, read_recipe, recipe_path, resolve, to_dict


def main(argv):
    parser = Parser(prog="run.py info", description="Count a model's parameters, multiply-adds and memory.")
    parser.add_argument("model", nargs="?", default="swin_t", help="architecture, as models.create_model knows it")
    parser.add_argument("--layers", action="store_true", help="every layer, not only the stages")
    parser.add_argument("--recipe", nargs="?", const=True, metavar="NAME",
                        help="its recipe, or another one, beside the published values and their source instead")
    parser.add_argument("--published", action="store_true",
                        help="the weights that authors published for the models instead, and where they lie")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout instead: every layer, or with "
                                                            "--recipe the options")
    parser.add_keys(["attn", "img_size", "num_classes", "patch_size", "window_size", "model_args"])
    given = vars(parser.parse(argv))
    layers, named, as_json = given.pop("layers"), given.pop("recipe"), given.pop("json")
    if given.pop("published"):
        print(published_weights.table())
        return
    own = None if named is True else named
    recipe = recipe_path(given["model"], data=True, recipe=own, attn=given.get("attn"))
    config, _ = resolve(given, recipe if recipe.exists() or named else None)
    if named and as_json:
        source, values = published(recipe.stem)
        printed_as_json(lambda: {"recipe": recipe.stem, "options": to_dict(config), "source": source,
                                 "published": values})
        return
    if named:
        print(recipe_table(config, recipe))
        return
    overrides = {name: value for name, value in model_overrides(config).items() if name != "drop_path_rate"}
    rows = info(config.model, (config.img_size, config.img_size), attn=config.attn, num_classes=config.num_classes,
                img_size=config.img_size, **overrides)
    if as_json:
        printed_as_json(lambda: {"model": config.model, "attn": config.attn, "img_size": config.img_size,
                                 **{name: rows[0][name] for name in ("parameters", "macs", "memory")},
                                 "layers": rows[1:]})
        return
    size = f"{config.img_size} x {config.img_size}"
    print(f"{config.model}, attn {config.attn or 'default'}, one image of {size}; memory: what training keeps for the "
          f"backward pass, float32\n{table(rows[1:] + rows[:1] if layers else stages(rows))}")


def recipe_table(config, recipe):
    """The values of a recipe, a Path, beside the published ones, as text; what differs is marked."""
    source, values = published(recipe.stem)
    ours, own = to_dict(config), read_recipe(recipe)
    lines = [f"{config.model}, recipe {recipe.stem}; published: {source or 'nothing by this name'}",
             f"{'option':<22} {'recipe':<16} {'published':<16}"]
    for name, value in ours.items():
        if name in values:
            theirs = to_dict(Config(**{name: cast(name, values[name])}))[name]
            mark = "" if theirs == value else "differs"
            lines.append(f"{name:<22} {shown(value):<16} {shown(theirs):<16} {mark}".rstrip())
        elif name in own:
            lines.append(f"{name:<22} {shown(value):<16}".rstrip())
    return "\n".join(lines)
