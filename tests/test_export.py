"""The model card of different runs."""

import ast
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

from diffit.config import EmaConfig, MetricsConfig
from diffit.export import RunFacts, model_card

AWKWARD = ("it's {{ 7 * 7 }}", '"red", <b>')  # what a template or a quoted string might trip over


def card_of(class_names: tuple[str, ...] | None, dataset_name: str | None = None, has_preview: bool = True) -> str:
    formulation = SimpleNamespace(num_sampling_steps=1000, describe=lambda: "v_prediction")
    batch = SimpleNamespace(total=4)
    plan = SimpleNamespace(
        **{"class_names": class_names, "formulation": formulation, "num_images": 1797, "resolution": (8, 16)},
        **{"max_train_steps": 6, "batch": batch},
    )
    facts = RunFacts("me/it's", "/home/me/digits", {"dataset_name": dataset_name}, plan, EmaConfig(), MetricsConfig())
    state = SimpleNamespace(model=torch.nn.Linear(2, 2), global_step=4, position=16)
    values = {"validation/loss": 0.1, "eval/frechet_distance": 3.25}
    return str(model_card(facts, state, "ema", values, has_preview))


@pytest.mark.parametrize("class_names", [None, ("blue", "red"), AWKWARD])
def test_code_of_the_card_loads_the_model_and_samples_its_first_class(class_names):
    (code,) = re.findall(r"```python\n(.*?)```", card_of(class_names), re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    sampling, loading = sorted(calls, key=lambda call: bool(call.args))
    assert ast.literal_eval(loading.args[0]) == "me/it's"
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in sampling.keywords}
    if class_names is None:
        assert keywords == {"batch_size": "4", "num_inference_steps": "1000"}
    else:
        assert keywords == {"class_labels": f"[{class_names[0]!r}] * 4", "num_inference_steps": "50"}


def test_card_has_one_title_and_a_whole_table():
    card = card_of(AWKWARD)
    assert re.findall(r"^# .*", card, re.MULTILINE) == ["# me/it's"]
    assert '\nClasses: it\'s {{ 7 * 7 }}, "red", <b>.\n' in card
    rows = re.search(r"\n\| \| \|\n\|---\|---\|\n((?:\| .* \| .* \|\n)+)\n", card)[1].splitlines()
    assert [row.split(" | ")[0] for row in rows] == [
        *("| network", "| data", "| optimizer steps", "| images seen", "| objective", "| weights"),
        *("| held-out loss", "| frechet distance"),
    ]
    assert rows[1] == "| data | digits, 1,797 images, 8x16 pixels |"  # no path of the training machine


@pytest.mark.parametrize("class_names", [None, ("blue", "red")])
def test_card_shows_the_preview_if_there_is_one(class_names):
    shown = "![Samples for seeds 0, 1, 2, ...](sample_grid.png)\n\n"
    assert card_of(class_names).replace(shown, "", 1) == card_of(class_names, has_preview=False)
    assert shown in card_of(class_names)


def test_long_lists_of_classes_are_cut_off():
    card = card_of(tuple(f"class{i}" for i in range(51)))
    assert "class49, ... (51 in total).\n" in card and "class50" not in card
    assert "class-conditional" in card and "unconditional image diffusion" not in card


@pytest.mark.parametrize("dataset_name", [None, "me/pictures"])
def test_card_header_names_a_hub_data_set(dataset_name):
    header = yaml.safe_load(card_of(None, dataset_name).split("---")[1])
    assert header["library_name"] == "diffusers" and "unconditional" in header["tags"]
    assert header.get("datasets") == (dataset_name and [dataset_name])
