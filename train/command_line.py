"""Options on the command line: the keys of Config, and `run.py train --help` in groups.

Imports no torch, as config.py.
"""
import argparse
import re
import shutil
import textwrap
from pathlib import Path

from train import words
from train.config import KEYS, TASK_OF_FAMILY, TYPES, concerns, task_of, to_dict
from train.runs import find, go_on, refuse_inputs, saved_configuration
from train.small_data import resolve

GROUPS = {"model": "Model", "data": "Data and output", "schedule": "Schedule and optimiser",
          "augmentation": "Augmentation", "task": "Loss and evaluation", "machine": "Machine"}


class Parser(argparse.ArgumentParser):
    """argparse that takes --batch_size for --batch-size, guesses no abbreviations, names the option that was meant."""
    settable = ()  # keys of Config that its --set takes

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse(self, argv):
        argv = [re.sub(r"^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in argv]
        for i in range(len(argv) - 1, 0, -1):  # argparse takes -1e-3 for an option
            if re.fullmatch(r"-[\d.]+e[-+]?\d+", argv[i]) and argv[i - 1].startswith("--"):
                argv[i - 1:i + 1] = [f"{argv[i - 1]}={argv[i]}"]
        known, unknown = self.parse_known_intermixed_args(argv)
        for word in unknown:
            if word.startswith("-"):
                option, _, value = word.partition("=")
                behind = argv[argv.index(word) + 1:][:1]
                value = value or (behind[0] if behind and not behind[0].startswith("-") else "")
                hint = words.of_option(option, value, self.prog, self._option_string_actions,
                                       [_option(name) for name in self.settable])
                raise ValueError(f"unknown option {option}; {hint}--help lists all")
            raise ValueError(f"{word!r} is not the value of any option; --help lists all")
        if hint := words.of_model(getattr(known, "model", None)):
            raise ValueError(f"unknown model {known.model!r}; {hint}")
        return known

    def error(self, message):  # argparse's own would print the whole usage before the one line that matters
        raise ValueError(message)

    def add_keys(self, names):
        """Options for these keys of Config; one that is not given is absent from the result."""
        for name in names:
            optional = dict(nargs="?", const=True) if TYPES[name] is bool else {}
            self.add_argument(_option(name), default=argparse.SUPPRESS, help=KEYS[name].metadata["help"],
                              metavar=name.upper(), **optional)


def parse_train(argv, from_rank_0=lambda function: function()):
    """Command line of `run.py train` -> (Config, resume, notes), or None after printing the help it asked for.

    resume: None, True (there is nothing to resume yet) or the folder of the run to continue; its configuration is then
    that of the run, unless a recipe is given. notes: lines to print about choices that were made. from_rank_0(function)
    gives what the function gives on rank 0, whose folders are the ones that count.
    """
    parser = Parser(prog="run.py train", add_help=False)
    parser.add_argument("model", nargs="?", default=None)
    parser.add_argument("--recipe", default=None)
    parser.add_argument("--resume", nargs="?", const=True, default=None)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_keys(name for name in KEYS if name != "model")
    options = vars(parser.parse(argv))
    recipe, resume, wants_help = options.pop("recipe"), options.pop("resume"), options.pop("help")
    named = options["model"] is not None
    given = {name: value for name, value in options.items() if value is not None}
    options["model"] = options["model"] or KEYS["model"].default
    config, notes = resolve(options, recipe, from_rank_0)
    if wants_help:
        print(help_of_train(config, notes[0], named))
        return None
    if recipe and config.out and not resume:
        refuse_inputs("--out", Path(config.out) / "config.yaml", files=[recipe])
    if resume:
        def saved():
            folder = find(config, resume)
            return folder, saved_configuration(folder) if folder and not recipe else None
        folder, values = from_rank_0(saved)
        resume = folder or True
        if values is not None:
            config, notes = go_on(folder, values, given)
    return config, resume, notes


def help_of_train(config, source, named):
    """The options of `run.py train`, in groups, with their values in `config`.

    named: whether the user named a model; else only what all models have in common is shown. source: where values are
    from.
    """
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    families = {}
    for family, task in TASK_OF_FAMILY.items():
        families.setdefault(task, []).append(f"{family}_...")
    if named:
        title = f"{config.model}, {task_of(config.model)}; values: {source}"
    else:
        title = (f"What all models have in common; the values are those of {config.model}, which is trained where no "
                 "model is named.\n`run.py train MODEL --help` shows the values and all options of a model, and --data "
                 "DIR or --recipe before\nit their values then. " +
                 "; ".join(f"{task}: {', '.join(names)}" for task, names in families.items()))
    lines = ["usage: python run.py train [MODEL] [--OPTION VALUE ...]", "", title]
    entry = lambda left, text: lines.extend(_columns(left, text, width))
    for group, heading in GROUPS.items():
        names = [name for name, field in KEYS.items() if field.metadata["group"] == group and name != "model"
                 and concerns(name, config.model if named else None)]
        lines += ["", f"{heading}:"] if names else []
        for name in names:
            entry(f"{_option(name)} {shown(to_dict(config)[name])}", KEYS[name].metadata["help"])
        if group == "data":
            entry("--recipe FILE", "YAML file of options, or the name of a shipped one")
            entry("--resume [RUN]", "continue the newest run of this name, or the given one")
    return "\n".join(lines)


def _option(name):
    return "--" + name.replace("_", "-")


def shown(value):
    """As it would be typed."""
    if isinstance(value, list):
        return ",".join(f"{number:g}" for number in value)
    if isinstance(value, dict):
        return "'{" + ", ".join(f"{name}: {shown(part)}" for name, part in value.items()) + "}'"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _columns(left, text, width):
    indent = 2 + 30
    wrapped = textwrap.wrap(text, width - indent)
    if len(left) >= 30:
        return ["  " + left, *(" " * indent + line for line in wrapped)]
    return [f"  {left:<30}{wrapped[0]}", *(" " * indent + line for line in wrapped[1:])]
