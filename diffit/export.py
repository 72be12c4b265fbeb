# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""Exporting the trained pipeline: its folder, its model card, and the upload to the hub."""

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
from diffusers import DDPMPipeline, DDPMScheduler, ModelMixin, SchedulerMixin
from huggingface_hub import HfApi, ModelCard, ModelCardData

from diffit.config import EmaConfig, HubConfig, MetricsConfig
from diffit.errors import RunError, UserError
from diffit.optimization import TrainingState
from diffit.plan import Plan
from diffit.run_dir import PIPELINE_FILES, PIPELINE_FOLDERS, OutputFolder
from diffit_pipeline import Autoencoder, DiffiTPipeline, component_name

logger = get_logger(__name__, log_level="INFO")


def build_pipeline(
    model: ModelMixin,
    vae: Autoencoder | None,
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
    """Facts about a run that its pipeline folder records.

    Attributes:
        name: name of the model in its card (see `pipeline_name`).
        data_source: name of the training data in messages.
        flags: the run's flags in the form of a config file.
        plan: the run's plan.
        ema: the flags of the averages.
        metrics: the flags of metrics.
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
    vae: Autoencoder | None,
    average: str,
    validation: dict[str, float],
    grid: PIL.Image.Image | None,
    target: str = "",
) -> None:
    """Writes a pipeline folder: the network's current weights, scheduler, flags, preview and model card.

    It replaces the earlier one, except for files that the user has edited, such as the model card.

    Args:
        facts: facts about the run.
        run_dir: the run's folder.
        state: holds the network.
        vae: a latent-space model's VAE, or None.
        average: name of the average whose weights the network currently holds, or "" without EMA.
        validation: held-out losses and metrics of these weights, if there are any.
        grid: preview grid of these weights, or None if they cannot be sampled.
        target: name of a folder inside the run's folder, or "" for the run's folder itself.
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
    if grid is not None:
        grid.save(folder / "sample_grid.png")
    model_card(facts, state, average, validation, has_preview=grid is not None).save(folder / "README.md")
    kept = run_dir.publish(folder, target, earlier=pipeline_files(run_dir, target))
    if kept:
        logger.warning(f"not overwritten because they were edited: {', '.join(kept)} in {run_dir.folder}")


def pipeline_files(run_dir: OutputFolder, target: str = "") -> list[str]:
    """Names of the pipeline's files that a run wrote into its folder, or into the folder `target` inside it."""
    prefix = f"{target}/" if target else ""
    inner = {name: name.removeprefix(prefix) for name in run_dir.files if name.startswith(prefix)}
    return [name for name, part in inner.items() if part in PIPELINE_FILES or part.split("/")[0] in PIPELINE_FOLDERS]


def model_card(
    facts: RunFacts, state: TrainingState, average: str, validation: dict[str, float], has_preview: bool = True
) -> ModelCard:
    """Renders the template `model_card.md`, which says how the model was trained and how to load it.

    For the arguments see `save_pipeline`. huggingface_hub renders it with Jinja2, a dependency of torch.
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
        has_preview=has_preview,
    )


def card_rows(
    facts: RunFacts, state: TrainingState, average: str, validation: dict[str, float]
) -> Iterator[tuple[str, str]]:
    """The rows of the model card's table."""
    plan = facts.plan
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    # A path on the training machine means nothing to others, so only its last part is published.
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
    """Describes a pipeline folder's weights: which average they are, and how it was selected."""
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
    """The model's name in its card: its name on the hub, or otherwise the name of its folder."""
    return hub_model_id or Path(output_dir).resolve().name


def push_to_hub(hub: HubConfig, run_dir: OutputFolder) -> None:
    """Uploads the pipeline's files, and nothing else in --output_dir.

    Raises:
        RunError: if it failed, or if --hub_private_repo is given but the repository exists and is public. The message
            says how to upload manually.
    """
    api = HfApi(token=hub.hub_token)
    folder = str(run_dir.folder)
    name = repo_id = pipeline_name(hub.hub_model_id, folder)
    patterns = [*PIPELINE_FILES, "unet/*", "transformer/*", "vae/*", "scheduler/*"]
    try:
        repo_id = api.create_repo(repo_id, private=hub.hub_private_repo, exist_ok=True).repo_id
        if hub.hub_private_repo and not api.model_info(repo_id).private:
            raise UserError(f"--hub_private_repo: {repo_id} already exists and is public")
        if repo_id != name and run_dir.is_unchanged("README.md"):  # the hub has prepended the user's own name
            card = Path(folder, "README.md").read_text(encoding="utf-8")
            card = card.replace(f"\n# {name}\n", f"\n# {repo_id}\n")
            card = card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
            run_dir.write("README.md", lambda file: file.write_text(card, encoding="utf-8"))
        files = [glob.escape(file) for file in pipeline_files(run_dir)]
        api.upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=files, commit_message="Upload DiffiT")
    except Exception as error:  # whatever failed: the message must say that the trained pipeline is not lost
        private = " --private" if hub.hub_private_repo else ""
        included = " ".join(f"--include '{pattern}'" for pattern in patterns)
        raise RunError(
            f"the trained pipeline is safe in {folder}, but could not be uploaded to {repo_id}: {error}. "
            f"To upload it manually: hf upload{private} {repo_id} {shlex.quote(folder)} . {included}"
        ) from None
