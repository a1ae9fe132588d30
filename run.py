"""The door: train, evaluate and time ELSA.

    python run.py train swin_t --attn elsa                          rendered scenes, no download, a few minutes on a laptop
    python run.py train swin_t --attn elsa --data DIR               DIR/train and DIR/val, ImageNet recipe of the paper
    python run.py train volo_d1 --attn elsa                         another architecture
    python run.py train upernet_swin_t --attn elsa                  semantic segmentation; --data DIR takes ADE20K's folders
    python run.py train mask_rcnn_swin_t --attn elsa                detection and masks; --data DIR takes COCO's folders
    torchrun --nproc-per-node 8 run.py train swin_t --attn elsa --data DIR
    python run.py train swin_t --attn elsa --resume                 continue the newest run of this name
    python run.py eval swin_t --attn elsa --weights FILE --data DIR
    python run.py predict upernet_swin_t --weights FILE IMAGE...    what the model sees, drawn into the images
    python run.py info swin_t --attn elsa                           parameters, multiply-adds and memory, layer by layer
    python run.py compare swin_t --attn window,dwconv,elsa          several kinds of attention, trained alike, in one table
    python run.py bench                                             operator, layer and model timings of this machine

`python run.py train --help` lists every option; `--batch-size 64` overrides the recipe's batch_size.
"""
import difflib
import os
import re
import sys


def train(argv):
    from train.config import parse_train
    options = parse_train(argv)  # before torch is imported: a mistake is answered at once
    from train.loop import train
    train(*options)


def evaluate(argv):
    from eval import ade20k, coco, imagenet, options
    parser = options.parser("run.py eval", "Evaluate a classifier, a segmenter or a detector.")
    parser.add_argument("--multi-scale", action="store_true", help="segmenters: mean over six scales, each mirrored too")
    parser.add_argument("--dump", metavar="PATH", help="segmenters: folder for the predictions, PNGs where 1 is the first class; detectors: file "
                                                       "for the detections, COCO's results JSON")
    given = vars(parser.parse(argv))
    weights, multi_scale, dump = (given.pop(name) for name in ("weights", "multi_scale", "dump"))
    config, classes = options.settle(given, weights)
    kind = options.kind(config.model)
    if multi_scale and kind != "segmenter":
        raise ValueError(f"--multi-scale is for segmenters; {config.model} is a {kind}")
    if dump and kind == "classifier":
        raise ValueError(f"--dump is for segmenters and detectors; {config.model} is a classifier")
    if kind == "segmenter":
        return ade20k.run(config, weights, classes, multi_scale, dump)
    return coco.run(config, weights, classes, dump) if kind == "detector" else imagenet.run(config, weights, classes)


def predict(argv):
    from eval.predict import main
    main(argv)


def info(argv):
    from models.info import info, stages, table
    from train import config as configuration
    parser = configuration.Parser(prog="run.py info", description="Count a model's parameters, multiply-adds and memory.")
    parser.add_argument("model", nargs="?", default="swin_t", help="architecture, as models.create_model knows it")
    parser.add_argument("--layers", action="store_true", help="every layer, not only the stages")
    parser.add_keys(["attn", "img_size", "num_classes", "patch_size", "window_size", "model_args"])
    given = vars(parser.parse(argv))
    layers, recipe = given.pop("layers"), configuration.RECIPES / f"{given['model']}.yaml"
    config, _ = configuration.resolve(given, recipe if recipe.exists() else None)
    overrides = {key: value for key, value in configuration.model_overrides(config).items() if key != "drop_path_rate"}
    rows = info(config.model, (config.img_size, config.img_size), attn=config.attn, num_classes=config.num_classes, img_size=config.img_size,
                **overrides)
    print(f"{config.model}, attn {config.attn or 'default'}, one image of {config.img_size} x {config.img_size}; memory: what training keeps for the "
          f"backward pass, float32\n{table(rows[1:] + rows[:1] if layers else stages(rows))}")


def compare(argv):
    from train.compare import main
    main(argv)


def bench(argv):
    from eval.bench import main
    main(argv)


COMMANDS = {"train": train, "eval": evaluate, "predict": predict, "info": info, "compare": compare, "bench": bench}


def main(argv):
    """Runs one command -> exit status: 0, or 2 after a mistake of the user's, said in one line, or 130 after Ctrl-C."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    try:
        if argv[0] not in COMMANDS:
            nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"unknown command {argv[0]!r}{hint} There is: {', '.join(COMMANDS)}")
        COMMANDS[argv[0]](argv[1:])
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        if os.environ.get("ELSA_TRACEBACK"):
            raise
        message = str(error)
        if message.startswith("Caught "):  # from a worker of the data loader: its traceback, then the error
            message = re.split(r"^\w+Error: ", message, flags=re.MULTILINE)[-1]
        print(f"error: {message.strip()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; `--resume` continues a training run from its last finished epoch", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
