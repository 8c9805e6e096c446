"""Models that are built without weights and filled from files are the loaded ones; over ranks in test_ranks.py."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from opd_lightning.filling import fill, is_unfilled
from opd_lightning.likeness import fingerprint
from opd_lightning.pretrained import Lora, Pretrained
from tests.tiny import save_model


def loaded(folder, empty: bool, **settings):
    torch.manual_seed(5)
    model = Pretrained(str(folder), **settings).load(AutoModelForCausalLM, trained=True, empty=empty)
    assert is_unfilled(model) == empty
    if empty:
        fill(model, torch.device("cpu"))
    return model, torch.rand(1)


@pytest.mark.parametrize("settings", [{}, {"lora": Lora(r=4, alpha=8)}, {"freeze": "embed"}, {"dtype": "bfloat16"}])
def test_a_filled_model_is_the_loaded_one(settings, tmp_path):
    """Also what is drawn: adapters, and whatever comes after."""
    folder = save_model(tmp_path / "model", tie_word_embeddings="dtype" in settings)
    (one, drawn), (other, drawn_of_other) = loaded(folder, True, **settings), loaded(folder, False, **settings)
    assert torch.equal(drawn, drawn_of_other)
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(one, kind)()), dict(getattr(other, kind)())
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            assert torch.equal(mine[name], value), name
            assert mine[name].requires_grad == value.requires_grad, name
            assert mine[name].dtype == value.dtype, name
    assert one.generation_config.to_dict() == other.generation_config.to_dict()
    assert one.training == other.training
    assert fingerprint(one) == fingerprint(other)
    ids = torch.arange(6)[None]
    assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_weights_of_other_names_are_loaded_whole(tmp_path):
    folder = save_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): value for name, value in weights.items()}, folder / "model.safetensors")
    model = Pretrained(str(folder)).load(AutoModelForCausalLM, trained=True, empty=True)
    assert not is_unfilled(model)


def test_drawn_weights_are_drawn_whole(tmp_path):
    model = Pretrained(str(save_model(tmp_path / "model")), random_init=True).load(
        AutoModelForCausalLM, True, empty=True
    )
    assert not is_unfilled(model)
