"""Weights by name: the files that authors published for our models, the table published.yaml, fetched into torch's
cache."""
import contextlib
import http.client
import os
import sys
import tempfile
from pathlib import Path

import torch
import yaml

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TABLE = Path(__file__).with_suffix(".yaml")
NAME = "published"


def is_name(source):
    """Whether `source` of weights is "published", "published:FILE" or "published:MODEL", not a file of the user's."""
    return isinstance(source, str) and source.partition(":")[0] == NAME


def files():
    """[{"model", "attn", "source", "resolution", "score", "options", "file", "address" or "page", perhaps "sha256"}].

    Of the table, in its order; it says what they are.
    """
    entries = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["files"]
    return [{"options": {}, "file": entry.get("address", "").rpartition("/")[2], **entry} for entry in entries]


def choose(source, name, attn, img_size, window_size):
    """The entry of files() that `source` names for a model; img_size and window_size: as create_model was given them.

    Raises ValueError where there is none.
    """
    word, entries = source.partition(":")[2], files()
    fitting = [entry for entry in entries if entry["file"] == word] or \
        [entry for entry in entries if (entry["model"], entry["attn"]) == (word or name, attn)]
    if not fitting:
        others = {entry["attn"] for entry in entries if entry["model"] == (word or name)}
        raise ValueError(f"no weights are published for {word or name} with attn {attn}"
                         + "".join(f", but with attn {other}" for other in sorted(others))
                         + "; `run.py info --published` prints what there is")
    for entry in fitting:
        if (entry["options"].get("img_size", 224), entry["options"].get("window_size")) == (img_size, window_size):
            return entry
    return fitting[0]


def place(entry):
    """Where the file of an entry lies, or is to lie: in torch's cache."""
    return Path(torch.hub.get_dir(), "checkpoints", entry["file"])


def fetch(source, created, check):
    """Path of the file that `source` names, which is downloaded where it is not there yet.

    created: what create_model noted of the model. check(path): raises ValueError for a file that is damaged. Processes
    that want the same file take turns: one downloads, the others find it.

    Raises ValueError where nothing is published, FileNotFoundError where that has no address, and ConnectionError where
    the address does not answer, or what comes is damaged or of another checksum: each but the first with where the file
    is to be put by hand. Nothing half is kept.
    """
    entry = choose(source, *created)
    path = place(entry)
    by_hand = f"fetch it by hand and put it at {path}"
    if path.exists():
        return path
    if "address" not in entry:
        raise FileNotFoundError(f"the published weights of {entry['model']} with attn {entry['attn']} lie at "
                                f"{entry['page']} , which gives files to browsers alone; {by_hand}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with one_after_the_other(path.parent):
        if path.exists():
            return path
        address = entry["address"]
        print(f"downloading {address} to {path}", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder, path.name)
            try:
                torch.hub.download_url_to_file(address, str(whole), entry.get("sha256"), sys.stderr.isatty())
                check(whole)
            except RuntimeError as error:  # of torch.hub
                raise ConnectionError(f"what {address} gave is not the published file: {error}. Nothing was kept; try "
                                      f"again, or {by_hand}") from error
            except ValueError as error:
                reason = str(error).replace(str(whole), address)
                raise ConnectionError(f"{reason} Nothing was kept; {by_hand}") from error
            except (OSError, http.client.HTTPException) as error:
                raise ConnectionError(f"{address} could not be fetched ({' '.join(str(error).split())}); "
                                      f"{by_hand}") from error
            os.replace(whole, path)
    return path


@contextlib.contextmanager
def one_after_the_other(folder):
    """Processes of a machine that enter for the same folder wait for each other.

    Where the system or its disk has no locks they do not, and each downloads a file of its own: the last one stays.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def table():
    """The files as text, one a line."""
    entries = files()
    sources = yaml.safe_load(TABLE.read_text(encoding="utf-8"))["sources"]
    rows = [("model", "attn", "images", "published", "file", "eval needs")]
    for entry in entries:
        score = ", ".join(f"{metric} {value}" for metric, value in entry["score"].items())
        needs = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in entry["options"].items())
        rows.append((entry["model"], entry["attn"], str(entry["resolution"]), score, entry["file"], needs))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows]
    places = [f"  {entry['file']}: {entry.get('address') or entry['page'] + ' (in a browser)'}"
              + (f", sha256 {entry['sha256']}" if "sha256" in entry else "") for entry in entries]
    return "\n".join([
        *lines, "", "`--weights published` takes the first file of a model and its attention, or that of the model's "
        f"img_size and window_size;\n`--weights published:FILE` takes another. They lie in {place({'file': ''})}, from",
        *places, "", "Sources: " + ", ".join(sources.values())])
