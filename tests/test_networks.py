"""Networks from configs: reading, refusals, and supported devices."""

import json

import pytest
import torch

from diffit.config import ModelConfig
from diffit.errors import UserError
from diffit.networks import read_model_config, set_up_model
from helpers import TINY_CONFIG


@pytest.fixture
def tiny(tmp_path) -> str:
    (tmp_path / "tiny.json").write_text(json.dumps({"_class_name": "DiffiTUNet2DModel", **TINY_CONFIG}))
    return str(tmp_path / "tiny.json")


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        ("window=4", ["'window'", "did you mean"]),
        ("dropout=high", ["dropout", "'high'"]),
        ("block_out_channels=8", ["block_out_channels", "8"]),
        ("layers_per_block=1.5", ["layers_per_block", "1.5"]),
        ("mlp_ratio=true", ["mlp_ratio", "True"]),
    ],
)
def test_wrong_model_kwargs_are_refused(pair, words, tiny):
    with pytest.raises(UserError) as error:
        read_model_config(ModelConfig(model_config=tiny, model_kwargs=(pair,)))
    assert all(word in str(error.value) for word in ("--model_kwargs", *words))


def test_model_kwargs_override_the_file_and_parse_numbers(tiny):
    pairs = ("norm_eps=1e-6", "time_embedding_dim=24", "block_out_channels=[16, 32]")
    config = read_model_config(ModelConfig(model_config=tiny, model_kwargs=pairs))
    assert (config["norm_eps"], config["time_embedding_dim"]) == (1e-6, 24)
    assert config["block_out_channels"] == [16, 32] and config["window_size"] == TINY_CONFIG["window_size"]


@pytest.mark.parametrize("path", ["nowhere.json", "no/where"])
def test_missing_model_config_is_refused(path):
    with pytest.raises(UserError, match=f"--model_config {path}"):
        read_model_config(ModelConfig(model_config=path))


def test_flex_is_refused_on_devices_without_a_backward_pass():
    asked = ModelConfig(model_config="a", attention_backend="flex")
    with pytest.raises(UserError, match="--attention_backend flex .* device cpu"):
        set_up_model(torch.nn.Linear(1, 1), asked, torch.device("cpu"))
