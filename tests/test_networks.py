"""Networks from configs: reading, refusals, and supported devices."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, EDMEulerScheduler
from safetensors.torch import load_file, save_file

from diffit.config import ModelConfig
from diffit.errors import UserError
from diffit.networks import adapt_weights, build_model, read_model_config, set_up_model, warn_of_other_latents
from diffit.pretrained import network_subfolder, read_class_names, read_pretrained_scheduler
from diffit_model import DiffiTTransformer2DModel
from diffit_pipeline import DiffiTPipeline
from helpers import TINY_CONFIG, mentions, refusal, sample, tiny_dit, tiny_unet, tiny_vae, train


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


# --- saved models to start from


def test_folder_is_read_by_what_is_in_it_and_not_by_its_name(tmp_path):
    """A pipeline called `unet-mine` in the folder of another model has its own scheduler."""
    DiffiTPipeline(tiny_unet(), EDMEulerScheduler()).save_pretrained(tmp_path)
    own = tmp_path / "unet-mine"
    DiffiTPipeline(tiny_unet(), DDPMScheduler(beta_end=0.015)).save_pretrained(own)
    assert network_subfolder(str(own)) == "unet"
    assert read_pretrained_scheduler(str(own))["beta_end"] == 0.015
    assert read_pretrained_scheduler(str(own / "unet"))["beta_end"] == 0.015
    assert read_pretrained_scheduler(str(tmp_path / "unet"))["_class_name"] == "EDMEulerScheduler"


def test_network_is_found_in_its_pipeline_by_any_path(tmp_path, monkeypatch):
    names = {"0": "cat", "1": "dog"}
    DiffiTPipeline(tiny_unet(num_class_embeds=2), EDMEulerScheduler(), names).save_pretrained(tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own/unet")
    monkeypatch.chdir(tmp_path / "own/unet")
    for path in (tmp_path / "own/unet", tmp_path / "link", ".", "../unet", f"{tmp_path}/own/scheduler/../unet/"):
        assert read_pretrained_scheduler(str(path))["_class_name"] == "EDMEulerScheduler", path
        assert read_class_names(str(path)) == ("cat", "dog")
    # A pipeline whose network is a link to another place has its own scheduler.
    DiffiTPipeline(tiny_unet(), DDPMScheduler(beta_end=0.015)).save_pretrained(tmp_path / "other")
    shutil.rmtree(tmp_path / "other/unet")
    (tmp_path / "other/unet").symlink_to(tmp_path / "own/unet")
    assert read_pretrained_scheduler(str(tmp_path / "other/unet"))["beta_end"] == 0.015


@pytest.mark.parametrize("index", ["[]", "{", '{"id2label": {"0": 1}}', '{"unet": 3}'])
def test_damaged_index_of_a_pipeline_leaves_the_classes_without_names(index, tmp_path):
    DiffiTPipeline(tiny_unet(num_class_embeds=1), DDPMScheduler(), {"0": "cat"}).save_pretrained(tmp_path)
    assert read_class_names(str(tmp_path)) == ("cat",)
    (tmp_path / "model_index.json").write_text(index)
    assert read_class_names(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"])
def test_file_in_place_of_a_folder_is_refused(name, tmp_path):
    DiffiTPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=mentions(f"--pretrained_model_name_or_path {tmp_path / name}", "folder")):
        read_model_config(ModelConfig(pretrained_model_name_or_path=str(tmp_path / name)))


def test_network_that_belongs_to_no_pipeline_has_no_scheduler_and_that_is_said(tmp_path, caplog):
    PartialState()  # for the log
    DiffiTPipeline(tiny_unet(), EDMEulerScheduler()).save_pretrained(tmp_path)
    tiny_unet().save_pretrained(tmp_path / "unet_other")
    assert read_pretrained_scheduler(str(tmp_path / "unet_other")) == {}
    assert mentions(tmp_path / "unet_other", "scheduler").search(caplog.text)


def test_damaged_scheduler_is_refused(tmp_path):
    DiffiTPipeline(tiny_unet(), DDPMScheduler()).save_pretrained(tmp_path)
    (tmp_path / "scheduler/scheduler_config.json").write_text("{")
    with pytest.raises(UserError, match=mentions(f"--pretrained_model_name_or_path {tmp_path}", "scheduler")):
        read_pretrained_scheduler(str(tmp_path))


def test_checkpoint_gives_the_average_that_an_evaluation_takes_and_says_so(train_args, tmp_path, caplog):
    train([*train_args, "--max_train_steps=2", "--ema_half_life_kimg", "0.01", "0.02"])
    checkpoint = tmp_path / "run/checkpoint-2"
    for path, folder in ((checkpoint, "unet_ema_0.01kimg"), (checkpoint / "unet", "unet")):
        config = read_model_config(ModelConfig(pretrained_model_name_or_path=str(path)))
        model = build_model(config, str(path))
        expected = load_file(checkpoint / folder / "diffusion_pytorch_model.safetensors")
        torch.testing.assert_close(model.state_dict(), expected, rtol=0, atol=0)
    assert mentions(checkpoint, "unet_ema_0.01kimg").search(caplog.text)


@pytest.mark.parametrize("path", ["", "unet_ema"])
def test_damaged_weights_of_a_checkpoint_are_refused(path, train_args, tmp_path):
    """Two bytes change places, which safetensors reads without a word."""
    train([*train_args, "--max_train_steps=1"])
    checkpoint = tmp_path / "run/checkpoint-1"
    file = checkpoint / "unet_ema/diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-2:] = data[:-3:-1]
    file.write_bytes(data)
    arguments = [flag for flag in train_args if not flag.startswith(("--model_config", "--output_dir"))]
    arguments += [f"--pretrained_model_name_or_path={checkpoint / path}", f"--output_dir={tmp_path / 'tuned'}"]
    with pytest.raises(UserError, match=mentions("--pretrained_model_name_or_path", file, "manifest.json")):
        train(arguments)
    with pytest.raises(UserError, match=mentions("--model_path", file, "manifest.json")):
        sample(checkpoint, tmp_path / "samples", "--seeds=0")


def test_weights_that_are_not_finite_are_refused(tmp_path):
    network = tiny_unet()
    with torch.no_grad():
        network.conv_out.bias[1] = torch.nan
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=mentions(f"--pretrained_model_name_or_path {tmp_path}", 1, "conv_out.bias")):
        build_model(read_model_config(ModelConfig(pretrained_model_name_or_path=str(tmp_path))), str(tmp_path))


def test_weights_of_other_latents_are_reported(tmp_path, caplog):
    PartialState()  # for the log
    for name, vae in (("latents", tiny_vae(latent_channels=4)), ("pixels", None)):
        network = {"unet": tiny_unet(), "transformer": None}
        if vae is not None:
            network = {"unet": None, "transformer": tiny_dit()}
        DiffiTPipeline(scheduler=DDPMScheduler(), vae=vae, **network).save_pretrained(tmp_path / name)
    latents, pixels = str(tmp_path / "latents/transformer"), str(tmp_path / "pixels")
    warn_of_other_latents(latents, tiny_vae(latent_channels=4))
    warn_of_other_latents(pixels, None)
    assert caplog.text == ""
    warn_of_other_latents(latents, tiny_vae(latent_channels=4, shift_factor=0.25))
    assert mentions(latents, "shift_factor 0.0", 0.25, "--vae_model_name_or_path").search(caplog.text)
    warn_of_other_latents(latents, None)
    assert mentions(latents, "trained in latent space", "pixel space").search(caplog.text)
    warn_of_other_latents(pixels, tiny_vae(latent_channels=4))
    assert mentions(pixels, "trained in pixel space", "latent space").search(caplog.text)
    (tmp_path / "latents/vae/diffusion_pytorch_model.safetensors").unlink()
    warn_of_other_latents(latents, tiny_vae(latent_channels=4))
    assert mentions(latents, "VAE", "not known").search(caplog.text)


def test_learned_variance_is_dropped_or_added_without_changing_what_is_predicted():
    def network(out_channels: int) -> DiffiTTransformer2DModel:
        torch.manual_seed(out_channels)
        model = DiffiTTransformer2DModel(2, 8, num_layers=1, in_channels=4, out_channels=out_channels, sample_size=8)
        torch.nn.init.normal_(model.proj_out.weight)
        torch.nn.init.normal_(model.proj_out.bias)
        return model.eval()

    sample, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    for old, new, words in ((8, 4, "dropped"), (4, 8, "added")):
        source, target = network(old), network(new)
        with torch.no_grad():
            expected = source(sample, timestep).sample
            weights, changes = adapt_weights(source, target)
            target.load_state_dict(weights)
            adapted = target(sample, timestep).sample
        torch.testing.assert_close(adapted[:, :4], expected[:, :4], rtol=1e-5, atol=1e-5)
        assert new == 4 or not adapted[:, 4:].any()
        assert len(changes) == 1 and words in changes[0]


def finetuned(train_args, source: Path, data: Path, output_dir: Path, *flags: str) -> dict[str, torch.Tensor]:
    """Weights after fine-tuning at a learning rate of 0, so that they are the initial ones."""
    arguments = [flag for flag in train_args if not flag.startswith("--model_config")]
    arguments += [f"--pretrained_model_name_or_path={source}", f"--train_data_dir={data}", "--learning_rate=0"]
    arguments += ["--seed=1"]  # another initialization than that of the source
    train([*arguments, "--max_train_steps=1", f"--output_dir={output_dir}", *flags])
    return load_file(output_dir / "checkpoint-1/unet/diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("source", ["run", "run/unet", "run/checkpoint-1"])
def test_as_many_but_other_classes_start_anew_and_that_is_said(source, train_args, image_folder, tmp_path, caplog):
    train([*train_args, "--max_train_steps=1"])
    name = "class_embedding.weight"
    rows = load_file(tmp_path / "run/unet/diffusion_pytorch_model.safetensors")[name]

    same = finetuned(train_args, tmp_path / source, image_folder, tmp_path / "same")[name]
    assert torch.equal(same, rows) and "class embeddings" not in caplog.text

    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data/blue").rename(tmp_path / "data/black")
    other = finetuned(train_args, tmp_path / source, tmp_path / "data", tmp_path / "other")[name]
    assert torch.equal(other[-1], rows[-1]) and not (other[:-1] == rows[:-1]).all(dim=1).any()
    assert mentions("3 class embeddings", "'black'", "'blue'", "--no-reset_class_embeddings").search(caplog.text)

    kept = finetuned(
        train_args, tmp_path / source, tmp_path / "data", tmp_path / "kept", "--no-reset_class_embeddings"
    )[name]
    assert torch.equal(kept, rows)


def test_same_classes_in_another_order_keep_their_embeddings():
    source, target = tiny_unet(num_class_embeds=3), tiny_unet(num_class_embeds=3)
    rows = source.class_embedding.weight.detach()
    weights, changes = adapt_weights(source, target, class_names=(("a", "b", "c"), ("c", "a", "b")))
    assert torch.equal(weights["class_embedding.weight"], rows[[2, 0, 1, 3]])
    assert len(changes) == 1 and "order" in changes[0]


@pytest.mark.parametrize(
    ("flags", "needed"),
    [
        (
            ["--model_config=a", "--class_conditional", "--no-reset_class_embeddings"],
            "--pretrained_model_name_or_path",
        ),
        (["--pretrained_model_name_or_path=a", "--reset_class_embeddings"], "--class_conditional"),
    ],
)
def test_reset_of_class_embeddings_that_would_be_ignored_is_refused(flags, needed, capsys):
    line = refusal([*flags, "--train_data_dir=a", "--max_train_steps=1"], capsys)
    assert mentions("--reset_class_embeddings", needed).search(line)


def test_classes_without_names_are_kept_and_that_is_said():
    source, target = tiny_unet(num_class_embeds=3), tiny_unet(num_class_embeds=3)
    weights, changes = adapt_weights(source, target, class_names=(None, ("a", "b", "c")))
    assert torch.equal(weights["class_embedding.weight"], source.class_embedding.weight)
    assert mentions("3 class embeddings", "--reset_class_embeddings").search(changes[0])


def test_missing_weights_are_named(tmp_path):
    tiny_unet().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match=mentions(f"--pretrained_model_name_or_path {tmp_path}", "conv_in.weight")):
        build_model(read_model_config(ModelConfig(pretrained_model_name_or_path=str(tmp_path))), str(tmp_path))
