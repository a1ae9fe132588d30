"""What the evaluate() of every task has in common: the model's mode, every image once, `run.py eval` on a part."""
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import nn

from eval import ade20k, coco, evaluate, imagenet, options
from eval.tasks import TASKS, task_of
from photographs import ade_folder, coco_folder, image_folder
from run import main, message_of
from train.config import Config, read_recipe, recipe_path, to_dict
from train.run_folder import notes_of
from train.runs import refuse_inputs
from training import detector, over_ranks, segmenter, tiny

CPU = torch.device("cpu")
IMAGES = 5


class Fake(nn.Module):
    """Refuses to answer in training mode or for gradients, and counts; what it answers depends on the image alone."""

    def __init__(self):
        super().__init__()
        self.seen = 0
        self.dropout = nn.Dropout()  # a part whose mode has to follow

    def forward(self, images, *sizes, **options):
        assert not self.training and not self.dropout.training, "evaluated in training mode"
        assert not torch.is_grad_enabled(), "gradients are kept"
        self.seen += len(images)
        return self.answer(images, *sizes, **options)


class Classifier(Fake):
    def answer(self, images):
        return images.mean((2, 3)) @ torch.linspace(-3, 3, 24).reshape(3, 8).sin()


class Segmenter(Fake):
    def answer(self, images, coarse):
        return torch.einsum("bchw,ck->bkhw", images, torch.linspace(-3, 3, 27).reshape(3, 9).sin())


class Detector(Fake):
    """One box in each image, twice in some."""
    num_classes = 8

    def answer(self, images, sizes, original_sizes):
        (H, W), brightness = original_sizes[0], images.mean().abs()
        n = 1 + int(100 * brightness) % 2
        mask = torch.zeros(n, H, W, dtype=torch.bool)
        mask[:, 5:-5, 5:-5] = True
        return [{"boxes": torch.tensor([[5., 5, W - 5, H - 5]] * n), "scores": brightness.sigmoid().repeat(n),
                 "labels": torch.full((n,), int(1000 * brightness) % 8), "masks": mask}]


CASES = [(tiny, imagenet, Classifier), (segmenter, ade20k, Segmenter), (detector, coco, Detector)]
each_task = pytest.mark.parametrize("configuration, evaluation, model", CASES)


def loaded(configuration, evaluation, rank=0, world=1, images=IMAGES):
    dataset, _ = evaluation.dataset(configuration(val_limit=images), None)
    return evaluation.loader(dataset, 2, rank, world, 0)


def test_every_task_is_tested():
    assert {task.evaluation for task in TASKS.values()} == {evaluation for _, evaluation, _ in CASES}


@each_task
@pytest.mark.parametrize("training", [True, False])
def test_models_are_evaluated_in_evaluation_mode_and_get_their_mode_back(configuration, evaluation, model, training):
    model = model().train(training)
    result = evaluation.evaluate(model, loaded(configuration, evaluation), CPU)
    assert model.training is model.dropout.training is training and torch.is_grad_enabled()
    assert result["images"] == model.seen == IMAGES


@each_task
@pytest.mark.parametrize("training", [True, False])
def test_models_get_their_mode_back_after_an_error(configuration, evaluation, model, training):
    model = model().train(training)
    model.answer = lambda *inputs, **options: 1 / 0
    with pytest.raises(ZeroDivisionError):
        evaluation.evaluate(model, loaded(configuration, evaluation), CPU)
    assert model.training is model.dropout.training is training and torch.is_grad_enabled()


@each_task
@pytest.mark.parametrize("world, images", [(2, IMAGES), (3, IMAGES), (3, 2)])  # the last: a rank without images
def test_scores_over_ranks_are_those_of_one(configuration, evaluation, model, world, images):
    def rank(number):
        ours = deepcopy(alone)
        ours.seen = 0
        loader = loaded(configuration, evaluation, number, world, images)
        return ours, evaluation.evaluate(ours, loader, CPU)

    alone = model()
    expected = evaluation.evaluate(alone, loaded(configuration, evaluation, images=images), CPU)
    answers = over_ranks(world, rank)
    assert [ours.seen for ours, _ in answers] == [len(range(number, images, world)) for number in range(world)]
    for _, result in answers:
        assert result.keys() == expected.keys() and result["seconds"] == answers[0][1]["seconds"]
        assert comparable(result) == pytest.approx(comparable(expected), nan_ok=True)


@each_task
@pytest.mark.parametrize("amp, expected", [("none", False), ("bf16", True)])
def test_models_are_evaluated_under_autocast_as_asked(configuration, evaluation, model, amp, expected):
    model, seen = model(), []
    answer = model.answer
    model.answer = lambda *inputs, **options: seen.append(torch.is_autocast_enabled("cpu")) or answer(
        *inputs, **options)
    evaluation.evaluate(model, loaded(configuration, evaluation), CPU, amp)
    assert set(seen) == {expected}


def comparable(result):
    """The numbers of a result, but for the time that it took."""
    flat = {}
    for name, value in result.items():
        if isinstance(value, dict):
            flat |= {f"{name} {key}": number for key, number in value.items()}
        elif isinstance(value, list):
            flat |= {f"{name} {i}": number for i, number in enumerate(torch.tensor(value).flatten().tolist())}
        elif name != "seconds":
            flat[name] = value
    return flat


@pytest.mark.parametrize("configuration", [tiny, segmenter, detector])
def test_more_classes_in_the_data_than_in_the_model_are_refused(configuration):
    config = configuration(num_classes=2)
    with pytest.raises(ValueError, match=r"num_classes = 2, but the data has [89]; expected at least as many"):
        evaluate.run(config, None, None)


@pytest.mark.parametrize("configuration", [tiny, segmenter, detector])
def test_eval_scores_the_model_of_the_configuration_on_the_part_asked_for(configuration, capsys):
    config = configuration(val_limit=2, num_classes=11, seed=3)
    assert evaluate.run(config, None, None)["images"] == 2
    printed = capsys.readouterr().out
    assert "2 images of held-out rendered scenes" in printed and f"{config.img_size} px, 11 classes, 1 x cpu" in printed
    task = task_of(config.model)
    assert ("short side" in printed) == (task.model != "classifier") and "UNTRAINED" in printed


@each_task
def test_eval_hands_on_what_was_asked_for(configuration, evaluation, model, monkeypatch, tmp_path):
    there = str(tmp_path / "there")
    seen = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *given: seen.append(given) or {"images": 2})
    monkeypatch.setattr(evaluation, "table", lambda *given: "")
    config = configuration(val_limit=2, amp="bf16", batch_size=7)
    evaluate.run(config, None, None, dump=there)
    (_, loader, device, amp, dump), = seen
    assert (device, amp, dump) == (CPU, "bf16", there) and len(loader.dataset) == 2
    assert loader.loader.batch_size == (7 if evaluation is imagenet else None)


# What a checkpoint says

@pytest.fixture
def weights(tmp_path):
    """A checkpoint of a model that differs from the defaults in all that a checkpoint settles."""
    config = tiny(num_classes=3, crop_pct=0.5, seed=5, batch_size=8, val_limit=7, masks="optional", exif="ignore",
                  zero_label="class")
    model = options.load_model(config, None)
    content = {"model": model.state_dict(), "ema": None, "config": to_dict(config), "classes": ["a", "b", "c"]}
    torch.save(content, tmp_path / "last.pt")
    return str(tmp_path / "last.pt"), config, model


def test_the_checkpoint_settles_the_model_and_the_command_line_the_rest(weights):
    path, trained, model = weights
    config, classes = options.settle({"model": None, "amp": "bf16"}, path)
    assert classes == ["a", "b", "c"] and config.model == "swin_t" and config.amp == "bf16"
    for name in options.TRAINED:
        assert getattr(config, name) == getattr(trained, name) != getattr(Config(), name), name
    assert {"masks", "exif", "zero_label"} <= {*options.TRAINED}  # what labels mean
    assert (config.val_limit, config.batch_size, config.device) == (None, 128, "auto")
    loaded = options.load_model(config, path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_the_command_line_is_over_the_checkpoint(weights):
    config, _ = options.settle({"model": "swin_t", "img_size": "24", "seed": "1", "data": "there"}, weights[0])
    assert (config.img_size, config.seed, config.data, config.crop_pct) == (24, 1, "there", 0.5)


# What a model is evaluated on

def saved_as(path, config, data=None, classes=("a", "b", "c"), entries=None):
    """A checkpoint of a fresh model, as of a run on `data`."""
    content = {"model": options.load_model(config, None).state_dict(), "ema": None,
               "config": {**to_dict(config), "data": data}, "classes": list(classes)}
    torch.save({**content, **(entries or {})}, path)
    return str(path)


def test_without_data_a_model_sees_what_it_was_trained_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "mine", {"train": 1, "val": 2}, ("a", "b", "c"))
    path = saved_as("last.pt", tiny(num_classes=3), "mine")
    assert main(["eval", "--weights", path, "--device", "cpu"]) == 0
    assert "6 images of mine" in capsys.readouterr().out
    (tmp_path / "mine").rename(tmp_path / "gone")
    assert main(["eval", "--weights", path, "--device", "cpu"]) == 2
    assert "last.pt was trained on mine, which is not here" in capsys.readouterr().err
    assert options.settle({"model": None}, path, photographs=True)[0].data is None
    assert options.settle({"model": None, "data": "gone"}, path)[0].data == "gone"


def test_published_weights_are_evaluated_on_photographs_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.save(options.load_model(tiny(num_classes=8), None).state_dict(), "weights.pt")
    assert main(["eval", "swin_t", "--weights", "weights.pt"]) == 2
    error = capsys.readouterr().err
    assert "name the photographs with --data" in error and error.count("\n") == 1
    assert main(["eval", "--weights", "."]) == 2 and "--weights .: no best.pt in this folder" in capsys.readouterr().err
    assert main(["eval", "weights.pt"]) == 2 and "weights are named with --weights" in capsys.readouterr().err


@pytest.mark.parametrize("number, named, weights, said", [
    (2, None, None, "num_classes = 2, but the data has 3; expected at least as many"),
    (80, None, "w.pt", "num_classes = 80, but the data has 3, and w.pt does not say which are which"),
    (2, ["a", "b", "c"], "w.pt", "at least as many")])
def test_classes_are_settled_before_the_first_image(number, named, weights, said):
    with pytest.raises(ValueError, match=said):
        evaluate.check_classes(number, ["a", "b", "c"], named, weights)
    for fine in ((None, None, None), (3, None, "w.pt"), (80, ["a", "b", "c"], "w.pt"), (80, None, None)):
        evaluate.check_classes(fine[0], ["a", "b", "c"], *fine[1:])


@pytest.mark.parametrize("configuration, folder", [(segmenter, ade_folder), (detector, coco_folder)])
def test_a_model_with_more_classes_than_it_names_is_evaluated_and_shown(configuration, folder, tmp_path, monkeypatch):
    """So it was trained, with --num-classes; what it has no name for is called by its number."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "data")
    names = coco.dataset(detector(data="data"), None)[1] if folder is coco_folder else ["red", "green", "blue"]
    torch.manual_seed(0)
    model = options.load_model(configuration(num_classes=40), None)
    classifier = model.decode_head.conv_seg if folder is ade_folder else model.roi_head.bbox_head.fc_cls
    torch.nn.init.constant_(classifier.bias[30:40], 20)  # classes that nobody named
    path = saved_as("last.pt", configuration(num_classes=40), "data", names, {"model": model.state_dict()})
    assert main(["eval", "--weights", path, "--device", "cpu", "--dump", "found"]) == 0
    photographs = "data/images/validation" if folder is ade_folder else "data/val2017"
    assert main(["predict", "--weights", path, "--device", "cpu", photographs]) == 0


def test_checkpoints_have_any_name_that_files_have(tmp_path):
    path = tmp_path / "K\udce4tze.pt"  # no UTF-8
    saved_as(tmp_path / "last.pt", tiny(num_classes=3))
    (tmp_path / "last.pt").rename(path)
    config, classes = options.settle({"model": None}, str(path))
    assert classes == ["a", "b", "c"] and options.load_model(config, str(path)).head.out_features == 3


def test_more_names_than_classes_are_refused(tmp_path):
    path = saved_as(tmp_path / "last.pt", tiny(num_classes=3))
    with pytest.raises(ValueError, match="names 3 classes, and --num-classes is 2"):
        options.settle({"model": None, "num_classes": "2"}, path)


@pytest.mark.parametrize("entries", [{"config": {"model": 3}}, {"config": {}}, {"classes": [1, 2]}, {"classes": 3}])
def test_other_peoples_checkpoints_may_have_entries_of_these_names(tmp_path, entries):
    assert options.checkpoint_facts(saved_as(tmp_path / "last.pt", tiny(num_classes=3), entries=entries)) == ({}, None)


@pytest.mark.parametrize("kind, dump, said", [
    ("folder", "data", "is the folder of --data"), ("folder", "data/annotations/validation", "would write over"),
    ("folder", "data/images/validation/new", "would write over"), ("folder", "link", "would write over"),
    ("folder", "link/../training", "would write over"), ("folder", "elsewhere/new", "would write over"),
    ("folder", "deep", "would write over"),
    ("folder", "w.pt", "would write over w.pt"),
    ("folder", "file", "is a file; expected a folder"), ("file", "new", "is a folder; expected a file"),
    ("file", "data/annotations/instances_val2017.json", "would write over"), ("file", "file/x", "file: File exists")])
def test_dumps_are_written_over_no_input(tmp_path, monkeypatch, kind, dump, said):
    monkeypatch.chdir(tmp_path)
    ade_folder(tmp_path / "data")
    Path("link").symlink_to("data/annotations/validation")
    Path("data/images/validation/aachen").mkdir()
    Path("deep").symlink_to("data/images/validation/aachen")
    Path("data/images/training").rename("elsewhere")
    Path("data/images/training").symlink_to("../../elsewhere")
    Path("new").mkdir()
    for name in ("w.pt", "file"):
        Path(name).touch()
    with pytest.raises((ValueError, OSError)) as caught:
        evaluate.check_dump(dump, kind, "data", "w.pt")
    assert said in message_of(caught.value)
    evaluate.check_dump("fresh/place", kind, "data", "w.pt")
    refuse_inputs("--dump", "neither", "data", ["is there"])
    assert Path("fresh").exists() and Path("fresh/place").exists() == (kind == "folder")


def test_notes_of_the_data_are_printed(capsys, monkeypatch):
    monkeypatch.setattr(TASKS["classification"].training.Scenes, "notes", ["left out: 2"], raising=False)
    evaluate.run(tiny(val_limit=2), None, None)
    assert "\n  validation: left out: 2\n" in capsys.readouterr().out
    assert notes_of("training", []) == []


def test_another_model_than_the_checkpoints_is_refused(weights):
    with pytest.raises(ValueError, match="was trained as swin_t, not as swin_s"):
        options.settle({"model": "swin_s"}, weights[0])


def test_without_a_checkpoint_sizes_are_those_of_the_recipe():
    for model, photographs in (("swin_t", 224), ("upernet_swin_t", 512), ("mask_rcnn_swin_t", 800)):
        recipe = read_recipe(recipe_path(model))
        config, classes = options.settle({"model": model}, None)
        assert config.img_size == recipe["img_size"] < photographs and classes is None
        assert options.settle({"model": model, "data": "there"}, None)[0].img_size == photographs
        assert options.settle({"model": model}, None, photographs=True)[0].img_size == photographs


def test_more_classes_than_a_png_holds_are_not_dumped(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "upernet_swin_t", "--num-classes", "256", "--dump", "maps", "--device", "cpu"]) == 2
    assert "256 classes; expected at most 255" in capsys.readouterr().err
