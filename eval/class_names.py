"""Names of the classes of published weights, and words for ImageNet's."""
from functools import cache
from pathlib import Path

from eval import coco, imagenet
from train import segmentation

# Of WNIDS, line by line: the first word of each synset of WordNet 3.0, two where that is another's, too.
WORDS = Path(__file__).with_name("imagenet_names.txt")


def published_classes(task, num_classes):
    """Names of the classes of published weights; numbers where there are others."""
    names = {"classification": imagenet.WNIDS, "detection": coco.CLASSES}.get(task)
    names = names.read_text().splitlines() if names else []
    num_classes = num_classes or len(names) or segmentation.ADE20K_CLASSES
    return names if len(names) == num_classes else [str(i) for i in range(num_classes)]


@cache
def words():
    """{WordNet id: what it is called in English, "tabby"} of ImageNet's 1,000 classes."""
    lines = [line for line in WORDS.read_text().splitlines() if not line.startswith("#")]
    return dict(zip(imagenet.WNIDS.read_text().split(), lines, strict=True))
