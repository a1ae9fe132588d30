"""`run.py info`: a model's parameters, multiply-adds and memory, printed."""
from models.info import info, stages, table
from train.command_line import Parser
from train.config import model_overrides, recipe_path, resolve


def main(argv):
    parser = Parser(prog="run.py info", description="Count a model's parameters, multiply-adds and memory.")
    parser.add_argument("model", nargs="?", default="swin_t", help="architecture, as models.create_model knows it")
    parser.add_argument("--layers", action="store_true", help="every layer, not only the stages")
    parser.add_keys(["attn", "img_size", "num_classes", "patch_size", "window_size", "model_args"])
    given = vars(parser.parse(argv))
    layers, recipe = given.pop("layers"), recipe_path(given["model"], data=True)
    config, _ = resolve(given, recipe if recipe.exists() else None)
    overrides = {name: value for name, value in model_overrides(config).items() if name != "drop_path_rate"}
    rows = info(config.model, (config.img_size, config.img_size), attn=config.attn, num_classes=config.num_classes,
                img_size=config.img_size, **overrides)
    print(f"{config.model}, attn {config.attn or 'default'}, one image of {config.img_size} x {config.img_size}; "
          f"memory: what training keeps for the backward pass, "
          f"float32\n{table(rows[1:] + rows[:1] if layers else stages(rows))}")
