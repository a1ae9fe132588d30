"""`--compile`: one graph in a whole run, and the same steps."""
import functools

import pytest
import torch
from torch._dynamo.utils import counters

from train.state import TrainingState
from training import detector, rows, segmenter, tiny, train

VOLO = dict(model="volo_d1", patch_size=4, window_size=None, mix_token=1.0,
            model_args=dict(embed_dim=12, depths=[1, 1, 1, 1], num_heads=[2, 2], stem_dim=4))
SHORT = dict(limit=9, val_limit=3, batch_size=4, compile=True)  # an image is left over in every epoch


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Trains -> how many graphs were made, without generating code of them."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))

    def run(config, out="run"):
        torch._dynamo.reset()
        counters.clear()
        config.out = str(tmp_path / out)
        train(config)
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]
    yield run
    torch._dynamo.reset()


@pytest.mark.parametrize("config", [tiny(**SHORT), tiny(**SHORT, **VOLO), segmenter(**SHORT)], ids=lambda x: x.model)
def test_a_run_makes_one_graph(config, run):
    """In two epochs, each with an evaluation of the same model, in another mode and in batches of another size."""
    assert run(config) == 1


def test_a_compiled_run_makes_the_steps_of_an_eager_one(run, tmp_path):
    config = dict(**{**SHORT, "epochs": 1}, ema=0.9, drop_path_rate=0.2, checkpointing=True)
    assert run(tiny(**config)) == 1 and run(tiny(**{**config, "compile": False}), "eager") == 0
    losses = [[row["loss"] for row in rows(tmp_path / name) if "step" in row] for name in ("run", "eager")]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_of_a_detector_the_backbone_is_one_graph_for_batches_of_all_sizes(run):
    config = detector(compile=True)
    config.model_args = {**config.model_args, "depths": [1, 1], "num_heads": [1, 2]}  # in all four it takes long
    state = TrainingState(config, 1, torch.device("cpu"))
    state.wrap()
    assert state.forward is state.model
    torch._dynamo.reset()
    counters.clear()
    for N, H, W in ((2, 32, 64), (3, 64, 32), (2, 96, 64)):
        maps = state.forward.backbone(torch.randn(N, 3, H, W))
        assert [tuple(x.shape[2:]) for x in maps] == [(H // 2, W // 2), (H // 4, W // 4)]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
