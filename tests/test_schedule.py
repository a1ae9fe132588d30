"""train/schedule.py against the rates of the published training code, and at known steps."""
import math

import numpy as np
import pytest

from published import GOLDEN
from train.config import Config, resolve
from train.schedule import learning_rate, total_steps

# name in the golden file -> model, attention, recipe
PUBLISHED = {
    "elsa_swin_tiny": ("swin_t", "elsa", None), "elsa_swin_small": ("swin_s", "elsa", None),
    "elsa_swin_base": ("swin_b", "elsa", None), "swin_tiny_microsoft": ("swin_t", "window", None),
    "volo_d1_224": ("volo_d1", None, None), "volo_d1_384": ("volo_d1", None, "volo_d1_384"),
    "mask_elsa_tiny_1x": ("mask_rcnn_swin_t", "elsa", None), "upernet_elsa_tiny_160k": ("upernet_swin_t", "elsa", None),
    "cascade_elsa_tiny_3x": ("cascade_mask_rcnn_swin_t", "elsa", "cascade_mask_rcnn_swin_t_3x"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_update_has_its_published_rate(name):
    model, attn, recipe = PUBLISHED[name]
    config, _ = resolve({"model": model, "data": "photos", **({"attn": attn} if attn else {})}, recipe)
    with np.load(GOLDEN / "training" / "lr.npz") as golden:
        steps, expected = golden[f"{name}_step"].tolist(), golden[f"{name}_lr"]
        epochs, per_epoch = int(golden[f"{name}_epochs"]), int(golden[f"{name}_updates_per_epoch"])
    if "upernet" in name:  # counted in updates alone: 20,210 photographs in batches of 16 make an epoch
        assert total_steps(20210 // 16, config) == per_epoch
        per_epoch = 20210 // 16
    else:
        assert config.epochs == epochs and total_steps(per_epoch, config) == epochs * per_epoch
    rates = [learning_rate(step, per_epoch, config) for step in steps]
    assert len(rates) >= 400 and rates == pytest.approx(expected.tolist(), rel=1e-6)


def test_learning_rate_at_known_steps():
    config = Config(epochs=10, warmup_epochs=2, lr=1e-3, warmup_lr=1e-6, min_lr=1e-5)
    at = [learning_rate(step, 100, config) for step in range(1000)]
    assert at[0] == 1e-6 and at[100] == pytest.approx((1e-3 + 1e-6) / 2) and at[200] == 1e-3 == max(at)
    assert at[-1] == pytest.approx(1e-5) and at[200 + 400] == pytest.approx((1e-3 + 1e-5) / 2, rel=5e-3)
    assert all(a >= b for a, b in zip(at[200:], at[201:]))
    assert [learning_rate(step, 1, Config(epochs=1, warmup_epochs=0)) for step in range(1)] == [1e-3]


def test_cool_down_keeps_the_last_epochs_at_the_minimum():
    config = Config(epochs=5, warmup_epochs=1, cooldown_epochs=2, lr=1e-3, warmup_lr=0, min_lr=1e-5)
    rates = [learning_rate(step, 10, config) for step in range(50)]
    assert rates[10] == max(rates) == 1e-3 and rates[29:] == [1e-5] * 21 and rates[28] > 1e-5


def test_max_steps_ends_the_schedule_and_the_run():
    config = Config(epochs=5, warmup_epochs=0, max_steps=23, schedule="linear", lr=1e-3, min_lr=0)
    assert total_steps(10, config) == 23 and learning_rate(22, 10, config) == pytest.approx(1e-3 / 23)
    assert total_steps(10, Config(epochs=2, max_steps=23)) == 20


@pytest.mark.parametrize("changes", [{}, dict(cosine_from="zero"), dict(lr_per="epoch"), dict(lr_late=True),
                                     dict(schedule="linear"), dict(schedule="steps", milestones=(2.0, 3.0))])
def test_no_step_is_without_a_rate(changes):
    config = Config(epochs=4, warmup_epochs=0.5, lr=1e-3, **changes)
    rates = [learning_rate(step, 3, config) for step in range(12)]
    assert all(0 < rate <= 1e-3 for rate in rates) and all(map(math.isfinite, rates))
