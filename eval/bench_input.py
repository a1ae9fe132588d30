"""How many images a second one core makes ready for training: `python run.py bench --level input --data DIR`.

Beside it timm's pipeline, where that package is installed, on the same files with the same augmentation: crop, flip and
RandAugment as published, to batches of bytes. What follows on the device, erasing and mixing, is timed for neither.
"""
import importlib.metadata
import importlib.util
import math
import multiprocessing
import statistics
import time

import torch
from torch.utils.data import default_collate

from train import classification, data
from train.config import resolve
from train.device import to_device
from train.draws import Draws

WORKER = ("read and decode", "crop and resize", "flip", "RandAugment", "to bytes", "collate", "seeds and the rest")
STAGES = (*WORKER, "to the device")  # the last is the main process's
IMAGES, BATCH = 256, 32  # of the data set as many at most; how many a batch holds


def main(args, device, environment):
    """Prints the tables. args: of the command line. environment: of bench.environment()."""
    if args.data is None:
        raise ValueError("--level input needs --data, photographs as for `run.py train swin_t`")
    training = datasets(args.data)[0]
    count = min(IMAGES, len(training))
    batch_size = min(BATCH, count)
    indices = [i * len(training) // count for i in range(count)]
    batches = [indices[i:i + batch_size] for i in range(0, count - batch_size + 1, batch_size)]
    folder = getattr(training.images, "root", None) if isinstance(training.images, classification.PhotographFolder) \
        else None
    makers = {"ours": (ours, args.data, device)}
    if folder and importlib.util.find_spec("timm"):
        makers["timm"] = (timms, folder, device)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "torchvision", "pillow",
                         *(["timm"] if "timm" in makers else [])))
    print(f"{environment['date']}, {environment['device']}, {versions}; {args.data}: {len(batches)} batches of "
          f"{batch_size}, {args.repeats or 5} times, a process and a thread each, in turn", flush=True)
    repeats = measure(makers, batches, args.repeats or 5)
    report(repeats, len(batches) * batch_size, args.images_per_s)
    if folder is None:
        print("timm's pipeline is measured on folders alone")
    elif "timm" not in makers:
        print("timm is not installed: `pip install timm` for the comparison")


def datasets(place):
    """What the ELSA recipe of swin_t trains on, see classification.datasets."""
    return classification.datasets(resolve({"model": "swin_t", "attn": "elsa", "data": place})[0])


def measure(makers, batches, repeats):
    """{name: [{stage: seconds of a core}, ... one for each repeat]}.

    makers: {name: (function that gives a function of a list of indices, its arguments)}, each run in a process of its
    own, one at a time, batch by batch in turn, so that what else the machine does hits all alike.
    """
    context = multiprocessing.get_context("spawn")
    workers, found = {}, {name: [] for name in makers}
    try:
        for name, maker in makers.items():
            connection, other = context.Pipe()
            workers[name] = context.Process(target=serve, args=(other, *maker), daemon=True), connection
            workers[name][0].start()
            other.close()
        for repeat in range(-1, repeats):  # one to get warm
            sums = {name: dict.fromkeys(STAGES, 0.0) for name in makers}
            for batch in batches:
                for name, (_, connection) in workers.items():
                    connection.send((max(repeat, 0), batch))
                    answer = connection.recv()
                    if isinstance(answer, Exception):
                        raise answer
                    for stage, seconds in answer.items():
                        sums[name][stage] += seconds
            if repeat >= 0:
                for name in makers:
                    found[name].append(sums[name])
    finally:
        for process, _ in workers.values():
            process.terminate()
            process.join()
    return found


def serve(connection, maker, *arguments):
    """In a process of its own: answers (epoch, indices) with the seconds of each stage, until it is ended."""
    torch.set_num_threads(1)
    try:
        stopwatch = Stopwatch()
        make = maker(stopwatch, *arguments)
        while True:
            epoch, indices = connection.recv()
            stopwatch.seconds.clear()
            start = time.thread_time()
            make(epoch, indices)
            rest = time.thread_time() - start - sum(stopwatch.seconds.values())
            connection.send({**stopwatch.seconds, "seeds and the rest": rest})
    except Exception as error:
        connection.send(error)


class Stopwatch:
    """Seconds of this thread's processor time in each of STAGES."""

    def __init__(self):
        self.seconds = {}

    def timed(self, stage, function):
        def call(*arguments):
            start = time.thread_time()
            try:
                return function(*arguments)
            finally:
                self.seconds[stage] = self.seconds.get(stage, 0.0) + time.thread_time() - start
        return call


def ours(stopwatch, place, device):
    training = datasets(place)[0]
    images, transform = training.images, training.transform
    transform.steps = [stopwatch.timed(stage, step) for stage, step in zip(STAGES[1:4], transform.steps, strict=True)]
    transform.finish = stopwatch.timed("to bytes", transform.finish)
    load, collate = stopwatch.timed("read and decode", images.__getitem__), stopwatch.timed("collate", default_collate)
    move = stopwatch.timed("to the device", lambda batch: _wait(to_device(batch, device), device))

    def make(epoch, indices):
        samples = []
        for index in indices:
            image, label = load(index)
            image, _ = transform(image, Draws(data.seed_of(training.seed, epoch, index)))
            samples.append((image, label))
        move(collate(samples))

    return make


def timms(stopwatch, folder, device):
    """As timm's train.py has it with --aa rand-m9-mstd0.5-inc1, interpolation random and its prefetcher."""
    import timm.data
    from timm.data.loader import fast_collate
    transform = timm.data.create_transform(224, is_training=True, use_prefetcher=True, interpolation="random",
                                           auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.0)
    transform.transforms = [stopwatch.timed(stage, step) for stage, step in zip(STAGES[1:5], transform.transforms,
                                                                               strict=True)]
    load = stopwatch.timed("read and decode", timm.data.ImageDataset(folder).__getitem__)
    collate = stopwatch.timed("collate", fast_collate)

    def augmented(image):
        while True:
            try:
                return transform(image)
            except ValueError as error:  # Pillow 13 posterizes to no 0 bits, which one draw of some hundreds asks for
                if "bits" not in str(error):
                    raise

    def make(epoch, indices):
        torch.manual_seed(epoch)
        samples = []
        for index in indices:
            image, label = load(index)
            samples.append((augmented(image), label))
        collate(samples)

    return make


def _wait(batch, device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return batch


def report(repeats, images, wanted):
    """Prints the rate of each pipeline, where its time goes, and the cores for GPUs of `wanted` images a second.

    repeats: of measure(). images: in each of them.
    """
    ms = {name: {stage: 1e3 / images * statistics.median(seconds[stage] for seconds in rows) for stage in STAGES}
          for name, rows in repeats.items()}
    rates = {name: [images / sum(seconds[stage] for stage in WORKER) for seconds in rows]
             for name, rows in repeats.items()}
    print("\n| ms an image of one core | " + " | ".join(ms) + " |\n|---|" + "--:|" * len(ms))
    for stage in STAGES:
        cells = [f"{of[stage]:.2f}" if of[stage] else "" for of in ms.values()]
        print(f"| {stage} | " + " | ".join(cells) + " |")
    for label, choose in (("images/s and core, median", statistics.median), ("least", min), ("most", max)):
        print(f"| {label} | " + " | ".join(f"{choose(values):.0f}" for values in rates.values()) + " |")
    rate = statistics.median(rates["ours"])
    if "timm" in rates:
        ratios = [a / b for a, b in zip(rates["ours"], rates["timm"])]
        print(f"\nours: {statistics.median(ratios):.2f} times timm's ({min(ratios):.2f} to {max(ratios):.2f})")
    print("\nThe last stage is the main process's, on a CPU its conversion to float.")
    for number in wanted:
        print(f"A GPU that trains on {number:g} images/s needs {math.ceil(number / rate)} cores")
