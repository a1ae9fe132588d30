"""What README and docs/ say: every command is understood, every link leads somewhere."""
import json
import re
import shlex

import pytest
import torch

import run
from eval import bench, bench_compiled, bench_input, compare, evaluate, export, predict
from models import create_model, list_models
from photographs import image_folder
from train import loop
from train.config import Config, to_dict
from training import ROOT, TINY

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECONDS = ("info", "plot")  # the commands that are run whole


def commands():
    """(page, words after run.py) of every command in the code of the pages."""
    for page in PAGES:
        for line in re.findall(r"^    ((?:pip|python|torchrun) .*\brun\.py .*)", page.read_text(), re.MULTILINE):
            words = shlex.split(line.rstrip(" &"), comments=True)
            yield page.name, words[words.index("run.py") + 1:]


class Understood(Exception):
    """Raised where a command would begin its work."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the commands name."""
    place = tmp_path_factory.mktemp("docs")
    for name in ("DIR", "photos", "imagenet"):
        image_folder(place / name, {"train": 3, "val": 2}, ("dog", "tabby"))
    (place / "photos" / "tabby").mkdir()
    (place / "IMAGE").write_bytes((place / "photos" / "train" / "dog" / "0.png").read_bytes())
    (place / "photos" / "tabby" / "1.jpg").write_bytes((place / "IMAGE").read_bytes())
    (place / "COCO" / "annotations").mkdir(parents=True)
    (place / "COCO" / "annotations" / "image_info_test-dev2017.json").write_text("{}")
    config = Config(**TINY, attn="elsa", data=str(place / "photos"), num_classes=2)
    checkpoint = {"model": create_model("swin_t", attn="elsa", num_classes=2, patch_size=2, window_size=2,
                                        **TINY["model_args"]).state_dict(),
                  "config": to_dict(config), "classes": ["dog", "tabby"]}
    rows = [dict(kind="step", step=0, epoch=1, loss=2.0, lr=1e-3),
            dict(kind="epoch", epoch=1, train_loss=2.0, top1=50.0)]
    for name in ("swin_t-elsa-photos", "swin_t-elsa-photos-2"):
        (place / "runs" / name).mkdir(parents=True)
        torch.save(checkpoint, place / "runs" / name / "best.pt")
        (place / "runs" / name / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.save(checkpoint, place / "FILE")
    torch.save(checkpoint["model"], place / "published.pth")
    return place


def test_there_are_commands():
    found = [words[0] for _, words in commands()]
    assert len(found) > 30 and {*found} == {*run.COMMANDS}


@pytest.mark.parametrize("page, words", [*commands()], ids=lambda value: value if isinstance(value, str) else value[0])
def test_every_command_is_understood(place, monkeypatch, capsys, page, words):
    """Up to its work; what takes seconds is run."""
    def begins(*_, **__):
        raise Understood
    for module, name in ((loop, "train"), (evaluate, "run"), (predict, "load_model"), (export, "load_model"),
                         (compare, "Comparison"), (bench, "time_all"), (bench, "tune"), (bench_input, "main"),
                         (bench_compiled, "main")):
        monkeypatch.setattr(module, name, begins)
    monkeypatch.setattr(export, "FORMATS", dict.fromkeys(export.FORMATS, ()))  # whichever optional packages are there
    monkeypatch.chdir(place)
    if words[1:2] and words[1] in list_models() and words[0] != "train":  # a file of weights alone, of any model
        words = ["published.pth" if word == "FILE" else word for word in words]
    if words[0] in SECONDS:
        assert run.run(words) in (None, 0) and capsys.readouterr().out
        return
    with pytest.raises(Understood):
        run.run(words)


def test_every_link_leads_somewhere():
    for page in PAGES:
        text = page.read_text()
        for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.name}: {target}"
            headings = [re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
                        for line in re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)] if anchor else [anchor]
            assert anchor in headings, f"{page.name}: {target}#{anchor}"


def test_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 200 and not [line for line in lines if "@@" in line]
    sentences = [sentence for page in PAGES for line in page.read_text().splitlines() if not line.startswith((" ", "|"))
                 for sentence in re.split(r"(?<=[.:;]) ", line) if len(sentence) > 60]
    assert len(sentences) == len({*sentences})
