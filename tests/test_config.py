"""Recipes, options, values and the schedule that follows from them."""
import re

import pytest
import yaml

from models import create_model
from run import main
from train.command_line import parse_train
from train.config import PUBLISHED, Config, cast, published, read_recipe, resolve, to_dict
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
                                     dict(decay="all"), dict(epochs=3, warmup_epochs=3)])
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
