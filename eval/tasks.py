"""The tasks: a module in train/ and one in eval/ for each."""
from types import ModuleType
from typing import NamedTuple

from eval import ade20k, coco, imagenet
from train import classification, config, detection, segmentation


class Task(NamedTuple):
    model: str  # what a model of it is called
    training: ModuleType  # datasets(config), loss(model, batch, config, seed)
    evaluation: ModuleType  # METRICS, dataset(config, classes), loader(...), evaluate(...), table(result, classes)


TASKS = {"classification": Task("classifier", classification, imagenet),
         "segmentation": Task("segmenter", segmentation, ade20k),
         "detection": Task("detector", detection, coco)}


def task_of(model):
    """The Task of a model, by its name."""
    return TASKS[config.task_of(model)]
