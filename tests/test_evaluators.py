"""What the evaluate() of every task has in common: the model's mode, every image once, `run.py eval` on a part."""
from copy import deepcopy

import pytest
import torch
from torch import nn

from eval import ade20k, coco, evaluate, imagenet, options
from eval.tasks import TASKS, task_of
from train.config import Config, read_recipe, recipe_path, to_dict
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
        assert result.get("results") == expected.get("results")  # of a detector: all it found, in the same order


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
        elif isinstance(value, list) and name != "results":
            flat |= {f"{name} {i}": number for i, number in enumerate(torch.tensor(value).flatten().tolist())}
        elif name not in ("results", "seconds"):
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
    assert loader.batch_size == (7 if evaluation is imagenet else None)


# What a checkpoint says

@pytest.fixture
def weights(tmp_path):
    """A checkpoint of a model that differs from the defaults in all that a checkpoint settles."""
    config = tiny(num_classes=3, crop_pct=0.5, seed=5, batch_size=8, val_limit=7)
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
    assert (config.val_limit, config.batch_size, config.device) == (None, 128, "auto")
    loaded = options.load_model(config, path).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


def test_the_command_line_is_over_the_checkpoint(weights):
    config, _ = options.settle({"model": "swin_t", "img_size": "24", "seed": "1", "data": "there"}, weights[0])
    assert (config.img_size, config.seed, config.data, config.crop_pct) == (24, 1, "there", 0.5)


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
