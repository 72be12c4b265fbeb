"""Sample quality of DiffiT and of diffusers' UNet against training FLOPs and minutes, on two CPU cores.

    python -m benchmarks.quality tune      # learning rates, EMA half-lives and recipes, one seed
    python -m benchmarks.quality prove     # three seeds with the tuned settings

The project's own scripts train and evaluate everything, one run per core at a time; only the loop of diffusers'
`train_unconditional.py` is in `benchmarks/train_unconditional.py`. Jobs whose results are in `--work_dir` are skipped,
so an interrupted benchmark resumes. The results are written to `benchmarks/results/quality*.json`, from which
`benchmarks/quality_report.py` writes the report.
"""

import argparse
import dataclasses
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset, load_dataset
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch.nn import functional as F
from torch.utils.benchmark import Timer

from diffit.config import parse_args
from diffit.cpu_kernels import kernelize
from diffit.networks import model_class, training_flops_per_image
from diffit.optimization import HalfLifeEMA, build_optimizer
from diffit.sampling import load_pipeline
from diffit.sampling_config import SamplingConfig
from diffit_pipeline import EDM_SCHEDULERS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
SEEDS = (0, 1, 2)
BATCH_SIZE = 32
STEPS = 25  # of DDIM
TUNING_SEED = 100
WIDTHS = (0.5, 2, 6)  # half-lives of the averages that are compared in tuning, in kimg
RAMP_UP = 0.2  # and at most this share of the images seen


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def diffit(size: int, channels: int, widths: list[int]) -> dict:
    """Config of a DiffiT with one ResBlock per resolution."""
    return {
        "_class_name": "DiffiTUNet2DModel",
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "window_size": 4,
        "num_attention_heads": 4,
        "norm_num_groups": 8,
        "num_class_embeds": None,
    }


def unet(size: int, channels: int, widths: list[int], groups: int) -> dict:
    """Config of a `UNet2DModel` with one residual block per resolution, and attention at the lowest."""
    lower = len(widths) - 1
    return {
        "_class_name": "UNet2DModel",
        "sample_size": size,
        "in_channels": channels,
        "out_channels": channels,
        "block_out_channels": widths,
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D"] * lower + ["AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D"] + ["UpBlock2D"] * lower,
        "attention_head_dim": 8,
        "norm_num_groups": groups,
        "num_class_embeds": None,
    }


@dataclass(frozen=True)
class Task:
    """A data set, two networks with the same FLOPs, and the lengths of their trainings.

    Attributes:
        file: file name in data/.
        networks: maps names to model configs.
        budgets: thousands of training images after which the samples are evaluated.
        tuning_budget: thousands of training images after which the samples are evaluated while tuning.
    """

    file: str
    networks: dict[str, dict]
    budgets: tuple[int, ...]
    tuning_budget: int


TASKS = {
    "emoji": Task(
        "noto_emoji_32.parquet",
        {"diffit": diffit(16, 3, [32, 64, 96]), "unet": unet(16, 3, [24, 48, 72], 8)},
        (8, 16, 24, 32),
        20,
    ),
    "digits": Task(
        "digits.parquet",
        {"diffit": diffit(8, 1, [32, 64]), "unet": unet(8, 1, [20, 40], 4)},
        (8, 16, 32, 48),
        40,
    ),
}
PEER = "train_unconditional"
RECIPE = {  # as in configs/train/emoji32.yaml and quickstart.yaml, except for the learning-rate schedule
    "prediction_type": "v_prediction",
    "beta_schedule": "squaredcos_cap_v2",
    "snr_gamma": 5,
    "adam_beta2": 0.99,
    "lr_scheduler": "constant_with_warmup",
    "lr_warmup_steps": 100,
}
MUON_RECIPE = RECIPE | {"optimizer": "muon"}


@dataclass(frozen=True)
class Run:
    """One training and its evaluations.

    Attributes:
        task: key in TASKS.
        side: name of the side in the report.
        network: key in the task's networks.
        learning_rate: constant or peak learning rate.
        seed: seed of the training.
        kimg: length of the training in thousands of images.
        budgets: thousands of training images after which the samples are evaluated.
        recipe: flags of train_diffit.py, or PEER.
        model_kwargs: fields of the network's config to override.
        weights: weights to evaluate, the first at every budget and the others at the last one: half-lives of averages
            in kimg, or "raw" and "ema" for the peer.
        ema_ramp_up: half-lives are at most this fraction of the images seen.
        num_images: number of samples.
        sampling: flags of eval_diffit.py.
    """

    task: str
    side: str
    network: str
    learning_rate: float
    seed: int
    kimg: int
    budgets: tuple[int, ...]
    recipe: dict | str = field(default_factory=lambda: RECIPE)
    model_kwargs: dict = field(default_factory=dict)
    weights: tuple[float | str, ...] = WIDTHS
    ema_ramp_up: float = RAMP_UP
    num_images: int = 1000
    sampling: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.task}-{self.side}-lr{self.learning_rate:g}-seed{self.seed}".replace(" ", "_").replace(",", "")


# ---------------------------------------------------------------------------------------------------------------------
# Data


def prepare(work_dir: Path) -> None:
    """Writes train.parquet and held_out.parquet (a fifth) of each task at its size, and its networks' configs.

    Images of the held-out fifth that are pixel for pixel in the rest are dropped: some emoji have such twins.
    """
    for name, task in TASKS.items():
        folder = work_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for network, config in task.networks.items():
            (folder / f"{network}.json").write_text(json.dumps(config, indent=1))
        side = task.networks["diffit"]["sample_size"]
        rows = load_dataset("parquet", data_files=str(ROOT / "data" / task.file), split="train")
        images = [row["image"].resize((side, side), Image.Resampling.BOX) for row in rows]
        order = np.random.default_rng(0).permutation(len(images))
        held_out, train = np.split(order, [len(images) // 5])
        seen = {images[i].tobytes() for i in train}
        unseen = [i for i in held_out if images[i].tobytes() not in seen]
        print(f"{name}: {len(train)} images to train on, {len(unseen)} of {len(held_out)} held out have no twin there")
        features = datasets.Features({"image": datasets.Image(), "label": rows.features["label"]})
        for part, indices in (("train", train), ("held_out", unseen)):
            files = [{"bytes": png(images[i]), "path": None} for i in indices]
            columns = {"image": files, "label": [rows[int(i)]["label"] for i in indices]}
            Dataset.from_dict(columns, features=features).to_parquet(folder / f"{part}.parquet")


def png(image: Image.Image) -> bytes:
    """The contents of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation


def to_argv(flags: dict) -> list[str]:
    """Turns a mapping of flags into a command line."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv += [f"--{name}", *map(str, value if isinstance(value, (tuple, list)) else [value])]
    return argv


def command(script: str, argv: list[str], log: Path) -> None:
    """Runs one of the project's scripts on one core; its output goes to `log`."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        argv = [sys.executable, str(ROOT / script), *argv]
        done = subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        raise RuntimeError(f"{script} failed, see {log}:\n{log.read_text()[-2000:]}")


def steps(kimg: float) -> int:
    """Converts thousands of images to optimizer steps."""
    return round(kimg * 1000 / BATCH_SIZE)


def train(run: Run, folder: Path) -> dict[tuple[int, float | str], Path]:
    """Trains unless that was done before; returns eval_diffit.py's --model_path for each budget and average."""
    if run.recipe == PEER:
        process = multiprocessing.get_context("spawn").Process(target=train_peer, args=(run, folder))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"{run.name} failed")
        return {(kimg, kind): folder / f"kimg-{kimg}-{kind}" for kimg in run.budgets for kind in run.weights}
    every = np.gcd.reduce([steps(kimg) for kimg in run.budgets])
    flags = {
        "train_data_file": folder.parent / run.task / "train.parquet",
        "model_config": folder.parent / run.task / f"{run.network}.json",
        **({"model_kwargs": [f"{k}={v}" for k, v in run.model_kwargs.items()]} if run.model_kwargs else {}),
        "class_conditional": False,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": steps(run.kimg),
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "ema_half_life_kimg": run.weights,
        "ema_ramp_up": run.ema_ramp_up,
        "checkpointing_steps": every,
        "validation_steps": 10**9,
        "num_validation_images": 1,
        "validation_inference_steps": 2,
        "report_to": "none",
        "logging_steps": 200,
        "output_dir": folder,
        "overwrite_output_dir": True,
        **run.recipe,
    }
    checkpoints = {kimg: folder / f"checkpoint-{steps(kimg)}" for kimg in run.budgets}
    if not checkpoints[run.budgets[-1]].is_dir():
        command("train_diffit.py", to_argv(flags), folder.parent / f"{run.name}.log")
    return {(kimg, width): checkpoints[kimg] for kimg in run.budgets for width in run.weights}


def train_peer(run: Run, folder: Path) -> None:
    """Trains with diffusers' loop on the same images; saves a `DDPMPipeline` of its weights and EMA at each budget."""
    torch.set_num_threads(1)
    from benchmarks.train_unconditional import train_unconditional

    torch.manual_seed(run.seed)
    rows = load_dataset("parquet", data_files=str(folder.parent / run.task / "train.parquet"), split="train")
    images = torch.stack([torch.from_numpy(np.array(row["image"])) for row in rows])
    images = (images.unsqueeze(-1) if images.dim() == 3 else images).permute(0, 3, 1, 2) / 127.5 - 1
    loader = torch.utils.data.DataLoader(images, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    config = TASKS[run.task].networks[run.network]
    model = kernelize(model_class(config).from_config(config))
    at = {steps(kimg): kimg for kimg in run.budgets}

    def save(step: int, model: torch.nn.Module, ema_model: EMAModel) -> None:
        if step not in at:
            return
        scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon")
        DDPMPipeline(model, scheduler).save_pretrained(folder / f"kimg-{at[step]}-raw")
        ema_model.store(model.parameters())
        ema_model.copy_to(model.parameters())
        DDPMPipeline(model, scheduler).save_pretrained(folder / f"kimg-{at[step]}-ema")
        ema_model.restore(model.parameters())

    train_unconditional(
        model,
        loader,
        num_steps=steps(run.kimg),
        learning_rate=run.learning_rate,
        lr_warmup_steps=500 if run.budgets == TASKS[run.task].budgets else 167,  # its default in the proof
        use_ema=True,
        on_step=save,
    )


def evaluate(run: Run, name: str, model_paths: list[Path], flags: dict, work_dir: Path) -> dict:
    """The metrics that `eval_diffit.py` writes for some models; cached under a name."""
    output = work_dir / f"{name}.json"
    if not output.is_file():
        flags = {
            "reference": work_dir / run.task / "held_out.parquet",
            "feature_extractor": "efficientnet_lite0",
            "num_images": run.num_images,
            "batch_size": 100,
            "num_inference_steps": STEPS,
            "work_dir": work_dir / "evaluation" / run.name,
            "output": output,
            **run.sampling,
            **flags,
        }
        paths = [f"--model_path={path}" for path in model_paths]
        command("eval_diffit.py", [*paths, *to_argv(flags)], work_dir / f"{name}.log")
    return json.loads(output.read_text())


def judge(run: Run, work_dir: Path) -> list[dict]:
    """Trains and evaluates a run, or reads the cached result; returns a row for each budget and average."""
    file = work_dir / f"{run.name}.json"
    if file.is_file():
        return json.loads(file.read_text())
    models = train(run, work_dir / run.name)
    about = {"task": run.task, "side": run.side, "learning_rate": run.learning_rate, "seed": run.seed}
    rows = []
    for weights in run.weights:
        budgets = run.budgets if weights == run.weights[0] else run.budgets[-1:]
        flags = {} if run.recipe == PEER else {"weights": f"unet_ema_{weights:g}kimg"}
        paths = [models[kimg, weights] for kimg in budgets]
        written = evaluate(run, f"{run.name}-{weights}-metrics", paths, flags, work_dir)
        for kimg, metrics in zip(budgets, written.get("models", [written]), strict=True):
            distances = {name: metrics[name] for name in ("frechet_distance", "kernel_distance")}
            rows.append(about | {"kimg": kimg, "weights": weights} | distances)
    file.write_text(json.dumps(rows))
    figures = (f"{row['kimg']} kimg {row['weights']}: {row['frechet_distance']['value']:.2f}" for row in rows)
    print(f"{run.name}: {', '.join(figures)}", flush=True)
    return rows


def judge_all(runs: list[Run], work_dir: Path) -> list[dict]:
    """The rows of all runs, with one training at a time per core."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [row for rows in pool.map(judge, runs, [work_dir] * len(runs)) for row in rows]


# ---------------------------------------------------------------------------------------------------------------------
# Tuning

SIDES = {
    "DiffiT": ("diffit", RECIPE),
    "U-Net": ("unet", RECIPE),
    "DiffiT, Muon": ("diffit", MUON_RECIPE),
    PEER: ("unet", PEER),
}
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
PEER_LEARNING_RATES = (1e-4, *LEARNING_RATES)  # includes its default
DIVERGED = {("emoji", PEER): 1e-2}  # best in tuning, but two seeds of the comparison ended at distances of 162 and 331
TUNING_IMAGES = 500
HEUN = {"scheduler": "edm_heun", "num_inference_steps": 13}  # the same NFE
EULER = {"scheduler": "edm_euler"}  # EDM's counterpart of DDIM
SHARED = {key: RECIPE[key] for key in ("adam_beta2", "lr_scheduler", "lr_warmup_steps")}
EDM_RECIPE = SHARED | {"formulation": "edm"}
RECIPES = {  # alternatives to RECIPE for DiffiT: flags, model config fields, sampling flags
    "DiffiT, EDM": (EDM_RECIPE, {}, HEUN),
    "DiffiT, epsilon, linear betas": (SHARED | {"prediction_type": "epsilon", "beta_schedule": "linear"}, {}, {}),
    "DiffiT, no min-SNR weights": ({key: RECIPE[key] for key in RECIPE if key != "snr_gamma"}, {}, {}),
    "DiffiT, Adam beta 2 of 0.999": (RECIPE | {"adam_beta2": 0.999}, {}, {}),
    "DiffiT, warm-up-stable-decay": (RECIPE | {"lr_scheduler": "warmup_stable_decay"}, {}, {}),
    "DiffiT, skips added": (RECIPE, {"skip_merge": "add"}, {}),
    "DiffiT, output not zero at first": (RECIPE, {"zero_init_output": False}, {}),
    "DiffiT, EDM by Euler": (EDM_RECIPE, {}, EULER),
    "DiffiT, EDM by Euler, sigma mean 0, deviation 1.6": (EDM_RECIPE | {"sigma_mean": 0, "sigma_std": 1.6}, {}, EULER),
    "DiffiT, EDM by Euler, sigma mean -0.4, deviation 1.0": (
        EDM_RECIPE | {"sigma_mean": -0.4, "sigma_std": 1},
        {},
        EULER,
    ),
    "DiffiT, 8 heads": (RECIPE, {"num_attention_heads": 8}, {}),
    "DiffiT, 2 heads": (RECIPE, {"num_attention_heads": 2}, {}),
    "DiffiT, min-SNR gamma 1": (RECIPE | {"snr_gamma": 1}, {}, {}),
    "DiffiT, dropout 0.1": (RECIPE, {"dropout": 0.1}, {}),
    "DiffiT, MLP of ratio 2": (RECIPE, {"mlp_ratio": 2}, {}),
    "DiffiT, Muon at once AdamW's rate": (MUON_RECIPE | {"muon_lr_ratio": 1}, {}, {}),
    "DiffiT, Muon at six times AdamW's rate": (MUON_RECIPE | {"muon_lr_ratio": 6}, {}, {}),
}


def tune(work_dir: Path) -> None:
    """Writes quality_tuning.json: all sides at all learning rates, then DiffiT at its best one with other recipes.

    quality_tried.json holds results of code that was removed, so no script can rewrite it.
    """
    runs = []
    for name, task in TASKS.items():
        for side, (network, recipe) in SIDES.items():
            weights = ("raw", "ema") if recipe == PEER else WIDTHS
            for rate in PEER_LEARNING_RATES if recipe == PEER else LEARNING_RATES:
                budget = task.tuning_budget
                length = (TUNING_SEED, budget, (budget,))
                runs.append(Run(name, side, network, rate, *length, recipe, weights=weights, num_images=TUNING_IMAGES))
    rows = judge_all(runs, work_dir)
    write_rows("quality_tuning.json", rows)
    for name, task in reversed(TASKS.items()):  # the quick one first
        runs, best = [], tuned("DiffiT", name)
        length = (TUNING_SEED, task.tuning_budget, (task.tuning_budget,))
        for variant, (recipe, model_kwargs, sampling) in RECIPES.items():
            if recipe["lr_scheduler"] == "warmup_stable_decay":
                recipe = recipe | {"lr_decay_steps": steps(task.tuning_budget) // 4}
            run = Run(
                name, variant, "diffit", best["learning_rate"], *length, recipe, model_kwargs, (best["weights"],)
            )
            runs.append(dataclasses.replace(run, num_images=TUNING_IMAGES, sampling=sampling))
        rows += judge_all(runs, work_dir)
        write_rows("quality_tuning.json", rows)


def write_rows(name: str, rows: list[dict]) -> None:
    """Writes results to benchmarks/results."""
    (RESULTS / name).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def tuned(side: str, task: str) -> dict:
    """The tuning row with the lowest Frechet distance, except for a learning rate that failed in the comparison."""
    rows = json.loads((RESULTS / "quality_tuning.json").read_text())
    rows = [row for row in rows if (row["side"], row["task"]) == (side, task)]
    rows = [row for row in rows if row["learning_rate"] != DIVERGED.get((task, side))]
    return min(rows, key=lambda row: row["frechet_distance"]["value"])


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def proof_runs() -> list[Run]:
    """Three seeds of each side with its best learning rate and its best average, as a fraction of the training."""
    runs = []
    for seed in SEEDS:
        for name, task in TASKS.items():
            for side, (network, recipe) in SIDES.items():
                best = tuned(side, name)
                run = Run(name, side, network, best["learning_rate"], seed, task.budgets[-1], task.budgets, recipe)
                if recipe == PEER:
                    kinds = (best["weights"], *({"raw", "ema"} - {best["weights"]}))
                    runs.append(dataclasses.replace(run, weights=kinds))
                else:
                    share = min(best["weights"] / best["kimg"], RAMP_UP)
                    runs.append(dataclasses.replace(run, weights=(round(share * run.kimg, 6),), ema_ramp_up=share))
    return runs


def prove(work_dir: Path) -> None:
    """Writes quality_speed.json, quality.json, quality_more.json and grids of samples."""
    write_rows("quality_speed.json", [row for name in TASKS for row in time_steps(name)])
    runs = proof_runs()
    write_rows("quality.json", judge_all(runs, work_dir))
    write_rows("quality_more.json", judge_more(runs, work_dir))
    for name in TASKS:
        draw_samples(name, runs, work_dir)


def time_steps(name: str, rounds: int = 7) -> list[dict]:
    """Size of each side, and its seconds per training image on one core, measured in turns."""
    torch.set_num_threads(1)
    rows, timers = [], []
    for side, (network, recipe) in SIDES.items():
        config = TASKS[name].networks[network]
        model = kernelize(model_class(config).from_config(config))
        size = {"parameters": model.num_parameters(), "flops_per_image": training_flops_per_image(config)}
        rows.append({"task": name, "side": side, **size, "seconds": []})
        timers.append(Timer("step()", globals={"step": training_step(model, recipe)}))
    for timer in timers:
        timer.timeit(2)  # warm up
    for _ in range(rounds):
        for row, timer in zip(rows, timers, strict=True):
            row["seconds"].append(timer.timeit(5).median / BATCH_SIZE)
    return [row | {"seconds_per_image": statistics.median(row.pop("seconds"))} for row in rows]


def training_step(model: torch.nn.Module, recipe: dict | str) -> Callable[[], None]:
    """A training step on precomputed noisy images, with the side's optimizer and average."""
    config = model.config
    sample = torch.randn(BATCH_SIZE, config.in_channels, config.sample_size, config.sample_size)
    timesteps = torch.randint(0, 1000, (BATCH_SIZE,))
    if recipe == PEER:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        ema_model = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    else:
        flags = dict.fromkeys(("model_config", "train_data_file", "output_dir"), "unused") | {"max_train_steps": 1}
        optimizer = build_optimizer(parse_args(to_argv(flags | recipe)), model)
        ema_model = HalfLifeEMA(model.parameters(), half_life=1e4, ramp_up=0.05, batch_size=BATCH_SIZE)

    def step() -> None:
        F.mse_loss(model(sample, timesteps).sample, sample).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema_model.step(model.parameters())

    return step


def judge_more(runs: list[Run], work_dir: Path) -> list[dict]:
    """Additional results of DiffiT on digits: other schedulers, EDM with its own samplers, and guidance."""
    run = next(run for run in runs if (run.task, run.side) == ("digits", "DiffiT"))
    run = dataclasses.replace(run, num_images=TUNING_IMAGES)
    edm = dataclasses.replace(run, side="DiffiT by EDM", recipe=EDM_RECIPE)
    by_class = dataclasses.replace(run, side="DiffiT by class", recipe=run.recipe | {"class_conditional": True})
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(judge_steps, run, work_dir) for run in (run, edm)]
        jobs.append(pool.submit(judge_guidance, by_class, work_dir))
        return [row for job in jobs for row in job.result()]


def last_checkpoint(run: Run, work_dir: Path) -> Path:
    """The path of a run's last model, which is trained first if necessary."""
    return train(run, work_dir / run.name)[run.budgets[-1], run.weights[0]]


def judge_steps(run: Run, work_dir: Path) -> list[dict]:
    """Evaluates the last model of a run with several schedulers and numbers of steps."""
    is_edm = run.recipe.get("formulation") == "edm"
    flags = {
        "plots": work_dir / f"{run.name}-plots",
        "plot_steps": (5, 10, 25),
        "plot_schedulers": sorted(EDM_SCHEDULERS) if is_edm else ("ddim", "dpmsolver++", "unipc", "heun"),
    }
    written = evaluate(run, f"{run.name}-steps", [last_checkpoint(run, work_dir)], flags, work_dir)
    columns = ("scheduler", "evaluations", "frechet_distance")
    about = {"task": run.task, "side": run.side, "what": "steps"}
    return [about | {key: row[key] for key in columns} for row in written["by_steps"]]


def judge_guidance(run: Run, work_dir: Path) -> list[dict]:
    """Evaluates a class-conditional run with several guidance scales."""
    about = {"task": run.task, "side": run.side, "what": "guidance"}
    rows = []
    for scale in (1, 1.5, 2, 3):
        flags = {"class_labels": "reference", "guidance_scale": scale}
        name = f"{run.name}-guidance{scale}"
        written = evaluate(run, name, [last_checkpoint(run, work_dir)], flags, work_dir)
        rows.append(about | {"guidance_scale": scale, "frechet_distance": written["frechet_distance"]})
    return rows


def draw_samples(name: str, runs: list[Run], work_dir: Path) -> None:
    """A grid of images with the same seeds from the last model of each side, one row each, and held-out images."""
    side = TASKS[name].networks["diffit"]["sample_size"]
    held_out = load_dataset("parquet", data_files=str(work_dir / name / "held_out.parquet"), split="train")
    strips = [np.stack([np.array(row["image"].convert("RGB")) for row in held_out.select(range(24))])]
    for side_name in SIDES:
        run = next(run for run in runs if (run.task, run.side) == (name, side_name))
        kimg, weights = run.budgets[-1], run.weights[0]
        if run.recipe == PEER:
            path = work_dir / run.name / f"kimg-{kimg}-{weights}"
        else:
            path = work_dir / run.name / f"checkpoint-{steps(kimg)}"
        pipeline = load_pipeline(str(path), SamplingConfig())
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(24)]
        pictures = pipeline(
            batch_size=24, generator=generators, num_inference_steps=STEPS, output_type="np"
        ).images  # (24, H, W, C) in [0, 1]
        strips.append((np.broadcast_to(pictures, (24, side, side, 3)) * 255).round().astype(np.uint8))
    rows = np.stack(strips).transpose(0, 2, 1, 3, 4).reshape(len(strips) * side, 24 * side, 3)
    picture = Image.fromarray(rows)
    picture.resize((picture.width * 3, picture.height * 3), Image.Resampling.NEAREST).save(
        RESULTS / f"quality_samples_{name}.png"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tune", "prove"))
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs/quality")
    args = parser.parse_args()
    work_dir = args.work_dir.resolve()
    prepare(work_dir)
    if args.what == "tune":
        tune(work_dir)
    else:
        prove(work_dir)


if __name__ == "__main__":
    main()
