"""Recipes, options, values and the schedule that follows from them."""
import pytest

from models import create_model
from train.command_line import parse_train
from train.config import Config, cast, read_recipe, resolve
from train.schedule import decay_groups, learning_rate
from training import TINY, tiny, train


@pytest.mark.parametrize("name, lr_free", [("swin_t", 0.1), ("swin_s", 0.3), ("swin_b", 0.5)])
def test_recipes_are_the_published_ones(name, lr_free):
    config, _ = resolve(dict(model=name, data="photos"))
    assert config.drop_path_rate == lr_free and (config.ema > 0) == (name == "swin_b")
    published = dict(epochs=300, batch_size=1024, lr=1e-3, weight_decay=0.05, warmup_epochs=20, warmup_lr=1e-6,
                     min_lr=1e-5, mixup=0.8, cutmix=1.0, erasing=0.25, label_smoothing=0.1, clip_grad=5.0,
                     randaugment=9.0, randaugment_std=0.5)
    assert {name: getattr(config, name) for name in published} == published


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
    config, notes = resolve(dict(model="swin_t", data="photos", epochs=3))
    assert config.warmup_epochs == pytest.approx(0.2) and any("warm-up" in note for note in notes)


def test_learning_rate_at_known_steps():
    config = Config(epochs=10, warmup_epochs=2, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    at = [learning_rate(step, 100, config) for step in range(1000)]
    assert at[0] == 1e-6 and at[100] == pytest.approx((1e-3 + 1e-6) / 2) and at[200] == 1e-3 == max(at)
    assert at[-1] == pytest.approx(1e-5) and at[200 + 400] == pytest.approx((1e-3 + 1e-5) / 2, rel=5e-3)
    assert all(a >= b for a, b in zip(at[200:], at[201:]))
    assert [learning_rate(step, 1, Config(epochs=1, warmup_epochs=0)) for step in range(1)] == [1e-3]


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
