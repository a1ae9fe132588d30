"""The real commands, as a user types them, at a small size."""
import errno
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from models import create_model
from photographs import image_folder
from run import COMMANDS, VERSION, main, place_of
from train.classification import Scenes
from train.config import KEYS, resolve, to_dict

ROOT = Path(__file__).parents[1]
TINY = ["--img-size", "16", "--patch-size", "2", "--window-size", "2", "--model-args",
        "{embed_dim: 12, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}", "--epochs", "1", "--warmup-epochs", "0",
        "--batch-size", "8", "--device", "cpu"]

TINY_OPTIONS = dict(zip([word[2:].replace("-", "_") for word in TINY[::2]], TINY[1::2]))
TINY_MODEL = dict(patch_size=2, window_size=2, embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])


def run(folder, *arguments, environment=()):
    environment = {**os.environ, **dict(environment)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "run.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, timeout=120, capture_output=True, text=True)


def succeed(folder, *arguments):
    result = run(folder, *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("data") / "photos", {"train": 4, "test": 4}, ("cat", "dog", "owl"))


def test_train_scenes_eval_and_resume(tmp_path, monkeypatch, capsys):
    out = succeed(tmp_path, "train", "swin_t", "--attn", "elsa", "--limit", "16", "--val-limit", "9", *TINY)
    assert "rendered scenes" in out and "epoch 1/1" in out and "batch_size 8 (recipe: 32)" in out
    assert "weight_decay" not in out, "what is as the recipe has it is in config.yaml"
    folder = tmp_path / "runs" / "swin_t-elsa-scenes"
    assert {path.name for path in folder.iterdir()} == {"last.pt", "previous.pt", "best.pt", "log.jsonl", "curves.png",
                                                        "config.yaml"}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["batch_size"] == 8 and config["num_classes"] == 8
    assert torch.load(folder / "best.pt", weights_only=True)["config"] == config

    out = succeed(tmp_path, "eval", "swin_t", "--weights", folder / "best.pt", "--val-limit", "9")
    assert re.search(r"top-1 \d+\.\d\d  top-5 \d+\.\d\d  9 images  [\d.]+ images/s", out)
    trained = torch.load(folder / "best.pt", weights_only=True)["history"][0]
    assert f"top-1 {trained['top1']:.2f}  top-5 {trained['top5']:.2f}" in out

    command = ["train", "swin_t", "--attn", "elsa", "--limit", "16", "--val-limit", "9", *TINY]
    monkeypatch.chdir(tmp_path)
    assert main([*command, "--resume"]) == 0 and "all 2 steps are made" in capsys.readouterr().out
    assert main(command) == 0
    assert (tmp_path / "runs" / "swin_t-elsa-scenes-2" / "last.pt").exists(), "a second run overwrites nothing"


def test_resume_takes_the_runs_options_and_refuses_other_classes(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "photos"
    shutil.copytree(photos, data)
    command = ["train", "swin_t", "--attn", "elsa", "--data", "photos", "--workers", "0", "--verbose"]
    assert main([*command, *TINY, "--resume"]) == 0
    assert "nothing to resume yet: a new run" in capsys.readouterr().out
    assert main([*command, "--resume", "--val-limit", "6"]) == 0
    out = capsys.readouterr().out
    assert "nothing is left to do" in out and "img_size: 16" in out and "val_limit: 6" in out
    for split in ("train", "test"):
        (data / split / "cat").rename(data / split / "puss")
    assert main(["train", "--resume", "runs/swin_t-elsa-photos"]) == 2
    assert "the classes of photos are not those of the checkpoint" in (stderr := capsys.readouterr().err)
    assert "class 0 is 'cat' in the checkpoint, 'dog' in the data; class 1 is 'dog'" in stderr
    (data / "train" / "ant").mkdir()
    (data / "test" / "ant").mkdir()
    for split in ("train", "test"):
        shutil.copy(data / split / "owl" / "0.png", data / split / "ant" / "0.png")
    weights = ["--weights", "runs/swin_t-elsa-photos/best.pt", "--out", "tuned"]
    assert main([*command, *TINY, *weights]) == 0
    out = capsys.readouterr().out
    assert "all of it fits but the classifier, which is not for the 4 classes of this run; a fresh one takes" in out
    assert "recipe finetune_classification" in out and "class ant has 1 photograph, too few" in out


def test_json_is_all_that_stdout_gets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = resolve({"model": "swin_t", "device": "cpu", **TINY_OPTIONS})[0]
    torch.save({"model": create_model("swin_t", num_classes=8, **TINY_MODEL).state_dict(), "config": to_dict(config),
                "classes": list(Scenes.classes)}, "best.pt")
    assert main(["eval", "--weights", ".", "--val-limit", "9", "--device", "cpu", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["images"] == 9 and found["model"] == "swin_t" and found["weights"] == "best.pt" and "top1" in found
    assert "9 images of held-out rendered scenes" in printed.err and "top-5" in printed.err
    assert main(["info", "swin_t", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 28288354 and found["layers"][0]["layer"] == "patch_embed"
    assert main(["info", "swin_t", "--recipe", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["lr"] and found["published"]["lr"]


def test_train_photos_with_the_paper_recipe_and_what_is_typed_next(tmp_path, photos, monkeypatch, capsys):
    given = ["--attn", "elsa", "--data", photos, "--workers", "1"]
    out = succeed(tmp_path, "train", "swin_t", *given, *TINY, "--recipe", "swin_t", "--out", "mine", "--verbose")
    assert "recipe swin_t" in out and "randaugment: 9.0" in out
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  python ")]
    assert [command[2] for command in commands] == ["eval", "predict"]
    monkeypatch.chdir(tmp_path)
    assert main([*commands[0][2:], "--workers", "1"]) == main(commands[1][2:]) == 0
    out = capsys.readouterr().out
    assert "12 images" in out and "3 classes" in out and "12/12" in out


@pytest.mark.parametrize("arguments, message", [
    (["train", "swin_tt"], "did you mean 'swin_t'"),
    (["train", "swin_t", "--attn", "elza"], "did you mean 'elsa'"),
    (["train", "swin_t", "--btach-size", "8"], "did you mean --batch-size"),
    (["train", "swin_t", "--epochs"], "expected one argument"),
    (["train", "swin_t", "8"], "'8' is not the value of any option"),
    (["train", "swin_t", "--lr", "fast"], "lr = 'fast'"),
    (["train", "swin_t", "--data", "absent"], "absent: no such folder"),
    (["train", "swin_t", "--model-args", "{embed_dmi: 12}"], "did you mean 'embed_dim'"),
    (["eval", "swin_t", "--weights", "absent.pt"], "no checkpoint at absent.pt"),
    (["tarin"], "did you mean train"),
])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2  # in this process: starting one takes longer than the command
    stderr = capsys.readouterr().err
    assert message in stderr.replace("Did", "did") and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_corrupt_photo_is_named_by_a_worker(tmp_path, photos):
    bad = tmp_path / "photos"
    for path in photos.rglob("*.*"):
        copy = bad / path.relative_to(photos)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(b"not an image" if path.match("test/cat/0.png") else path.read_bytes())
    result = run(tmp_path, "train", "swin_t", "--data", bad, *TINY, "--batch-size", "12", "--workers", "1")
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and re.match(r"error: \S+/test/cat/0.png cannot be read as an image", last)
    assert "Traceback" not in result.stderr


def test_unknown_option_fails_at_once(tmp_path):
    result = run(tmp_path, "train", "swin_t", "--epohcs", "3")
    assert result.returncode == 2
    assert result.stderr == "error: unknown option --epohcs; did you mean --epochs? --help lists all\n"


def test_the_first_screen_and_the_examples(capsys):
    assert main([]) == 0
    screen = capsys.readouterr().out.splitlines()
    assert len(screen) <= 24 and max(map(len, screen)) <= 100
    text = "\n".join(screen)
    assert all(name in text for name in COMMANDS) and "volo_d1" in text and "run.py train swin_t --attn elsa" in text
    assert main(["--help"]) == main(["help"]) == 0
    examples = capsys.readouterr().out
    assert examples.count("python run.py train swin_t --attn elsa ") == 6
    assert all(f"run.py {name} " in examples or name == "bench" for name in COMMANDS)


def test_version_names_what_results_depend_on(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith(f"elsa {VERSION}, torch {torch.__version__.split('+')[0]}")


def options_in(capsys, *arguments):
    """{option: what stands behind it} of a page of help."""
    assert main(["train", *arguments, "--help"]) == 0
    return dict(re.findall(r"^  --(\S+) (\S+)", capsys.readouterr().out, re.MULTILINE))


def test_help_shows_the_options_of_the_models_task_with_their_values(capsys):
    everything = {name.replace("_", "-") for name in KEYS} - {"model"} | {"recipe", "resume"}
    common, swin = options_in(capsys), options_in(capsys, "swin_t", "--data", "photos")
    volo = options_in(capsys, "volo_d1")
    dense = [options_in(capsys, name) for name in ("upernet_swin_t", "mask_rcnn_swin_t")]
    assert common.keys() < swin.keys() < volo.keys() < everything
    assert common.keys() | volo.keys() | dense[0].keys() | dense[1].keys() == everything
    assert "mixup" in swin and "mix-token" not in swin and "mix-token" in volo
    assert all("mixup" not in page and "resize" in page for page in dense) and "crop" not in dense[0]
    assert swin["epochs"] == "300" and common["epochs"] == "5" and swin["randaugment"] == "9.0"
    assert options_in(capsys, "swin_t", "--epochs", "7", "--warmup-epochs=1")["epochs"] == "7"


def test_help_names_the_tasks_and_fits_a_page(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main(["train", "--help"])
    common = capsys.readouterr().out
    assert "run.py train MODEL --help" in common and "upernet" in common and "detection" in common
    main(["train", "swin_t", "--help"])
    page = capsys.readouterr().out
    assert len(page.splitlines()) <= 78 and "recipe scenes_swin" in page and "Schedule and optimiser:" in page


def test_an_option_of_another_task_is_said_to_do_nothing():
    notes = resolve({"model": "mask_rcnn_swin_t", "mixup": 0.8})[1]
    assert "mixup has no effect on mask_rcnn_swin_t: it is for classification" in notes


# Errors that nobody foresaw

@pytest.mark.parametrize("error, status, said", [
    (KeyError("width"), 1, "unexpected KeyError in tests/test_cli.py, line "), (IndexError("x"), 1, "unexpected Index"),
    (RuntimeError("shapes\n  differ"), 1, "line "), (TypeError(), 1, "unexpected TypeError in tests/test_cli.py"),
    (ValueError("a.json: no width"), 2, "error: a.json: no width\n"),
    (MemoryError(), 2, "error: no memory is left. A smaller --batch-size"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "A smaller --batch-size"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"), 2, "CUDA out of memory. Tried. A smaller --batch-size"),
    (ModuleNotFoundError("No module named 'triton'"), 2, "'triton'; `pip install -r requirements.txt`"),
    (KeyError("Caught KeyError in DataLoader worker process 0.\nOriginal Traceback\n  File\nKeyError: 'w'"), 1,
     "unexpected KeyError"),
    (ValueError("Caught ValueError in DataLoader worker process 0.\nTraceback\nValueError: a.png is damaged"), 2,
     "error: a.png is damaged\n")])
def test_errors_are_one_line_and_what_is_not_foreseen_says_so(monkeypatch, capsys, error, status, said):
    def fail(argv):
        raise error

    monkeypatch.setitem(COMMANDS, "info", fail)
    assert main(["info"]) == status
    printed = capsys.readouterr().err
    assert said in printed and printed.count("\n") == 1 and printed.startswith("error: ")
    assert ("ELSA_TRACEBACK=1" in printed) == (status == 1)
    monkeypatch.setenv("ELSA_TRACEBACK", "1")
    with pytest.raises(type(error)):
        main(["info"])


def test_errors_are_said_to_be_in_the_projects_own_files():
    try:  # of a library in a virtual environment inside the project's folder
        exec(compile("1 / 0", ROOT / "venv" / "site-packages" / "x.py", "exec"))
    except ZeroDivisionError as error:
        assert place_of(error).startswith(" in tests/test_cli.py, line ")


@pytest.mark.parametrize("arguments", ["{embed_dim: abc}", "{depths: 3}", "{embed_dim: -4}", "{1: 2}"])
def test_overrides_that_make_no_model_are_said(capsys, arguments):
    assert main(["info", "swin_t", "--model-args", arguments]) == 2
    error = capsys.readouterr().err
    assert "swin_t cannot be made with {" in error or "unknown override of swin_t: '1'" in error


# Names that a terminal or a locale cannot write

@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_a_terminal_cannot_show_ends_nothing(monkeypatch, encoding):
    written = io.BytesIO()
    terminal = io.TextIOWrapper(written, encoding)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", terminal)
        patch.setitem(COMMANDS, "info", lambda argv: print("Kätze 犬 \udce9"))
        assert main(["info"]) == 0
    assert written.getvalue().decode(encoding).rstrip() == {
        "ascii": "K\\xe4tze \\u72ac \\udce9", "cp1252": "Kätze \\u72ac \\udce9"}[encoding]


def test_accents_in_names_and_a_locale_without_them(tmp_path, photos, monkeypatch, capsys):
    """Trained in the one, evaluated in the other."""
    shutil.copytree(photos, tmp_path / "é$^$")
    for folder in tmp_path.glob("é$^$/*/cat"):
        folder.rename(folder.with_name("Kätzchen"))
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    result = run(tmp_path, "train", "swin_t", "--data", "é$^$", *TINY, "--workers", "0", environment=plain)
    assert result.returncode == 0, result.stderr
    last = tmp_path / "runs" / "swin_t-é$^$" / "last.pt"
    assert "UserWarning" not in result.stderr and (last.parent / "curves.png").exists()
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "--weights", str(last), "--workers", "0"]) == 0
    assert "12 images of é$^$" in capsys.readouterr().out


# The environment's errors

def test_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    def fill(state, file):  # as torch.save fails: what the disk said is behind an error of its own
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 167040 vs 166928")
    monkeypatch.setattr(torch, "save", fill)
    folder = tmp_path / "run"
    assert main(["train", "swin_t", "--limit", "8", "--val-limit", "4", *TINY, "--out", str(folder)]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {folder / 'last.pt'}: No space left on device"
    assert sorted(os.listdir(folder)) == ["config.yaml", "log.jsonl"]


@pytest.mark.parametrize("arguments, message", [
    (["train", "swin_t", "--out", "file/run"], "file/run: Not a directory"),
    (["train", "swin_t", "--recipe", "folder"], "folder: Is a directory"),
    (["train", "swin_t", "--recipe", "here/config.yaml", "--out", "here"], "would write over here/config.yaml"),
    (["train", "swin_t", "--data", "photos", "--out", "photos", "--epochs", "1", *TINY], "is the folder of --data"),
    (["train", "swin_t", "--data", "photos", "--out", "photos/train/new", *TINY], "would write over photos/train"),
    (["train", "--data", "photos/train", "--out", "photos/train/new", *TINY, "--batch-size", "4"], "over photos/train"),
    (["train", "swin_t", *TINY, "--weights", "here/best.pt", "--out", "here", "--limit", "8"], "would write over here"),
    (["compare", "swin_t", "--data", "photos", "--out", "photos/val/cat", "--set", "num_classes=2"], "over photos/val"),
    (["train", "swin_t", "--seed", "1e99"], "seed = "),
    (["train", "swin_t", "--seed=-1"], "seed = -1 does not fit; expected 0 to 2**63 - 1"),
    (["train", "swin_t", "--seed", "-1"], "seed = -1 does not fit; expected 0 to 2**63 - 1"),
    (["train", "swin_t", "--lr", "-1e-3"], "lr = -0.001 does not fit; expected 0 or more"),
    (["train", "swin_t", "--resume", "absent"], "--resume absent: no last.pt"),
    (["train", "swin_t", "--epochs", "1e99"], "expected less than 2**31"),
    (["train", "swin_t", "--lr", "inf"], "lr = inf does not fit; expected finite numbers"),
])
def test_places_and_numbers_that_do_not_fit_are_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("folder").mkdir()
    image_folder(tmp_path / "photos", {"train": 4, "val": 1})
    Path("here").mkdir()
    Path("here/config.yaml").write_text("{epochs: 30}")
    if "here/best.pt" in arguments:
        torch.save(create_model("swin_t", num_classes=8, img_size=16, **TINY_MODEL).state_dict(), "here/best.pt")
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert message in stderr and stderr.startswith("error: ") and stderr.count("\n") == 1


def test_large_seeds_keep_their_digits():
    assert resolve({"model": "swin_t", "seed": str(2 ** 62 + 1)})[0].seed == 2 ** 62 + 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux")
@pytest.mark.parametrize("redirection, status, stderr", [
    ("| head -1 >/dev/null; exit ${PIPESTATUS[0]}", 0, ""),
    (">/dev/full", 2, "error: the output cannot be written: No space left on device\n")])
def test_output_that_nobody_takes(redirection, status, stderr):
    command = f"{sys.executable} {ROOT / 'run.py'} train swin_t --help {redirection}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (status, stderr)
