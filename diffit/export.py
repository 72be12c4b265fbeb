# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The pipeline folder: its weights, model card and upload."""

import argparse
import glob
import json
import shlex
from pathlib import Path

import PIL.Image
import yaml
from accelerate.logging import get_logger
from diffusers import AutoencoderKL, DDPMPipeline, ModelMixin, SchedulerMixin
from huggingface_hub import HfApi, ModelCard, ModelCardData

from diffit.config import args_to_config
from diffit.errors import RunError, UserError
from diffit.formulations import NoiseScheduler
from diffit.optimization import TrainingState
from diffit.run_dir import PIPELINE_FILES, PIPELINE_FOLDERS, OutputFolder
from diffit.sources import Table
from diffit_pipeline import DiffiTPipeline, component_name

logger = get_logger(__name__, log_level="INFO")


def build_pipeline(
    model: ModelMixin,
    vae: AutoencoderKL | None,
    scheduler: SchedulerMixin,
    id2label: dict[str, str] | None = None,
) -> DiffiTPipeline:
    """What draws previews, and what all runs save but unconditional ones of DDPM in pixels."""
    return DiffiTPipeline(
        scheduler=scheduler, id2label=id2label, vae=vae, **{"unet": None, component_name(model): model}
    )


def save_pipeline(
    args: argparse.Namespace,
    state: TrainingState,
    vae: AutoencoderKL | None,
    noise_scheduler: NoiseScheduler,
    table: Table,
    average: str,
    validation: dict[str, float],
    grid: PIL.Image.Image,
    run_dir: OutputFolder,
    target: str = "",
) -> None:
    """Writes a pipeline folder: weights as they are now, scheduler, arguments, model card.

    It replaces the one that was there; a file that someone has changed since, such as the model card, stays.

    Args:
        average: name of the average whose weights they are, or "".
        validation: its held-out losses and metrics, as far as there are any.
        grid: its preview.
        run_dir: the folder of the run.
        target: folder in it, or "" for itself.
    """
    folder = run_dir.folder / "tmp-pipeline"
    run_dir.remove(["tmp-pipeline/"])
    run_dir.announce(["tmp-pipeline/"])
    if args.class_conditional or component_name(state.model) == "transformer" or args.formulation == "edm":
        names = table.class_names if args.class_conditional else ()
        id2label = {str(number): name for number, name in enumerate(names)} or None
        build_pipeline(state.model, vae, noise_scheduler, id2label).save_pretrained(folder)
    else:
        DDPMPipeline(state.model, noise_scheduler).save_pretrained(folder)
    (folder / "training_args.yaml").write_text(yaml.safe_dump(args_to_config(args)))
    grid.save(folder / "sample_grid.png")
    model_card(args, state, table, average, validation).save(folder / "README.md")
    kept = run_dir.publish(folder, target, earlier=pipeline_files(run_dir, target))
    if kept:
        logger.warning(f"changed since they were written, so left as they are: {', '.join(kept)} in {run_dir.folder}")


def pipeline_files(run_dir: OutputFolder, target: str = "") -> list[str]:
    """Names of the files of the pipeline that a run wrote into its folder, or into a folder in it."""
    prefix = f"{target}/" if target else ""
    inner = {name: name.removeprefix(prefix) for name in run_dir.files if name.startswith(prefix)}
    return [name for name, part in inner.items() if part in PIPELINE_FILES or part.split("/")[0] in PIPELINE_FOLDERS]


def model_card(
    args: argparse.Namespace, state: TrainingState, table: Table, average: str, validation: dict[str, float]
) -> ModelCard:
    """What was trained on what, and how to load it."""
    model_name = pipeline_name(args)
    # A path of the machine that trained is of no use to others, so only its last part is told.
    source = args.dataset_name or Path(table.source).name
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        tags=["diffusers", "diffit", "class-conditional" if args.class_conditional else "unconditional"],
        datasets=[args.dataset_name] if args.dataset_name and not Path(args.dataset_name).exists() else None,
    )
    num_parameters = sum(parameter.numel() for parameter in state.model.parameters())
    objective = f"{args.prediction_type}, {args.beta_schedule} betas, {args.num_train_timesteps} timesteps"
    if args.formulation == "edm":
        objective = f"EDM, ln sigma of mean {args.sigma_mean} and standard deviation {args.sigma_std}"
    weights = f"EMA, decay up to {args.ema_max_decay}" if args.use_ema else "as trained, no EMA"
    if args.ema_half_life_kimg is not None:
        widths = ", ".join(f"{kimg:g}" for kimg in args.ema_half_life_kimg)
        criterion = next((key.removeprefix("eval/") for key in validation if key.startswith("eval/")), "held-out loss")
        chosen = f"the best by {criterion.replace('_', ' ')}" if validation else "the first"
        weights = f"`{average}`: EMA over a half-life counted in images (kimg), {chosen} of {widths}"
    classes = ""
    steps = 18 if args.formulation == "edm" else args.num_train_timesteps
    call = f"pipeline(batch_size=4, num_inference_steps={steps}).images"
    if args.class_conditional:
        classes = f"\nClasses: {', '.join(table.class_names[:50])}{', ...' if len(table.class_names) > 50 else ''}.\n"
        call = f"pipeline(class_labels=[{table.class_names[0]!r}] * 4, num_inference_steps={min(50, steps)}).images"
    rows = {
        "network": f"`{type(state.model).__name__}`, {num_parameters / 1e6:.1f} M parameters",
        "data": f"{source}, {len(table):,} images, {'x'.join(map(str, args.resolution))} pixels",
        "optimizer steps": f"{state.global_step:,} of {args.max_train_steps:,}, {args.global_batch_size} images each",
        "images seen": f"{state.position:,}",
        "objective": objective,
        "weights": weights,
    }
    if "validation/loss" in validation:
        rows["held-out loss"] = f"{validation['validation/loss']:.4f}"
    for key, value in validation.items():
        if key.startswith("eval/"):
            rows[key.removeprefix("eval/").replace("_", " ")] = (
                f"{value:.4g} ({args.feature_extractor}, {args.eval_num_images:,} images)"
            )
    table_text = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return ModelCard(f"""---
{data.to_yaml()}
---

# {model_name}

A diffusion model in the form of DiffiT ([arXiv 2312.02139](https://arxiv.org/abs/2312.02139)), trained with DiffiT
for diffusers. All arguments: `training_args.yaml`.

| | |
|---|---|
{table_text}
{classes}
![Samples of the seeds 0, 1, 2, ...](sample_grid.png)

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained({json.dumps(model_name)}, trust_remote_code=True)
images = {call}
```
""")


def pipeline_name(args: argparse.Namespace) -> str:
    """What the model card calls the model: its name on the hub, or that of its folder."""
    return args.hub_model_id or Path(args.output_dir).resolve().name


def push_to_hub(args: argparse.Namespace, run_dir: OutputFolder) -> None:
    """Uploads the files of the pipeline, and nothing else of --output_dir.

    Raises:
        RunError: says how to upload by hand, if it failed, or if the repository exists and is public although
            --hub_private_repo is given.
    """
    api = HfApi(token=args.hub_token)
    name = repo_id = pipeline_name(args)
    patterns = [*PIPELINE_FILES, "unet/*", "transformer/*", "vae/*", "scheduler/*"]
    try:
        repo_id = api.create_repo(repo_id, private=args.hub_private_repo, exist_ok=True).repo_id
        if args.hub_private_repo and not api.model_info(repo_id).private:
            raise UserError(f"--hub_private_repo: {repo_id} exists already and is public")
        if repo_id != name and run_dir.is_unchanged("README.md"):  # the user's own name comes before that of the model
            card = Path(args.output_dir, "README.md").read_text(encoding="utf-8")
            card = card.replace(f"\n# {name}\n", f"\n# {repo_id}\n")
            card = card.replace(f'from_pretrained("{name}"', f'from_pretrained("{repo_id}"')
            run_dir.write("README.md", lambda file: file.write_text(card, encoding="utf-8"))
        files = [glob.escape(file) for file in pipeline_files(run_dir)]
        api.upload_folder(
            repo_id=repo_id, folder_path=args.output_dir, allow_patterns=files, commit_message="Upload DiffiT"
        )
    except Exception as error:  # of the network, of the hub, of files: the training is over and must not look lost
        private = " --private" if args.hub_private_repo else ""
        included = " ".join(f"--include '{pattern}'" for pattern in patterns)
        raise RunError(
            f"the trained pipeline is safe in {args.output_dir}, but could not be uploaded to {repo_id}: {error}. "
            f"To upload it by hand: hf upload{private} {repo_id} {shlex.quote(args.output_dir)} . {included}"
        ) from None
