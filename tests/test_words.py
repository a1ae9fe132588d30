"""The field's words for our options and models."""
import pytest

from models import list_models
from run import main
from train import words
from train.command_line import parse_train
from train.config import KEYS


@pytest.mark.parametrize("typed, meant", [
    ("--learning-rate 1e-3", "did you mean --lr?"), ("--learning_rate=1e-3", "did you mean --lr?"),
    ("--bs 8", "did you mean --batch-size?"), ("--batch 8", "did you mean --batch-size?"),
    ("-b 8", "did you mean --batch-size?"), ("--pretrained", "did you mean --weights?"),
    ("--resume-from x", "did you mean --resume?"), ("--epohcs 3", "did you mean --epochs?"),
    ("--model swin_t", "the model stands behind the command: run.py train swin_t."),
    ("--arch=volo_d1", "the model stands behind the command: run.py train volo_d1."),
    ("--model", "the model stands behind the command: run.py train MODEL.")])
def test_options(typed, meant):
    with pytest.raises(ValueError, match="^unknown option -") as error:
        parse_train(typed.split())
    assert f"; {meant} --help lists all" in str(error.value)


def test_every_word_of_the_table_stands_for_an_option_and_is_none():
    options = {name.replace("_", "-") for name in KEYS} | {"recipe", "resume"}
    assert {*words.OPTIONS.values()} <= options and not options & words.OPTIONS.keys()


@pytest.mark.parametrize("name, meant", [
    ("swin_tiny_patch4_window7_224", "swin_t"), ("swin_base_patch4_window12_384.ms_in22k", "swin_b"),
    ("swin_tiny", "swin_t"), ("Swin-T", "swin_t"), ("elsa_swin_tiny", "swin_t --attn elsa"),
    ("volo_d1_224", "volo_d1"), ("elsa_volo_d5", "volo_d5 --attn elsa"), ("upernet_swin_small", "upernet_swin_s"),
    ("mask-rcnn_swin-t-p4-w7_fpn_1x_coco", "mask_rcnn_swin_t"), ("cascade_mask_rcnn_swin_base",
                                                                 "cascade_mask_rcnn_swin_b")])
def test_models(name, meant, capsys):
    assert main(["info", name]) == 2
    assert capsys.readouterr().err == f"error: unknown model {name!r}; did you mean {meant}?\n"


def test_our_models_and_what_is_none_have_no_other_name():
    assert not any(map(words.of_model, [*list_models(), None, "swin_tt", "swin_large", "resnet50", "volo_d6", "swin_"]))


@pytest.mark.parametrize("typed, meant", [
    ("--epochs 1", "for all runs: --set epochs=1. "), ("--bs=8", "for all runs: --set batch-size=8. "),
    ("--epohcs", "for all runs: --set epochs=VALUE. "), ("--seed 3", "did you mean --seeds? "),
    ("--model swin_t", "the model stands behind the command: run.py compare swin_t. ")])
def test_compare_names_set(typed, meant, capsys):
    assert main(["compare", *typed.split()]) == 2
    assert f"; {meant}--help lists all\n" in capsys.readouterr().err
