"""Recipes, options, values and the schedule that follows from them."""
import re

import numpy as np
import pytest
import yaml

from models import create_model
from run import main
from train.command_line import parse_train
from train.config import (
    PUBLISHED,
    RECIPES,
    Config,
    cast,
    check,
    published,
    read_recipe,
    resolve,
    to_dict,
)
from train.runs import refuse_other, refuse_other_classes
from train.schedule import decay_groups
from training import TINY, tiny, train


@pytest.mark.parametrize("name, lr_free", [("swin_t", 0.1), ("swin_s", 0.3), ("swin_b", 0.5)])
def test_recipes_are_the_published_ones(name, lr_free):
    config, _ = resolve(dict(model=name, attn="elsa", data="photos"))
    assert config.drop_path_rate == lr_free and (config.ema > 0) == (name == "swin_b")
    values = dict(epochs=310, cooldown_epochs=10, batch_size=1024, lr=1e-3, weight_decay=0.05, warmup_epochs=20,
                  warmup_lr=1e-6, min_lr=1e-5, mixup=0.8, cutmix=1.0, erasing=0.25, label_smoothing=0.1, clip_grad=5.0,
                  randaugment=9.0, randaugment_std=0.5)
    assert {name: getattr(config, name) for name in values} == values


def test_options_override_the_recipe(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 5\nlr: 2e-3\nwarmup_epochs: 1\n")
    config, resume, _ = parse_train(["swin_s", "--recipe", str(recipe), "--batch_size", "64", "--epochs", "7",
                                     "--compile", "--resume", "--model-args", "{embed_dim: 12}"])
    assert (config.model, config.epochs, config.lr, config.batch_size) == ("swin_s", 7, 2e-3, 64)
    assert config.model_args == {"embed_dim": 12} and config.compile is True and resume is True


def test_unknown_names_suggest_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="--epohcs; did you mean --epochs"):
        parse_train(["swin_t", "--epohcs", "3"])
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("weigth_decay: 0.1\n")
    with pytest.raises(ValueError, match="'weigth_decay'.*did you mean weight_decay"):
        read_recipe(recipe)
    with pytest.raises(ValueError, match="(?i)did you mean 'swin_t'"):
        train(tiny(model="swin_tt"))


@pytest.mark.parametrize("option, value", [("epochs", "many"), ("epochs", "2.5"), ("lr", "fast"),
                                           ("compile", "perhaps"), ("betas", "0.9"), ("model_args", "[1]"),
                                           ("img_size", [1])])
def test_values_of_the_wrong_type_are_named(option, value):
    with pytest.raises(ValueError, match=f"{option} = .*expected"):
        cast(option, value)


@pytest.mark.parametrize("options", [dict(epochs=0), dict(scale=(0.5, 0.2)), dict(amp="fp8"), dict(ema=1.0),
                                     dict(decay="all"), dict(epochs=3, warmup_epochs=3), dict(seed=2 ** 63)])
def test_values_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{list(options)[-1]} = "):
        resolve(options)


def test_short_runs_keep_the_share_of_warm_up():
    config, notes = resolve(dict(model="swin_t", attn="elsa", data="photos", epochs=3))
    assert config.warmup_epochs == pytest.approx(3 * 20 / 310) and any("warm-up" in note for note in notes)
    assert config.cooldown_epochs == pytest.approx(3 * 10 / 310) and config.lr_per == "step"
    config, notes = resolve(dict(model="swin_t", attn="elsa", data="photos", epochs=100))
    assert (config.warmup_epochs, config.cooldown_epochs, config.lr_per) == (20, 10, "epoch")
    with pytest.raises(ValueError, match="cooldown_epochs = 3 leaves none of the 3 epochs"):
        resolve(dict(model="swin_t", data="photos", epochs=3, cooldown_epochs=3))


def test_plain_swin_has_a_recipe_of_its_own():
    for attn in (None, "window", "elsa", "dwconv"):
        config, notes = resolve(dict(model="swin_s", data="photos", **({"attn": attn} if attn else {})))
        plain = attn in (None, "window")
        assert (config.crop_pct, config.epochs, config.lr_late) == ((0.875, 300, True) if plain else (0.9, 310, False))
        assert notes[0].startswith("recipe swin_s_window:" if plain else "recipe swin_s:")
    assert resolve(dict(model="swin_s"))[1][0].startswith("recipe scenes_swin:")


def groups_of(config):
    """(names of the parameters that decay, of those that do not) in a tiny model of a Config"""
    arguments = {name: value for name, value in TINY["model_args"].items() if not config.model.startswith("volo")}
    model = create_model(config.model, attn=config.attn, **arguments)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = decay_groups(model, config)
    assert [group["weight_decay"] for group in groups] == [config.weight_decay, 0]
    decayed, spared = ({names[id(parameter)] for parameter in group["params"]} for group in groups)
    assert decayed | spared == set(names.values()) and not decayed & spared
    return decayed, spared


@pytest.mark.parametrize("attn", ["elsa", "window"])
@pytest.mark.parametrize("model", ["swin_t", "upernet_swin_t", "mask_rcnn_swin_t"])
def test_decay_spares_norms_biases_and_position_biases(model, attn):
    decayed, spared = groups_of(Config(model=model, attn=attn))
    assert all("norm" not in name and not name.endswith(("bias", "bias_table")) for name in decayed)
    assert all("norm" in name or "bn" in name or name.endswith(("bias", "bias_table")) for name in spared)
    assert any("ghost_head" in name for name in decayed) == (attn == "elsa")


def test_recipes_beside_the_published_values(capsys):
    assert main(["info", "swin_t", "--attn", "elsa", "--recipe"]) == 0
    printed = capsys.readouterr().out
    assert "damo-cv/ELSA" in printed and re.search(r"^epochs +310 +310$", printed, re.MULTILINE)
    assert re.findall(r"^(\w+) .* differs$", printed, re.MULTILINE) == ["amp"]
    assert main(["info", "volo_d5", "--recipe"]) == 0 and "nothing by this name" in capsys.readouterr().out


def test_published_recipes_differ_where_docs_say_so():
    for name in yaml.safe_load(PUBLISHED.read_text()):
        model = re.sub("_(3x|384|448|window)$", "", name)
        config = to_dict(resolve({"model": model, "data": "photos"}, name)[0])
        source, values = published(name)
        differing = {key for key, value in values.items() if cast(key, value) != cast(key, config[key])}
        assert source and differing <= {"amp", "published_label_crop"}, name


@pytest.mark.parametrize("model, attn, differ", [
    ("swin_t", "elsa", "bias_table"), ("swin_t", "window", None), ("swin_t", "neighborhood", None),
    ("swin_t", None, None), ("volo_d1", "outlook", None)])
def test_published_decay_of_classifiers_has_the_tables_beside_elsa(model, attn, differ):
    ours, published = (groups_of(Config(model=model, attn=attn, decay=decay))[0] for decay in ("weights", "published"))
    more = published - ours
    assert ours <= published and (len(more) == 1 and differ in next(iter(more)) if differ else not more)


@pytest.mark.parametrize("attn", ["elsa", "window"])
@pytest.mark.parametrize("model", ["upernet_swin_t", "cascade_mask_rcnn_swin_t"])
def test_published_decay_of_dense_models_goes_by_names(model, attn):
    decayed, spared = groups_of(Config(model=model, attn=attn, decay="published"))
    tables = {name for name in decayed | spared if name.endswith("bias_table")}
    assert spared == {name for name in decayed | spared if "norm" in name} | (tables if attn == "window" else set())
    assert any(name.endswith(".bn.weight") for name in decayed) and any(name.endswith("fc1.bias") for name in decayed)


def test_recipes_of_photographs_decay_as_published():
    for model in ("swin_b", "volo_d5", "upernet_swin_s", "mask_rcnn_swin_s", "cascade_mask_rcnn_swin_b"):
        assert resolve(dict(model=model, data="photos"))[0].decay == "published"
        assert resolve(dict(model=model))[0].decay == "weights"


# Going on with a run: its own configuration

def saved(folder, **changes):
    """config.yaml and an empty checkpoint of a run as recipe and options made it, without the keys that are None."""
    options = {"model": "swin_t", "attn": "elsa", "epochs": 7, "lr": 2e-3, "model_args": {"embed_dim": 12}}
    values = {**to_dict(resolve(options)[0]), "num_classes": 8, **changes}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({k: v for k, v in values.items() if v != "absent"}))
    (folder / "last.pt").touch()


@pytest.mark.parametrize("arguments", [["--resume", "runs/swin_t-elsa-scenes"],
                                       ["swin_t", "--attn", "elsa", "--resume"],
                                       ["--resume", "runs/swin_t-elsa-scenes/last.pt", "--epochs=7", "--lr=0.002"],
                                       ["--attn", "elsa", "--out", "runs/swin_t-elsa-scenes", "--resume"]])
def test_a_resumed_run_has_its_own_configuration(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "runs" / "swin_t-elsa-scenes")
    config, resume, notes = parse_train([*arguments, "--workers", "3", "--device", "cpu"])
    assert (config.epochs, config.lr, config.attn, config.model_args) == (7, 2e-3, "elsa", {"embed_dim": 12})
    assert (config.workers, config.device, config.num_classes) == (3, "cpu", 8) and config.betas == (0.9, 0.98)
    assert resume == "runs/swin_t-elsa-scenes" and notes == ["configuration: runs/swin_t-elsa-scenes/config.yaml"]


def test_what_would_change_a_resumed_run_is_refused_by_name(tmp_path):
    saved(tmp_path / "run")
    message = r"--lr 0.002 -> 0.001, --betas \[0.9, 0.98\] -> \[0.9, 0.99\]; leave them out"
    with pytest.raises(ValueError, match=message) as error:
        parse_train(["--resume", str(tmp_path / "run"), "--lr", "1e-3", "--betas", "0.9,0.99", "--workers", "2"])
    assert "workers" not in str(error.value).split("What may change")[0] and "--val-limit" in str(error.value)
    with pytest.raises(ValueError, match="--model 'swin_t' -> 'swin_s'"):
        parse_train(["swin_s", "--resume", str(tmp_path / "run")])


def test_a_run_that_is_older_than_an_option_goes_on_with_its_default(tmp_path):
    saved(tmp_path / "run", select="absent", lr_per="absent")
    config, _, notes = parse_train(["--resume", str(tmp_path / "run")])
    assert (config.select, config.lr_per) == ("best", "step")
    assert "older than these options, which have their defaults: lr_per 'step', select 'best'" in notes[1]
    with pytest.raises(ValueError, match="--select 'best' -> 'last'"):
        parse_train(["--resume", str(tmp_path / "run"), "--select", "last"])


def test_a_checkpoint_that_is_older_than_an_option_goes_on_with_its_default():
    saved = to_dict(Config())
    for name in ("select", "workers", "save_minutes"):
        del saved[name]
    config = Config(select="last", workers=3, save_minutes=1.0)
    assert refuse_other(config, saved) == ["select = 'best', the default: the run is older than this option"]
    assert (config.select, config.workers, config.save_minutes) == ("best", 3, 1.0)


def test_a_recipe_given_beside_resume_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "runs" / "swin_t-elsa-scenes")
    config, resume, _ = parse_train(["--attn", "elsa", "--recipe", "scenes_swin", "--resume"])
    assert config.epochs == 5 and resume == "runs/swin_t-elsa-scenes"  # state.load compares it with the checkpoint


def test_nothing_to_resume_yet_is_a_new_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, resume, notes = parse_train(["swin_t", "--resume", "--epochs", "3"])
    assert config.epochs == 3 and resume is True and notes[0].startswith("recipe scenes_swin")
    with pytest.raises(FileNotFoundError, match="--resume runs/absent: no last.pt"):
        parse_train(["swin_t", "--resume", "runs/absent"])


def test_a_damaged_or_younger_configuration_is_named(tmp_path):
    saved(tmp_path / "run", unheard_of=3)
    with pytest.raises(ValueError, match="unknown key 'unheard_of' in .*config.yaml"):
        parse_train(["--resume", str(tmp_path / "run")])
    (tmp_path / "run" / "config.yaml").write_text("epochs: [1")
    with pytest.raises(ValueError, match="config.yaml is not valid YAML"):
        parse_train(["--resume", str(tmp_path / "run")])
    saved(tmp_path / "edited", lr=-1.0)
    with pytest.raises(ValueError, match="lr = -1.0 does not fit"):
        parse_train(["--resume", str(tmp_path / "edited")])


def test_classes_of_a_checkpoint_are_compared_in_order():
    refuse_other_classes(["cat", 1], ("cat", "1"), "photos")
    for found, message in ((["ant", "cat", "dog"], "class 0 is 'cat' in the checkpoint, 'ant' in the data; class 1"),
                           (["dog", "cat"], "class 0 is 'cat' in the checkpoint, 'dog' in the data"),
                           (["cat"], "the checkpoint has 2 classes, the data 1"),
                           (["cat", "Dog"], "class 1 is 'dog' in the checkpoint, 'Dog' in the data; expected")):
        with pytest.raises(ValueError, match=f"the classes of photos .*{re.escape(message)}"):
            refuse_other_classes(["cat", "dog"], found, "photos")


# Files from strangers

def mutated(text, rng):
    """A recipe with a few bytes, lines or values changed, doubled or cut."""
    data = bytearray(text.encode())
    for _ in range(rng.integers(1, 4)):
        at, kind = int(rng.integers(len(data) + 1)), rng.integers(5)
        if kind == 0:
            data[at:at + 1] = bytes([rng.integers(256)])
        elif kind == 1:
            del data[at:at + int(rng.integers(1, 20))]
        elif kind == 2:
            data[at:at] = data[:int(rng.integers(1, 40))]
        elif kind == 3:
            data[at:at] = rng.choice([b": ", b"- ", b"{", b"[", b"&a ", b"*a", b"!!python/object:os.system ", b"!!int ",
                                      b"\t", b"1e999", b"null", b"~", b".nan", b"-1", b"? ", b"<<: ", b"'", b"\0",
                                      b"!!set ", b"2026-01-01", b"\xef\xbb\xbf", b"base: scenes_swin\n", b"0x10"])
        else:
            del data[at:]
    return bytes(data)


@pytest.mark.parametrize("count", [100, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_recipes_are_read_or_refused(tmp_path, count):
    rng, texts = np.random.default_rng(count), [path.read_text() for path in sorted(RECIPES.glob("*.yaml"))]
    outcomes = []
    for path in RECIPES.glob("*.yaml"):  # `base` is looked for beside a recipe
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for _ in range(count):
        (tmp_path / "mine.yaml").write_bytes(mutated(texts[rng.integers(len(texts))], rng))
        try:
            config, _ = resolve({"model": "swin_t"}, str(tmp_path / "mine.yaml"))
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and len(str(error)) < 2000
            outcomes.append(False)
        else:
            check(config)
            assert all(cast(name, value) == getattr(config, name) for name, value in to_dict(config).items())
            outcomes.append(True)
    assert 0.05 < sum(outcomes) / count < 0.95


@pytest.mark.parametrize("text, message", [
    ("base: mine\n", "base = 'mine' does not fit; expected the name of another recipe beside"),
    ("base: [1]\n", "base = .* expected the name of another recipe beside"),
    ("base: ../secret\n", "base = .* expected the name of another recipe beside"),
    ("epochs: !!python/object/apply:os.system [touch x]\n", "not valid YAML"),
    ("epochs: 2026-13-45\n", "not valid YAML"),
    ("epochs: &a [*a]\n", "has aliases"),
    ("- 1\n", "holds list; expected a mapping"),
    ("", "holds NoneType; expected a mapping"),
    ("{{}: 1}\n", "not valid YAML"),
    ("[1, 2]: 3\n", "not valid YAML"),
    ("1: 3\n", "unknown key 1"),
    ("model_args: [[1], [2]]\n", "model_args = "),
    ("epochs: 1\0\n", "not valid YAML"),
    ("[" * 50_000, "brackets in brackets"),
    ("model_args: " + "[" * 20 + "]" * 20, "brackets in brackets"),
    ("model_args: " + "[" * 19 + "]" * 19, "model_args = "),
    ("epochs: 1\nepochs: 2\n", "epochs stands twice"),
])
def test_recipes_of_strangers(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        resolve({"model": "swin_t"}, str(path))
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_recipes_are_utf_8_with_or_without_a_mark(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes("\ufeffepochs: 3\ndata: Bäume\n".encode())
    assert read_recipe(path) == {"epochs": 3, "data": "Bäume"}
    path.write_bytes("data: Bäume\n".encode("latin-1"))
    with pytest.raises(ValueError, match="mine.yaml is not UTF-8"):
        read_recipe(path)
