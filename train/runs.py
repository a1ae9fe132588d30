"""Which folder a run is in, and the configuration with which it goes on.

Imports no torch, as config.py: what --resume means is settled before the first slow import.
"""
import os
import re
from pathlib import Path

from train.config import FREE, KEYS, RECORDS, Config, cast, check, read_recipe, to_dict

RUNS = Path("runs")


def name_of(config):
    """MODEL-ATTN-DATA."""
    return "-".join(filter(None, [config.model, config.attn, name_of_data(config.data)]))


def name_of_data(data):
    """Of --data, for the name of a folder."""
    if data is None:
        return "scenes"
    kind, _, place = data.partition(":")
    if kind in RECORDS:  # hf:owner/name, wds:/data/x-train-{0000..0003}.tar::...
        return re.sub(r"[^\w.]+", "-", Path(place.partition("::")[0]).name.removesuffix(".tar")).strip("-")
    return Path(data).resolve().name


def make(config, may_exist=False):
    """Path of a new folder: --out, or the first free of runs/<name>, runs/<name>-2, ...

    may_exist: --out may be a folder whose run was stopped before its first checkpoint.
    """
    if config.out:
        path = Path(config.out)
        refuse_inputs("--out", path, config.data, [config.token_labels])
        for name in ("best.pt", "last.pt"):
            refuse_inputs("--out", path / name, files=[config.weights])
        if has_checkpoint(path) or (path / "log.jsonl").exists() and not may_exist:
            raise ValueError(f"--out {path} already holds a run; "
                             f"continue it with --resume {path}, or name another folder")
        path.mkdir(parents=True, exist_ok=True)
        return str(path)
    refuse_inputs("--out", RUNS.absolute(), config.data)
    number = 1
    while True:
        path = RUNS / (name_of(config) + (f"-{number}" if number > 1 else ""))
        try:
            path.mkdir(parents=True)
            return str(path)
        except FileExistsError:
            number += 1


def refuse_inputs(option, out, data=None, files=()):
    """Raises ValueError when `out`, a file or folder that is to be written, is an input or lies in a folder of inputs,
    by way of a symbolic link, too.

    option: its name. data: a folder in any of the layouts, or None. files: others, or None, that are read.
    """
    read = [Path(file) for file in files if file]
    if data is not None:
        data = Path(data)
        splits = ("train*", "val*", "test*", "images", "images/*", "annotations", "annotations/*")
        # Without any of these it is a folder per class, and what is new in it would be another class.
        read += [path for split in splits for path in data.glob(split)] or [data]
        if _identity(out) == _identity(data) != 0:
            raise ValueError(f"{option} {out} is the folder of --data; nothing is written into it, name another one")
    resolved = Path(out).resolve()
    written = {_identity(path) for path in (resolved, *resolved.parents)} - {0}
    for path in read:
        if _identity(path) in written:
            raise ValueError(f"{option} {out} would write over {path} or into it, which is read; name another place")


def _identity(path):
    """What is the same for two names of one file or folder; 0 where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return 0
    return status.st_dev, status.st_ino


def find(config, resume):
    """Path of the folder to continue, or None when there is nothing to resume yet.

    resume: True, for --out where it is given, else the newest run of this name and this data with a checkpoint; or the
    path of a run's folder or of a file in it. Raises FileNotFoundError for a path that holds no run.
    """
    if resume is True and not config.out:
        numbered = re.compile(re.escape(name_of(config)) + r"(-\d+)?")
        found = [path for path in RUNS.glob("*") if numbered.fullmatch(path.name) and has_checkpoint(path)
                 and _is_of(path, config)]
        return str(max(found, key=lambda path: max(file.stat().st_mtime for file in checkpoints(path)))) \
            if found else None
    path = Path(config.out if resume is True else resume)
    path = path.parent if path.is_file() else path
    if has_checkpoint(path):
        return str(path)
    if resume is True:
        return None
    if (path / "config.yaml").is_file():  # it was stopped before its first checkpoint
        return str(path)
    raise FileNotFoundError(f"--resume {path}: no last.pt and no config.yaml there; expected the folder of a run")


def checkpoints(path):
    """The files in a run's folder that it may continue from, the newer one first: one may be missing or damaged."""
    return [file for name in ("last.pt", "previous.pt") if (file := Path(path) / name).is_file()]


def has_checkpoint(path):
    return bool(checkpoints(path))


def _is_of(path, config):
    """Whether the run in this folder, of the right name, trains on the data of `config`: photos-2 may be the second run
    on photos, or the first on photos-2, and there are many folders called photos."""
    try:
        saved = read_recipe(path / "config.yaml")
    except (ValueError, OSError):
        return False
    data = [None if folder is None else Path(folder).resolve() for folder in (saved.get("data"), config.data)]
    return data[0] == data[1]


def saved_configuration(folder):
    """{key: value} of a run's config.yaml, or None where it has none."""
    path = Path(folder) / "config.yaml"
    return read_recipe(path) if path.is_file() else None


def go_on(folder, saved, options):
    """(Config, notes) of a run that continues: `saved`, and over it the options that may change.

    saved: {key: value} of the run; keys that are younger than it have their defaults. options: {key: value or text} of
    the command line. Raises ValueError for options that would change what the run computes.
    """
    config = Config()
    for name, value in saved.items():
        setattr(config, name, cast(name, value))
    given = {name: cast(name, value) for name, value in options.items()}
    other = [f"--{name.replace('_', '-')} {to_dict(config)[name]!r} -> {_plain(value)!r}"
             for name, value in given.items() if name not in FREE and value != getattr(config, name)]
    if other:
        raise ValueError(f"--resume: {folder} was started with other values, and would not end as it would have: "
                         f"{', '.join(other)}; leave them out, or start a new run. "
                         f"What may change: {', '.join('--' + name.replace('_', '-') for name in FREE)}")
    for name, value in given.items():
        setattr(config, name, value)
    check(config)
    younger = [f"{name} {to_dict(config)[name]!r}" for name in KEYS if name not in saved]
    notes = [f"configuration: {Path(folder) / 'config.yaml'}"]
    if younger:
        notes.append(f"the run is older than these options, which have their defaults: {', '.join(younger)}")
    return config, notes


def refuse_other(config, saved):
    """Raises ValueError when a run with configuration `saved` (a dict) cannot be continued under `config`.

    A key that is younger than the run gets its default, with which the run was started -> lines that say so.
    """
    notes = []
    for name in KEYS.keys() - saved.keys() - {*FREE}:
        if getattr(config, name) != getattr(Config(), name):
            setattr(config, name, getattr(Config(), name))
            notes.append(f"{name} = {getattr(config, name)!r}, the default: the run is older than this option")
    ours = to_dict(config)
    other = [f"{name}: {saved[name]!r} -> {ours[name]!r}"
             for name in KEYS if name not in FREE and name in saved and ours[name] != saved[name]]
    if other:
        raise ValueError("--resume: the run was started with another configuration, and would not end as it would "
                         "have; start a new run, or give the old values. Different are " + ", ".join(other))
    return sorted(notes)


def refuse_other_classes(saved, found, where):
    """Raises ValueError when the classes of a checkpoint, names in order, are not those `found` in the data.

    where: what to call the data.
    """
    saved, found = list(map(str, saved)), list(map(str, found))
    if saved == found:
        return
    other = [f"class {i} is {a!r} in the checkpoint, {b!r} in the data" for i, (a, b) in enumerate(zip(saved, found))
             if a != b] or [f"the checkpoint has {len(saved)} classes, the data {len(found)}"]
    raise ValueError(f"the classes of {where} are not those of the checkpoint, whose outputs would get other names: "
                     f"{'; '.join(other[:3])}; expected the same names in the same order")


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
