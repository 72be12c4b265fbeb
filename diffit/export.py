# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The pipeline folder: weights, model card and upload."""

import glob
import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
import yaml
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, ModelMixin, SchedulerMixin
from huggingface_hub import HfApi, ModelCard, ModelCardData

from diffit.config import EmaConfig, HubConfig, MetricsConfig
from diffit.errors import RunError, UserError
from diffit.optimization import TrainingState
from diffit.plan import Plan
from diffit.run_dir import PIPELINE_FILES, PIPELINE_FOLDERS, OutputFolder
from diffit_pipeline import DiffiTPipeline, component_name

logger = get_logger(__name__, log_level="INFO")


def build_pipeline(
    model: ModelMixin,
    vae: AutoencoderKL | None,
    scheduler: SchedulerMixin,
    id2label: dict[str, str] | None = None,
) -> DiffiTPipeline:
    """Builds the `DiffiTPipeline` used for previews and for export.

    Unconditional pixel-space DDPM runs export a plain `DDPMPipeline` instead.
    """
    return DiffiTPipeline(
        scheduler=scheduler, id2label=id2label, vae=vae, **{"unet": None, component_name(model): model}
    )


@dataclass(frozen=True)
class RunFacts:
    """What a pipeline folder tells about its run, besides the weights.

    Attributes:
        name: of the model in its card: that on the hub, or that of its folder.
        data_source: name of the training data in words.
        flags: of the run, as a config file holds them.
        plan: of the run.
        ema: which averages there are.
        metrics: how samples are evaluated.
    """

    name: str
    data_source: str
    flags: dict[str, Any]
    plan: Plan
    ema: EmaConfig
    metrics: MetricsConfig

    @property
    def dataset_name(self) -> str | None:
        """--dataset_name, or None for images from files."""
        return self.flags.get("dataset_name")


def save_pipeline(
    facts: RunFacts,
    run_dir: OutputFolder,
    state: TrainingState,
    vae: AutoencoderKL | None,
    average: str,
    validation: dict[str, float],
    grid: PIL.Image.Image,
    target: str = "",
) -> None:
    """Writes a pipeline folder: weights as they are now, scheduler, flags, model card.

    It replaces the earlier one; a file that someone has changed since, such as the model card, stays.

    Args:
        facts: of the run.
        run_dir: the folder of the run.
        state: holds the network.
        vae: of a latent-space model, or None.
        average: name of the average whose weights the network holds now, or "".
        validation: its held-out losses and metrics, so far as there are any.
        grid: its preview.
        target: folder inside that of the run, or "" for that folder itself.
    """
    folder = run_dir.folder / "tmp-pipeline"
    run_dir.remove(["tmp-pipeline/"])
    run_dir.announce(["tmp-pipeline/"])
    plan, scheduler = facts.plan, facts.plan.formulation.scheduler
    is_plain = plan.class_names is None and component_name(state.model) == "unet"
    if is_plain and isinstance(scheduler, DDPMScheduler):
        DDPMPipeline(state.model, scheduler).save_pretrained(folder)
    else:
        id2label = {str(number): name for number, name in enumerate(plan.class_names or ())} or None
        build_pipeline(state.model, vae, scheduler, id2label).save_pretrained(folder)
    (folder / "training_args.yaml").write_text(yaml.safe_dump(facts.flags))
    grid.save(folder / "sample_grid.png")
    model_card(facts, state, average, validation).save(folder / "README.md")
    kept = run_dir.publish(folder, target, earlier=pipeline_files(run_dir, target))
    if kept:
        logger.warning(f"changed since they were written, so left as they are: {', '.join(kept)} in {run_dir.folder}")


def pipeline_files(run_dir: OutputFolder, target: str = "") -> list[str]:
    """Names of the files of the pipeline that a run wrote into its folder, or into a folder in it."""
    prefix = f"{target}/" if target else ""
    inner = {name: name.removeprefix(prefix) for name in run_dir.files if name.startswith(prefix)}
    return [name for name, part in inner.items() if part in PIPELINE_FILES or part.split("/")[0] in PIPELINE_FOLDERS]


def model_card(facts: RunFacts, state: TrainingState, average: str, validation: dict[str, float]) -> ModelCard:
    """Fills in the template `model_card.md`: how the model was trained, and how to load it.

    For the arguments see `save_pipeline`. The hub renders the template with Jinja2, which torch installs.
    """
    plan = facts.plan
    names, steps = plan.class_names, plan.formulation.num_sampling_steps
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "diffit", "unconditional" if names is None else "class-conditional"],
        datasets=[facts.dataset_name] if facts.dataset_name and not Path(facts.dataset_name).exists() else None,
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md")),
        name=facts.name,
        quoted_name=json.dumps(facts.name),
        rows=list(card_rows(facts, state, average, validation)),
        class_names=names,
        quoted_class=None if names is None else repr(names[0]),
        num_inference_steps=steps if names is None else min(50, steps),
    )


def card_rows(
    facts: RunFacts, state: TrainingState, average: str, validation: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """The table of a model card."""
    plan = facts.plan
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    # A path of the training machine is of no use to others, so only its last part is told.
    source = facts.dataset_name or Path(facts.data_source).name
    yield "network", f"`{type(state.model).__name__}`, {num_parameters / 1e6:.1f} M parameters"
    yield "data", f"{source}, {plan.num_images:,} images, {'x'.join(map(str, plan.resolution))} pixels"
    yield "optimizer steps", f"{state.global_step:,} of {plan.max_train_steps:,}, {plan.batch.total} images each"
    yield "images seen", f"{state.position:,}"
    yield "objective", plan.formulation.describe()
    yield "weights", describe_average(facts.ema, average, validation)
    if "validation/loss" in validation:
        yield "held-out loss", f"{validation['validation/loss']:.4f}"
    measured_with = f"({facts.metrics.feature_extractor}, {facts.metrics.eval_num_images:,} images)"
    for key, value in validation.items():
        if key.startswith("eval/"):
            yield key.removeprefix("eval/").replace("_", " "), f"{value:.4g} {measured_with}"


def describe_average(ema: EmaConfig, average: str, validation: dict[str, float]) -> str:
    """The weights of a pipeline folder in words: which average they are, and how it was selected."""
    if not ema.use_ema:
        return "as trained, no EMA"
    if ema.ema_half_life_kimg is None:
        return f"EMA, decay up to {ema.ema_max_decay}"
    half_life = average.removeprefix("ema_").removesuffix("kimg")
    text = f"EMA with a half-life of {half_life} kimg (thousand images)"
    widths = ", ".join(f"{kimg:g}" for kimg in ema.ema_half_life_kimg)
    if len(ema.ema_half_life_kimg) == 1:
        return text
    if not validation:
        return f"{text}, the first of {widths}"
    criterion = next((key.removeprefix("eval/") for key in validation if key.startswith("eval/")), "held-out loss")
    return f"{text}, selected by {criterion.replace('_', ' ')} among {widths}"


def pipeline_name(hub_model_id: str | None, output_dir: str) -> str:
    """What the model card calls the model: its name on the hub, or that of its folder."""
    return hub_model_id or Path(output_dir).resolve().name


def push_to_hub(hub: HubConfig, run_dir: OutputFolder) -> None:
    """Uploads the files of the pipeline, and nothing else of --output_dir.

    Raises:
        RunError: says how to upload by hand, if it failed, or if the repository exists and is public although
            --hub_private_repo is given.
    """
    api = HfApi(token=hub.hub_token)
    folder = str(run_dir.folder)
    name = repo_id = pipeline_name(hub.hub_model_id, folder)
    patterns = [*PIPELINE_FILES, "unet/*", "transformer/*", "vae/*", "scheduler/*"]
    try:
        repo_id = api.create_repo(repo_id, private=hub.hub_private_repo, exist_ok=True).repo_id
        if hub.hub_private_repo and not api.model_info(repo_id).private:
            raise UserError(f"--hub_private_repo: {repo_id} exists already and is public")
        if repo_id != name and run_dir.is_unchanged("README.md"):  # the user's own name comes before that of the model
            card = Path(folder, "README.md").read_text(encoding="utf-8")
            card = card.replace(f"\n# {name}\n", f"\n# {repo_id}\n")
            card = card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
            run_dir.write("README.md", lambda file: file.write_text(card, encoding="utf-8"))
        files = [glob.escape(file) for file in pipeline_files(run_dir)]
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload DiffiT")
    except Exception as error:  # of the network, of the hub, of files: the training is over and must not look lost
        private = " --private" if hub.hub_private_repo else ""
        included = " ".join(f"--include '{pattern}'" for pattern in patterns)
        raise RunError(
            f"the trained pipeline is safe in {folder}, but could not be uploaded to {repo_id}: {error}. "
            f"To upload it by hand: hf upload{private} {repo_id} {shlex.quote(folder)} . {included}"
        ) from None
