"""models/weights.py and damaged files: a clear error or the right numbers, and nothing runs."""
import io
import os
import pickle
import random
import time
import zipfile

import pytest
import torch
import torch.nn as nn

from models import load_weights


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 2, 2, 3))
        self.head = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.zeros(()))


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(parts):
    """The bytes of a zip file, stored as torch.save stores, with right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, data in parts.items():
            file.writestr(name, data)
    return buffer.getvalue()


def pickled(parts):
    return next(name for name in parts if name.endswith("data.pkl"))


def mutated(whole, parts, rng, marker):
    """-> bytes of a damaged file, and whether its checksums were made to fit. parts: {name: bytes} of its archive."""
    kind, parts = rng.randrange(7), dict(parts)
    if kind == 0:  # one bit
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data), False
    if kind == 1:  # cut off, or something inside is missing
        start, end = sorted(rng.randrange(len(whole)) for _ in range(2))
        return whole[:start] if rng.random() < 0.5 else whole[:start] + whole[end:], False
    if kind == 2:  # parts under each other's names
        one, other = rng.sample(list(parts), 2)
        parts[one], parts[other] = parts[other], parts[one]
    elif kind == 3:  # the pickle's bytes, with a checksum that fits
        data = bytearray(parts[pickled(parts)])
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        parts[pickled(parts)] = bytes(data)
    elif kind == 4:  # a number in the pickle becomes another, shapes among them
        data, old = parts[pickled(parts)], rng.choice([b"K\x02", b"K\x03", b"K\x04", b"K\x0c"])
        places = [i for i in range(len(data)) if data.startswith(old, i)]
        if places:
            place, new = rng.choice(places), rng.choice([0, -1, 255, 2 ** 31 - 1, 2 ** 40, 2 ** 62, -2 ** 63])
            number = pickle.dumps(new, 2)[2:-1]
            parts[pickled(parts)] = data[:place] + number + data[place + 2:]
    elif kind == 5:  # a part is missing, empty or longer
        name = rng.choice(list(parts))
        parts[name] = rng.choice([b"", parts[name] + b"\0" * 1000, parts[name][:3]])
        if rng.random() < 0.3:
            del parts[name]
    else:  # code
        call = rng.choice([Calls(os.mkdir, marker), Calls(eval, f"__import__('os').mkdir({marker!r})"),
                           Calls(exec, f"open({marker!r}, 'w')"), Calls(bytearray, 2 ** 34)])
        parts[pickled(parts)] = pickle.dumps({"model": call, "epoch": call}, rng.choice([2, 4]))
    return archive(parts), True


def fuzz(count, seed, folder):
    """Loads that many damaged files -> how many were refused."""
    rng, marker, path, refused = random.Random(seed), str(folder / "ran"), folder / "damaged.pt", 0
    torch.manual_seed(seed)
    right = {key: torch.randn_like(value) for key, value in Small().state_dict().items()}
    torch.save({"model": right, "epoch": 3}, folder / "whole.pt")
    whole = (folder / "whole.pt").read_bytes()
    with zipfile.ZipFile(folder / "whole.pt") as file:
        parts = {name: file.read(name) for name in file.namelist()}
    for case in range(count):
        data, sums_fit = mutated(whole, parts, rng, marker)
        path.write_bytes(data)
        model, start = Small(), time.perf_counter()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        try:
            loaded = load_weights(model, path).state_dict()
            right_numbers = all(torch.equal(loaded[key], value) for key, value in right.items())
            assert right_numbers or sums_fit, f"seed {seed}, case {case}: other numbers than were saved"
        except ValueError as error:
            refused += 1
            assert str(error) and all(torch.equal(before[key], value) for key, value in model.state_dict().items())
        assert time.perf_counter() - start < 5, f"seed {seed}, case {case}: slow"
        assert not os.path.exists(marker), f"seed {seed}, case {case}: code ran"
    return refused


@pytest.mark.parametrize("seed", range(2))
def test_damaged_files(seed, tmp_path):
    assert fuzz(50, seed, tmp_path) > 25


@pytest.mark.parametrize("change", [
    lambda state: state | {"head.weight": torch.zeros(1).expand(2 ** 40)},
    lambda state: state | {"pos_embed": torch.zeros(1).expand(1, 2 ** 20, 2 ** 20, 3)},
    lambda state: state | {"head.weight": torch.empty(4, 3, device="meta")},
    lambda state: state | {"head.weight": torch.eye(3).to_sparse()},
])
def test_tensors_without_numbers_of_their_own_are_refused(change, tmp_path):
    model = Small()
    torch.save(change(model.state_dict()), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="damaged: (head.weight|pos_embed)"):
        load_weights(model, tmp_path / "weights.pt")


def test_a_call_for_memory_is_refused(tmp_path):
    torch.save({"model": Small().state_dict(), "memory": Calls(bytearray, 10)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="would run code .*bytearray"):
        load_weights(Small(), tmp_path / "weights.pt")


def test_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(Small().state_dict(), tmp_path / "weights.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    load_weights(Small(), tmp_path / "weights.pt")
    torch.save(Small().state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    load_weights(Small(), tmp_path / "old.pt")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_many_damaged_files(seed, tmp_path):
    assert fuzz(100, seed, tmp_path) > 50
