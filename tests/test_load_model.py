"""models.load_model and eval.image.predict_image: a trained model in a program, and the numbers of `run.py predict`."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from eval.image import load_model, predict_image
from models import MEAN, create_model
from run import main
from train.augment import validation_transform
from train.config import Config, model_overrides, read_recipe, recipe_path, to_dict
from train.device import to_device
from train.photographs import load_image, to_tensor
from training import detector, segmenter, tiny

CLASSES = ["ant", "bee", "cat"]


def save_run(folder, config, classes=tuple(CLASSES), **changes):
    """A folder with the best.pt of a run, with a moving average -> the model that it is to give."""
    torch.manual_seed(0)
    config.num_classes = config.num_classes or len(classes)
    average = create_model(config.model, attn=config.attn, num_classes=config.num_classes, img_size=config.img_size,
                           **model_overrides(config))
    for parameter in average.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {key: value * 0 for key, value in average.state_dict().items()}
    folder.mkdir()
    torch.save({"model": weights, "ema": average.state_dict(), "epoch": 2, "config": to_dict(config),
                "classes": list(classes), "history": [], **changes}, folder / "best.pt")
    return average.eval()


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Noise, upright and to be turned."""
    folder = tmp_path_factory.mktemp("photographs")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "upright.png")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(folder / "turned.png", exif=exif)
    return folder


@pytest.mark.parametrize("config, task", [
    (tiny(img_size=32, crop_pct=0.8), "classification"),
    (segmenter(), "segmentation"), (detector(masks="optional"), "detection"),
    (Config(model="volo_d1", img_size=32, patch_size=4, model_args=dict(
        embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2], stem_dim=8)), "classification")])
def test_a_run_is_loaded_as_it_was_trained_and_sees_what_run_py_sees(config, task, photographs, tmp_path, capsys):
    trained = save_run(tmp_path / "run", replace(config))
    model, meta = load_model(tmp_path / "run")
    assert (meta.task, meta.classes, meta.img_size, meta.mean) == (task, CLASSES, config.img_size, MEAN)
    assert (meta.model, meta.attn, meta.crop_pct) == (config.model, config.attn, config.crop_pct)
    assert not model.training and type(model) is type(trained)
    loaded = model.state_dict()
    assert all(torch.equal(value, loaded[key]) for key, value in trained.state_dict().items())

    weights, out = str(tmp_path / "run" / "best.pt"), str(tmp_path / "seen")
    assert main(["predict", "--weights", weights, "--device=cpu", "--out", out, str(photographs)]) == 0
    for path in photographs.iterdir():
        expected = json.loads((tmp_path / "seen" / f"{path.stem}.json").read_text())
        with Image.open(path) as image:
            answers = [predict_image(model, meta, source)
                       for source in (path, str(path), image, np.asarray(load_image(path)))]
        for answer in answers:
            assert answer == {key: value for key, value in expected.items() if key in answer} and len(answer) == 1
            assert next(iter(answer.values()))  # something is seen
    model.train()
    assert predict_image(model, meta, path) == answers[0] and model.training


def test_what_meta_says_is_how_photographs_are_prepared(photographs, tmp_path):
    save_run(tmp_path / "run", tiny(img_size=16, crop_pct=1.0))
    _, meta = load_model(tmp_path / "run" / "best.pt")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    by_hand = (torch.tensor(np.asarray(image)).permute(2, 0, 1) / 255 - torch.tensor(meta.mean)[:, None, None]) \
        / torch.tensor(meta.std)[:, None, None]
    assert torch.allclose(by_hand, to_tensor(np.asarray(image)), atol=1e-6)
    seen, = to_device([validation_transform(meta.img_size, meta.crop_pct)(image)[None]], torch.device("cpu"))
    assert torch.allclose(by_hand, seen[0], atol=1e-6)


def test_settings_of_a_recipe_are_those_of_the_model(tmp_path):
    """As the scenes' window of 1, of which the name of the model says nothing."""
    recipe = read_recipe(recipe_path("swin_t"))
    config = Config(model="swin_t", attn="elsa", num_classes=3, window_size=recipe["window_size"], img_size=32,
                    model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]))
    trained = save_run(tmp_path / "run", config)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(load_model(tmp_path / "run")[0](images), trained(images))


def test_a_model_may_have_more_classes_than_it_names(tmp_path, photographs):
    save_run(tmp_path / "run", tiny(num_classes=5))
    model, meta = load_model(tmp_path / "run")
    assert meta.classes == [*CLASSES, "3", "4"]
    assert len(predict_image(model, meta, photographs / "upright.png")["top5"]) == 5


@pytest.mark.parametrize("image, said", [
    (np.zeros((5, 5, 3)), r"\(5, 5, 3\) of float64; expected \(H, W, 3\) of uint8"),
    (np.zeros((5, 5), np.uint8), r"\(5, 5\) of uint8"), ("nowhere.png", "no image at nowhere.png"),
    (Image.new("F", (5, 5)), "the image has pixels of Pillow's mode F")])
def test_what_is_no_photograph_is_said(tmp_path, image, said):
    save_run(tmp_path / "run", tiny())
    with pytest.raises((ValueError, OSError), match=said):
        predict_image(*load_model(tmp_path / "run"), image)


def test_what_is_no_checkpoint_of_ours_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.pt"):
        load_model(tmp_path / "nowhere.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*best.pt"):
        load_model(tmp_path)
    trained = save_run(tmp_path / "run", tiny())
    whole = tmp_path / "run" / "best.pt"
    (tmp_path / "half.pt").write_bytes(whole.read_bytes()[:-300])
    with pytest.raises(ValueError, match="half.pt cannot be read: it is damaged"):
        load_model(tmp_path / "half.pt")
    for foreign in (trained.state_dict(), {"model": trained.state_dict(), "config": {"lr": 1}, "classes": ["a"]},
                    {"model": trained.state_dict(), "config": "swin_t"}, [1, 2]):
        torch.save(foreign, tmp_path / "foreign.pth")
        with pytest.raises(ValueError, match="foreign.pth is no checkpoint of this project.*pretrained='.*foreign"):
            load_model(tmp_path / "foreign.pth")


@pytest.mark.parametrize("key, value, said", [
    ("model", "swin_x", "newer version.*unknown model: 'swin_x'"), ("num_classes", None, "no checkpoint of this"),
    ("num_classes", 4, "best.pt does not fit this Swin"), ("num_classes", 10 ** 15, "newer version"),
    ("model_args", {"depth": 3}, "newer version.*Did you mean 'depths'"), ("model_args", [1], "newer version"),
    ("window_size", "a", "newer version")])
def test_damaged_configurations_are_said(tmp_path, key, value, said):
    save_run(tmp_path / "run", tiny())
    checkpoint = torch.load(tmp_path / "run" / "best.pt")
    checkpoint["config"][key] = value
    torch.save(checkpoint, tmp_path / "run" / "best.pt")
    with pytest.raises(ValueError, match=said):
        load_model(tmp_path / "run")
