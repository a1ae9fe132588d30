"""Which recipe the photographs of --data get where none is named."""
import re

import pytest

from photographs import ade_folder, coco_folder, image_folder
from train import small_data
from train.command_line import parse_train
from train.config import RECIPES, check, read_recipe
from train.config import resolve as resolve_alone
from train.runs import saved_configuration
from train.small_data import MAX_EPOCHS, STEPS, fit, resolve


@pytest.fixture
def photos(tmp_path):
    return str(image_folder(tmp_path / "photos", {"train": 6, "val": 2}))


def test_few_photographs_have_a_recipe_of_their_own(photos):
    config, notes = resolve(dict(model="swin_t", attn="elsa", data=photos))
    assert notes[0].startswith("recipe small_swin: ")
    assert notes[1] == ("12 training photographs, fewer than 100,000: this recipe starts from nothing, as there are no "
                        "--weights; --recipe swin_t takes the published one")
    assert (config.img_size, config.batch_size, config.epochs) == (64, 8, MAX_EPOCHS) and len(notes) == 2
    tuned, notes = resolve(dict(model="swin_t", data=photos, weights="published"))
    assert notes[0].startswith("recipe finetune_classification: ") and "fine-tunes the weights" in notes[1]
    assert notes[1].endswith("--recipe swin_t_window takes the published one")
    assert tuned.lr < config.lr and (tuned.img_size, tuned.mixup) == (224, 0)


def test_options_and_recipes_of_the_user_count(photos):
    config, notes = resolve(dict(model="swin_t", data=photos, batch_size="4", epochs="40", lr="3e-3"))
    assert (config.batch_size, config.epochs, config.lr) == (4, 40, 3e-3)
    assert notes[2] == "given: batch_size 4 (recipe: 32), epochs 40 (recipe: 100), lr 0.003 (recipe: 0.0005)"
    assert resolve(dict(model="swin_t", data=photos, limit="8", batch_size="1"))[0].epochs == MAX_EPOCHS
    assert len(resolve(dict(model="swin_t", data=photos, flip="0.5"))[1]) == 2  # as the recipe has it
    for recipe in ("swin_t", str(RECIPES / "swin_t.yaml")):
        assert resolve(dict(model="swin_t", data=photos), recipe) == resolve_alone(
            dict(model="swin_t", data=photos), recipe)
    assert resolve(dict(model="swin_t", data=photos), "swin_t")[0].epochs == 310


def test_many_photographs_are_trained_on_as_published(photos, monkeypatch):
    monkeypatch.setitem(small_data.LARGE, "classification", 12)
    assert resolve(dict(model="swin_s", data=photos))[1][0].startswith("recipe swin_s_window: ")
    assert resolve(dict(model="swin_s", data=photos, limit=11))[1][0].startswith("recipe small_swin: ")
    for task, published in (("segmentation", 20_210), ("detection", 118_287)):
        assert small_data.LARGE[task] < published


@pytest.mark.parametrize("model, make", [("upernet_swin_s", ade_folder), ("mask_rcnn_swin_t", coco_folder),
                                         ("cascade_mask_rcnn_swin_b", coco_folder)])
def test_dense_tasks_have_recipes_for_few_photographs(tmp_path, model, make):
    data = str(make(tmp_path / "photos"))
    fresh, notes = resolve(dict(model=model, data=data))
    assert re.search(f"5 training photographs, fewer than 10,000: .*--recipe {model} takes", notes[1])
    tuned, notes = resolve(dict(model=model, data=data, weights="f.pt"))
    assert notes[0].startswith("recipe finetune_") and tuned.lr < fresh.lr and tuned.img_size > fresh.img_size
    assert fresh.batch_size == 5 and tuned.batch_size <= 5 and tuned.select == "best"


def test_batches_and_epochs_follow_from_the_count(monkeypatch):
    assert fit(60, 32, 30) == {"batch_size": 8, "epochs": MAX_EPOCHS}
    assert fit(400, 32, 30) == {"batch_size": 32, "epochs": -(-STEPS // 12)}
    assert fit(3000, 32, 30) == {"batch_size": 32, "epochs": 30} and fit(99_999, 32, 30)["epochs"] == 30
    assert fit(3, 32, 30)["batch_size"] == 3 and fit(1, 32, 30) == {"batch_size": 1, "epochs": MAX_EPOCHS}
    assert fit(3000, 32, 30, given=300) == {"epochs": 100}
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert fit(60, 32, 30)["batch_size"] == 12


def test_of_several_ranks_the_first_counts(photos, tmp_path):
    asked = []

    def from_rank_0(function):
        asked.append(function())
        return ["small_swin", {"batch_size": 2, "epochs": 3}, "said"]

    for data in (photos, str(tmp_path / "absent")):  # a machine may have them elsewhere
        config, _, notes = parse_train(["swin_t", "--data", data, "--warmup-epochs", "1"], from_rank_0)
        assert (config.batch_size, config.epochs, notes[1]) == (2, 3, "said")
    assert asked[0][0] == "small_swin" and asked[1] is None


def test_mistakes_in_the_folder_are_answered_before_training(photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder with a folder per class"):
        parse_train(["swin_t", "--data", str(tmp_path)])
    assert parse_train(["swin_t", "--data", photos + "/train"])[2][0].startswith("recipe small_swin")


def test_a_run_goes_on_with_the_recipe_it_began_with(photos, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "last.pt").touch()
    (folder / "config.yaml").write_text(f"epochs: 310\nbatch_size: 4\nmodel: swin_t\ndata: {photos}\n")
    config, resume, _ = parse_train(["swin_t", "--data", photos, "--resume", str(folder)])
    assert (config.epochs, config.batch_size, resume) == (310, 4, str(folder))
    assert "tensorboard" not in saved_configuration(folder)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("small_*.yaml")) + sorted(RECIPES.glob("finetune_*.yaml")))
def test_recipes_for_few_photographs_are_sound(path):
    models = {"volo": "volo_d1", "upernet": "upernet_swin_t", "segmentation": "upernet_swin_t",
              "mask": "mask_rcnn_swin_t", "detection": "mask_rcnn_swin_t"}
    model = models.get(path.stem.split("_")[1], "swin_t")
    config, notes = resolve_alone({"model": model, "data": "photos"}, str(path))
    check(config)
    assert len(notes) == 1 and read_recipe(path).keys() >= {"batch_size", "epochs", "lr"}
