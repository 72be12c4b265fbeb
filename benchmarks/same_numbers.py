"""Compares the numbers of the working tree with those of an earlier commit, bit for bit.

    python benchmarks/same_numbers.py BASE
    python benchmarks/same_numbers.py BASE --only muon --only flags --allow 'muon/losses:*ema_decay*'

Two copies are made in a temporary folder: the commit BASE, and the working tree with its uncommitted changes (HEAD
below). Both run the same commands in their own folder, on one thread of the CPU and with their own caches: eight tiny
trainings, sampling, evaluation, the scripts, `--help`, and dry runs of each config and of each training command in
BASE's README. Only the command line, files and diffusers' public loading are used, so modules may move. The SHA-256
covers the contents of files (tensors, pixels, values), not their encoding; model cards and copied code are not
compared. HEAD also resumes BASE's checkpoints and loads BASE's pipeline folders.

Exits with 1 if a row says DIFFERS. Flags, arguments, fields of JSON files and logged tags that only HEAD has are
listed as new and do not count. `--allow PATTERN` is for intended changes: a row, or `row:item`, with wildcards.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL.Image
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
STEPS, HALF = 8, 4
TIMEOUT = 1800  # seconds for one command
EXIT_STOPPED = 75  # of a training that was asked to stop

# ---------------------------------------------------------------------------------------------------------------------
# The commands

TINY = {"sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
MODELS = {
    "diffit": TINY | {"_class_name": "DiffiTUNet2DModel", "window_size": 4, "num_attention_heads": 2},
    "unet": TINY
    | {"_class_name": "UNet2DModel", "attention_head_dim": 8, "down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}
    | {"up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    "transformer": {"_class_name": "DiffiTTransformer2DModel", "sample_size": 4, "patch_size": 1, "num_layers": 2}
    | {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8},  # a learned variance
}
COMMON = f"""--max_train_steps={STEPS} --checkpointing_steps={HALF} --validation_steps={HALF} --logging_steps=1
    --train_batch_size=4 --learning_rate=1e-3 --lr_warmup_steps=2 --mixed_precision=no --model_config=tiny/diffit.json
    --validation_fraction=0.25 --num_validation_images=4 --validation_inference_steps=3"""
DIGITS = "--train_data_file=data/digits.parquet --validation_fraction=0.02 --class_conditional"
EMOJI = "--train_data_file=data/noto_emoji_32.parquet --validation_fraction=0.01 --class_conditional --resolution=16"
UNLABELLED = "--train_data_dir=path/to/class/folders"
FOLDER = f"{UNLABELLED} --class_conditional"
EXTRACTOR = "--feature_extractor=efficientnet_lite0"  # its weights are installed
TRAININGS = {
    "v-prediction": f"{DIGITS} --global_batch_size=8 --snr_gamma=5 --validation_guidance_scale=1.5 {EXTRACTOR}"
    f" --eval_steps={HALF} --eval_num_images=8",
    "latents": f"{FOLDER} --model_config=tiny/transformer.json --prediction_type=epsilon --beta_schedule=linear"
    " --vae_model_name_or_path=stabilityai/sd-vae-ft-ema --random_flip",
    "edm": f"{FOLDER} --formulation=edm --augmentation_probability=0.5 --model_kwargs dropout=0.1"
    " --dataloader_num_workers=1",
    "muon": f"{UNLABELLED} --optimizer=muon --ema_half_life_kimg 0.01 0.1 --ema_ramp_up=0.5 --lr_scheduler=cosine",
    "unet": f"{DIGITS} --model_config=tiny/unet.json --prediction_type=epsilon --center_crop",
    "bf16": f"{EMOJI} --mixed_precision=bf16 --gradient_checkpointing",
    "two-processes": f"{FOLDER} --train_batch_size=2",
    "resume": FOLDER,
}
# Additional flags and expected exit code of three runs: to half; one step more, stopped by its time limit; to the end.
STRETCHES = {
    "resume": {
        f" --max_train_steps={HALF}": 0,
        " --resume_from_checkpoint=latest --max_train_time=1e-9": EXIT_STOPPED,
        " --resume_from_checkpoint=latest": 0,
    }
}
CONTINUED = ("v-prediction", "latents", "edm", "muon", "unet", "bf16")  # by HEAD, from BASE's checkpoints
FOLDERS = ("v-prediction", "latents", "edm", "muon")  # the last one a `DDPMPipeline`, the others ours

# Models in the README that do not exist here, and classes that the tiny models lack; `make_inputs` makes the rest.
REPLACED = {"outputs/quickstart": "outputs/v-prediction", "outputs/cifar10": "outputs/edm"}
REPLACED |= {"models/diffit-256": "outputs/latents", "207,360,387,974": "0,1,2"}
WITH_FLAGS = ("train_diffit", "sample_diffit", "eval_diffit", "prepare_latents", "train_vae")
WITH_FLAGS += ("convert_nvidia_checkpoint", "make_digits")
FEW_STEPS = ["--num_inference_steps=4"]
FEW_IMAGES = f"--num_images=12 --num_subsets=2 --reference=path/to/images {EXTRACTOR}".split()
SAMPLES = {
    "plain": "--model_path=outputs/muon --seeds=0-7 --batch_size=4 --num_inference_steps=5",
    "edm_heun": "--model_path=outputs/edm --seeds=0-7 --class_labels=all --scheduler=edm_heun --s_churn=4"
    " --guidance_scale=2 --num_inference_steps=5",
    "unet-ddim": "--model_path=outputs/unet --seeds=0-7 --class_labels=1,2 --scheduler=ddim --eta=0.5"
    " --num_inference_steps=5 --save_npz",
}
LATENTS = "prepare_latents.py --vae_model_name_or_path=stabilityai/sd-vae-ft-ema"
SCRIPTS = {
    "train_vae": "train_vae.py --train_data_file=data/digits.parquet --output_dir=outputs/vae"
    " --max_train_steps=3 --train_batch_size=8",
    "prepare_latents/32": f"{LATENTS} --train_data_dir=path/to/class/folders --resolution=32 --no-mirror"
    " --output_dir=outputs/latents-digits",
    "prepare_latents/256": f"{LATENTS} --dataset_name=ILSVRC/imagenet-1k --resolution=256"
    " --output_dir=datasets/imagenet256-latents",
    "prepare_latents/512": f"{LATENTS} --dataset_name=ILSVRC/imagenet-1k --resolution=512"
    " --output_dir=datasets/imagenet512-latents",
}

# Runs many commands in forks of one interpreter, because importing torch and diffusers takes most of the time.
# Some scripts are in different folders in different commits.
RUNNER = """
import accelerate, datasets, json, os, runpy, sys, torchmetrics, transformers
from diffusers import AutoencoderKL, DDIMScheduler, DDPMPipeline, EDMEulerScheduler, UNet2DModel
codes = {}
for name, argv in json.loads(sys.argv[1]).items():
    argv[0] = next(path for folder in ("", "scripts/", "data/") if os.path.exists(path := folder + argv[0]))
    process = os.fork()
    if process == 0:
        os.makedirs(os.path.dirname(f"logs/{name}"), exist_ok=True)
        for number, suffix in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"logs/{name}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv, sys.path[0] = argv, os.path.dirname(os.path.abspath(argv[0]))
        runpy.run_path(argv[0], run_name="__main__")
        sys.exit()
    codes[name] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print(json.dumps(codes))
"""
# Samples from saved folders without this repository.
LOADER = """
import sys, numpy, torch
from diffusers import DiffusionPipeline
output, *folders = sys.argv[1:]
images = {}
for folder in folders:
    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    labels = {"class_labels": [0, 1, 2], "guidance_scale": 1.5} if pipeline.config.get("id2label") else {}
    generator = [torch.Generator().manual_seed(seed) for seed in range(3)]
    drawn = pipeline(batch_size=3, generator=generator, num_inference_steps=4, output_type="np", **labels)
    images[folder.split("/")[-1]] = drawn.images
numpy.savez(output, **images)
"""


def make_inputs(folder: Path) -> None:
    """Writes images, a VAE and model configs under the names that the README and the configs use."""
    from diffusers import AutoencoderKL

    (folder / "tiny").mkdir(parents=True)
    for name, config in MODELS.items():
        (folder / f"tiny/{name}.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    for channel, name in enumerate(("red", "green", "blue")):
        for i in range(8):
            pixels = rng.integers(0, 100, (8, 8, 3))
            pixels[..., channel] += 150
            places = ["path/to/images", f"path/to/class/folders/{name}", f"uoft-cs/cifar10/{name}"]
            for place in places + ([f"ILSVRC/imagenet-1k/{name}"] if i < 2 else []):
                (folder / place).mkdir(parents=True, exist_ok=True)
                PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / place / f"{name}{i}.png")
    shutil.make_archive(str(folder / "datasets/ffhq-64x64"), "zip", folder / "path/to/images")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    sizes = {"block_out_channels": [4] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4}
    for place in ("stabilityai/sd-vae-ft-ema", "outputs/vae-digits"):  # 8 pixels a latent, as in Stable Diffusion
        AutoencoderKL(**blocks, **sizes).save_pretrained(folder / place)


def check_out(commit: str | None, folder: Path) -> None:
    """Copies a commit, or the working tree if None: all files that git tracks or would track."""
    git = ["git", "-C", str(ROOT)]
    if commit is not None:
        archive = subprocess.run([*git, "archive", commit], check=True, stdout=subprocess.PIPE).stdout
        tarfile.open(fileobj=io.BytesIO(archive)).extractall(folder, filter="data")
        return
    listing = [*git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0"):
        if (ROOT / name).is_file():  # not deleted, nor a link to a folder
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def readme_commands(text: str) -> list[tuple[str, list[str]]]:
    """Script and flags of each command in a README's bash blocks; flags of `sbatch` are those of the training."""
    commands = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = [REPLACED.get(word, word) for word in shlex.split(line, comments=True)]
            for i, word in enumerate(words):
                if re.fullmatch(r"(scripts/)?\w+\.py|configs/slurm/\w+\.sbatch", word):
                    script = word.removeprefix("scripts/") if word.endswith(".py") else "train_diffit.py"
                    command = (script, words[i + 1 :])
                    commands += [command] if command not in commands else []
                    break
    return commands


def training(name: str, output: str) -> list[str]:
    """The command line of one of `TRAININGS`."""
    return ["train_diffit.py", *COMMON.split(), *TRAININGS[name].split(), f"--output_dir=outputs/{output}"]


def output_of(command: list[str]) -> str:
    """The --output_dir of a command."""
    return re.search(r"--output_dir[= ](\S+)", " ".join(command))[1]


@dataclasses.dataclass
class Side:
    """A copy of the code in which commands are run.

    Attributes:
        name: `BASE` or `HEAD`.
        folder: the copy's folder, in which the commands run; they write to its `outputs`.
        codes: maps names of commands to exit codes.
    """

    name: str
    folder: Path
    codes: dict[str, int] = dataclasses.field(default_factory=dict)

    def log(self, name: str) -> str:
        """A command's standard output."""
        return (self.folder / f"logs/{name}.out").read_text()

    def last_words(self, name: str) -> str:
        """The last line of a command's standard error."""
        return (self.folder / f"logs/{name}.err").read_text().strip().rpartition("\n")[2]

    def start(self, name: str, command: list[str], place: str) -> subprocess.Popen:
        """Starts Python with these arguments on one CPU thread, offline, with separate caches."""
        inherited = ("HF_", "ACCELERATE_", "PYTHON", "TORCHELASTIC_", "SLURM_", "OMP_", "MKL_")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(inherited)}
        caches = ("HF_HOME", "HF_MODULES_CACHE", "TORCH_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR")
        environment |= {key: f"{self.folder}-caches/{key}" for key in caches}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
        log = self.folder / f"logs/{name}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{log}.out", "w") as out, open(f"{log}.err", "w") as err:
            streams = {"stdout": out, "stderr": err, "start_new_session": True}
            return subprocess.Popen([sys.executable, *command], cwd=self.folder / place, env=environment, **streams)


def run(sides: list[Side], name: str, command: list[str], jobs: int, place: str = ".") -> None:
    """Runs Python with these arguments on all sides, `jobs` at a time, and records the exit codes."""
    processes = []
    try:
        for side in sides:
            processes.append(side.start(name, command, place))
            if len(processes) >= jobs:
                processes[-jobs].wait(TIMEOUT)
        for side, process in zip(sides, processes, strict=True):
            side.codes[name] = process.wait(TIMEOUT)
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(TIMEOUT)


# ---------------------------------------------------------------------------------------------------------------------
# Items to compare: names with a tensor or a plain value

VARIES = ("train/images_per_second", "train/peak_memory_gib")
# Patterns of file names to kinds of files. The first match counts; files of kind None are not compared.
KINDS = {
    "*events.out.tfevents.*": "losses",
    "*hparams.yml": None,  # repeats the arguments
    "*.py": None,
    "*README.md": None,
    "*manifest.json": None,  # checksums of files that are compared themselves
    "*.diffit.json": None,  # checksums as well
    "eval/best.json": "metrics",
    "eval/*": None,  # features, in folders named by a digest of settings
    "*_ema*/*.safetensors": "EMA",
    "checkpoint-*.safetensors": "weights",
    "*optimizer.pt": "optimizer",
    "*state.json": "state",
    "*.safetensors": "saved pipeline",
    "*.json": "configs",
    "*.yaml": "arguments",
    "*.png": "images",
    "*": "other files",
}
MAY_GROW = (".json", ".yaml", "events")  # new items in these files do not count as differences


def flatten(value, name: str = "") -> dict:
    """Flattens nested dictionaries and lists into items."""
    if isinstance(value, dict | list | tuple) and value:
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in pairs for k, v in flatten(part, f"{name}.{key}" if name else str(key)).items()}
    return {name: value}


def read_events(file: Path) -> dict:
    """A TensorBoard file's scalars by tag and step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
    scalars = {(tag, event.step): event.value for tag in events.Tags()["scalars"] for event in events.Scalars(tag)}
    return {f"{tag}@{step}": "varies" if tag in VARIES else value for (tag, step), value in scalars.items()}


def read_arrays(columns: dict) -> dict:
    """Turns arrays or table columns into tensors if they are numeric."""
    arrays = {name: np.array(column) for name, column in columns.items()}
    return {k: torch.from_numpy(v) if v.dtype.kind in "biuf" else str(v.tolist()) for k, v in arrays.items()}


def read_items(file: Path) -> dict:
    """Reads a file as items."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".pt":
        return flatten(torch.load(file, map_location="cpu", weights_only=True))
    if file.suffix in (".json", ".yaml"):
        return flatten(yaml.safe_load(file.read_text()) if file.suffix == ".yaml" else json.loads(file.read_text()))
    if file.suffix == ".png":
        with PIL.Image.open(file) as image:
            return read_arrays({"pixels": image})
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            return read_arrays(arrays)
    if file.suffix == ".parquet":
        import pyarrow.parquet

        return read_arrays(pyarrow.parquet.read_table(file).to_pydict())
    if file.name.startswith("events"):
        return read_events(file)
    return {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def read_tree(folder: Path) -> dict[str, dict]:
    """The items of all files in a folder, by kind. The names of event files contain the time and are omitted."""
    kinds: dict[str, dict] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        kind = next(kind for pattern, kind in KINDS.items() if fnmatch.fnmatch(name, pattern))
        name = "events" if file.name.startswith("events") else name
        if kind is not None:
            kinds.setdefault(kind, {}).update({f"{name}:{key}": value for key, value in read_items(file).items()})
    return kinds


def read_yaml(text: str):
    """Parses the output of a dry run, which stays text if it is not YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def flags_of(help_text: str) -> dict:
    """The flags in a help text, with their choices."""
    items = {}
    for text in re.findall(r"^  (-\S.*?)(?:  |$)", help_text, re.MULTILINE):
        flags = re.findall(r"--?\w[\w-]*", re.sub(r"\{.*?\}", "", text))
        choices = {choice for found in re.findall(r"\{(.*?)\}", text) for choice in found.split(",")}
        items |= {flag: "" for flag in flags} | {f"{flags[-1]} {choice}": "" for choice in choices}
    return items


def layout(tensor: torch.Tensor) -> str:
    """Type and shape of a tensor in words."""
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def sha256(value) -> str:
    """SHA-256 of a tensor with its type and shape, or of a plain value."""
    if not isinstance(value, torch.Tensor):
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).hexdigest()
    content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(layout(value).encode() + content).hexdigest()


@dataclasses.dataclass
class Difference:
    """One item that differs: its name, a description, and the largest difference if both are numeric."""

    item: str
    text: str
    size: float = 0.0


def describe(item: str, before, after) -> Difference:
    """Describes how an item differs."""
    are_tensors = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    if are_tensors and layout(before) == layout(after):
        a, b = before.double(), after.double()
        distance = (a - b).abs().nan_to_num(torch.inf)
        relative = (distance / a.abs())[a != 0]
        size, most = distance.max().item(), relative.max().item() if len(relative) else torch.inf
        changed = f"{(a != b).sum().item():,} of {a.numel():,} values"
        return Difference(item, f"{changed}, at most abs {size:.3g}, rel {most:.3g}", size)
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after)):
        size = abs(after - before)
        relative = size / abs(before) if before else torch.inf
        return Difference(item, f"{before!r} -> {after!r}, abs {size:.3g}, rel {relative:.3g}", size)
    words = [layout(value) if isinstance(value, torch.Tensor) else repr(value)[:160] for value in (before, after)]
    return Difference(item, " -> ".join(words))


def compare(before: dict, after: dict, may_grow: bool = False) -> tuple[list[Difference], list[str]]:
    """Returns the differences, and the new items that do not count: all if `may_grow`, else those in `MAY_GROW`."""
    differences = [
        describe(name, value, after[name]) if name in after else Difference(name, "missing on HEAD")
        for name, value in before.items()
        if name not in after or sha256(value) != sha256(after[name])
    ]
    added = [name for name in after if name not in before]
    harmless = [name for name in added if may_grow or name.partition(":")[0].endswith(MAY_GROW)]
    return differences + [Difference(name, "only on HEAD") for name in added if name not in harmless], harmless


class Report:
    """The table of results, printed row by row.

    Args:
        allow: patterns of rows, or of `row:item`, that may differ.
    """

    def __init__(self, allow: list[str]):
        self.allow, self.used = allow, set()
        self.counts, self.different = {"same": 0, "allowed": 0, "DIFFERS": 0}, []

    def is_allowed(self, row: str, item: str) -> bool:
        """Whether a difference is allowed by --allow."""
        hits = {pattern for pattern in self.allow if any(fnmatch.fnmatch(n, pattern) for n in (row, f"{row}:{item}"))}
        self.used |= hits
        return bool(hits)

    def add(self, row: str, before: dict, after: dict, may_grow: bool = False) -> None:
        """Compares two sets of items and prints a row; see `compare`."""
        differences, new = compare(before, after, may_grow)
        if not before and not after:
            differences = [Difference("", "there is nothing to compare")]
        wrong = [d for d in differences if not self.is_allowed(row, d.item)]
        verdict = "DIFFERS" if wrong else "allowed" if differences else "same"
        if differences:
            shown, largest = (wrong or differences)[0], max(differences, key=lambda d: d.size)
            text = f": {shown.item}: {shown.text}"
            if len(differences) > 1:
                text += f"; {len(differences):,} of {len(before | after):,} items"
                text += f", most in {largest.item}: {largest.text}" if largest.size else ""
        else:
            digest = hashlib.sha256("".join(f"{name} {sha256(before[name])}" for name in sorted(before)).encode())
            text = f"     {digest.hexdigest()[:16]}  {len(before):,} items"
        text += f"; new: {', '.join(new[:8])}{', ...' if len(new) > 8 else ''}" if new else ""
        line = f"{row:<32}  {verdict}{text}"
        print(line, flush=True)
        self.counts[verdict] += 1
        self.different += [line] if wrong else []

    def finish(self, seconds: float) -> int:
        """Prints a summary and returns the exit code."""
        for pattern in sorted(set(self.allow) - self.used):
            print(f"--allow {pattern!r} was not needed")
        counts = ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())
        summary = f"{sum(self.counts.values())} comparisons: {counts}; {seconds / 60:.1f} minutes"
        print("", *self.different, summary, sep="\n")
        return 1 if self.different else 0


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the comparison


class Comparison:
    """Runs each command once on both sides and fills the report, with one `compare_...` method per part."""

    def __init__(self, base: Side, head: Side, report: Report, jobs: int):
        self.base, self.head, self.report, self.jobs = base, head, report, jobs
        self.commands = readme_commands((base.folder / "README.md").read_text())
        self.succeeded: dict[str, bool] = {}

    def check(self, name: str, expected: int = 0) -> None:
        """Records whether a command ended on HEAD with the expected exit code, and adds a row if it did not.

        Raises:
            RuntimeError: if it failed on BASE, so that there is nothing to compare with.
        """
        if self.base.codes.get(name, expected) != expected:
            raise RuntimeError(f"BASE: {name} ends with {self.base.codes[name]}: {self.base.last_words(name)}")
        code = self.head.codes[name]
        self.succeeded[name] = code == expected
        if code != expected:
            self.report.add(f"{name}/exit code", {"": expected}, {"": f"{code}: {self.head.last_words(name)}"})

    def run_jobs(self, jobs: dict[str, list[str]], only_head: bool = False) -> list[str]:
        """Runs the commands that have not run yet; returns the names of all that succeeded."""
        new = {name: command for name, command in jobs.items() if name not in self.succeeded}
        if new:
            name, sides = f"jobs-{len(self.succeeded)}", [self.head] if only_head else [self.base, self.head]
            run(sides, name, ["-c", RUNNER, json.dumps(new)], self.jobs)
            for side in sides:
                if side.codes[name] != 0:
                    raise RuntimeError(f"{side.name}: {side.last_words(name)}")
                side.codes |= json.loads(side.log(name))
            for job in new:
                self.check(job)
        return [name for name in jobs if self.succeeded[name]]

    def train(self, *names: str) -> list[str]:
        """Runs trainings into `outputs/NAME` as a user would; returns the names of those that succeeded."""
        for name in names:
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
            command = [*(launcher if name == "two-processes" else ()), *training(name, name)]
            for stretch, expected in STRETCHES.get(name, {"": 0}).items():
                if self.succeeded.get(name, True) and name + stretch not in self.succeeded:
                    run([self.base, self.head], name + stretch, [*command, *stretch.split()], self.jobs)
                    self.check(name + stretch, expected)
                    self.succeeded[name] = self.succeeded[name + stretch]
        return [name for name in names if self.succeeded[name]]

    def add_folder(self, row: str, folder: str, of_head: str | None = None, without: str = "") -> None:
        """Adds a row for a folder's files, except those of one kind; on HEAD the folder may have another name."""
        trees = read_tree(self.base.folder / folder), read_tree(self.head.folder / (of_head or folder))
        for tree in trees:
            tree.pop(without, None)
        self.report.add(row, *({k: v for items in tree.values() for k, v in items.items()} for tree in trees))

    def compare_training(self, name: str) -> None:
        """Adds a row for each kind of a training's files."""
        for _ in self.train(name):
            trees = [read_tree(side.folder / f"outputs/{name}") for side in (self.base, self.head)]
            for kind in dict.fromkeys(KINDS.values()):
                if any(kind in tree for tree in trees):
                    self.report.add(f"{name}/{kind}", *(tree.get(kind, {}) for tree in trees))

    def prepare(self) -> list[str]:
        """Trains a VAE and prepares latents; returns the names of the commands that succeeded."""
        return self.run_jobs({f"scripts/{name}": command.split() for name, command in SCRIPTS.items()})

    def compare_scripts(self) -> None:
        for name in self.prepare():
            self.add_folder(name, output_of(SCRIPTS[name.partition("/")[2]].split()))

    def sample(self) -> dict[str, str]:
        """Samples as in the README, and more; returns the folders of the commands that succeeded, by name."""
        self.train(*CONTINUED)
        jobs = {f"samples/{name}": [*flags.split(), f"--output_dir=outputs/{name}"] for name, flags in SAMPLES.items()}
        for i, (script, flags) in enumerate(self.commands):
            if script == "sample_diffit.py":
                jobs[f"samples/README-{i}"] = [*flags, *FEW_STEPS]
        done = self.run_jobs({name: ["sample_diffit.py", *flags] for name, flags in jobs.items()})
        return {name: output_of(jobs[name]) for name in done}

    def compare_samples(self) -> None:
        for name, folder in self.sample().items():
            self.add_folder(name, folder)

    def compare_evaluation(self) -> None:
        self.sample()  # the README's evaluations read the samples
        jobs = {}
        for i, (script, flags) in enumerate(self.commands):
            if script == "eval_diffit.py":
                flags = [flag for flag in flags if flag != "inception_score"]  # needs a download
                flags += FEW_IMAGES + ([] if "--images" in flags else ["--num_inference_steps=4"])
                jobs[f"evaluation/README-{i}"] = [script, *flags, f"--output=outputs/metrics-{i}/a.json"]
                for side in (self.base, self.head):
                    (side.folder / f"outputs/metrics-{i}").mkdir()
        for name in self.run_jobs(jobs):
            self.add_folder(name, f"outputs/metrics-{name.rpartition('-')[2]}")

    def compare_continued(self) -> None:
        """HEAD resumes from BASE's checkpoints, and must end where BASE ended."""
        jobs = {}
        for name in self.train(*CONTINUED):
            start = f"outputs/{name}/checkpoint-{HALF}"
            shutil.copytree(self.base.folder / start, self.head.folder / "old" / start)
            resume = f"--resume_from_checkpoint=old/{start}"
            jobs[f"continued/{name}"] = [*training(name, f"continued/{name}"), resume]
        for name in self.run_jobs(jobs, only_head=True):
            end = f"{name.partition('/')[2]}/checkpoint-{STEPS}"
            self.add_folder(name, f"outputs/{end}", f"outputs/continued/{end}", without="arguments")

    def compare_folders(self) -> None:
        """HEAD loads the pipelines that BASE saved, as well as its own."""
        names, jobs = self.train(*FOLDERS), {}
        for name in names:
            for side in (self.base, self.head):
                left_out = shutil.ignore_patterns("checkpoint-*", "logs")
                shutil.copytree(self.base.folder / f"outputs/{name}", side.folder / f"old/{name}", ignore=left_out)
            flags = ["--seeds=0-3", "--batch_size=2", "--num_inference_steps=4", f"--output_dir=outputs/old/{name}"]
            jobs[f"folders/sample_diffit/{name}"] = ["sample_diffit.py", f"--model_path=old/{name}", *flags]
        for name in self.run_jobs(jobs):
            self.add_folder(name, f"outputs/old/{name.rpartition('/')[2]}")
        run([self.base, self.head], "folders/own", ["-c", LOADER, "own.npz", *names], self.jobs, place="outputs")
        run([self.head], "folders/old", ["-c", LOADER, "old.npz", *(f"old/{name}" for name in names)], self.jobs)
        for name, file in (("folders/own", "outputs/own.npz"), ("folders/old", "old.npz")):
            self.check(name)
            if self.succeeded[name]:
                files = self.base.folder / "outputs/own.npz", self.head.folder / file
                self.report.add(f"{name} from_pretrained", *map(read_items, files))

    def compare_flags(self) -> None:
        """Compares the flags of each script and their choices."""
        for name in self.run_jobs({f"flags/{script}": [f"{script}.py", "--help"] for script in WITH_FLAGS}):
            self.report.add(name, *(flags_of(side.log(name)) for side in (self.base, self.head)), may_grow=True)

    def compare_arguments(self) -> None:
        """Compares the resolved flags, parameters and FLOPs of all configs and README commands."""
        self.train("latents")  # a command of the README fine-tunes it
        self.prepare()
        configs = sorted((self.base.folder / "configs/train").glob("*.yaml"))
        jobs = {f"arguments/{file.stem}": ["--config", f"configs/train/{file.name}"] for file in configs}
        for i, (script, flags) in enumerate(self.commands):
            if script == "train_diffit.py" and flags not in jobs.values():
                jobs[f"arguments/README-{i}"] = flags
        for name in self.run_jobs({name: ["train_diffit.py", *flags, "--dry_run"] for name, flags in jobs.items()}):
            resolved = [flatten(read_yaml(side.log(name))) for side in (self.base, self.head)]
            self.report.add(name, *resolved, may_grow=True)


def main() -> int:
    """Makes both copies, compares them part by part, and deletes them."""
    started = time.monotonic()
    names = [*TRAININGS, "scripts", "samples", "evaluation", "continued", "folders", "flags", "arguments"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="commit, branch or tag to compare with")
    parser.add_argument(
        "--only", action="append", choices=names, help="part to compare; may be given several times (default: all)"
    )
    parser.add_argument(
        "--allow", action="append", default=[], metavar="PATTERN", help="rows that may differ (default: none)"
    )
    parser.add_argument(
        "--jobs", type=int, choices=(1, 2), default=2, help="number of sides that run at once (default: 2)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder for inspection")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that everything is removed then, too
    folder = Path(tempfile.mkdtemp(prefix="same-numbers-"))
    try:
        base, head = Side("BASE", folder / "base"), Side("HEAD", folder / "head")
        make_inputs(folder / "inputs")
        for side, commit in ((base, args.base), (head, None)):
            check_out(commit, side.folder)
            shutil.copytree(folder / "inputs", side.folder, dirs_exist_ok=True)
        report = Report(args.allow)
        comparison = Comparison(base, head, report, args.jobs)
        for name in args.only or names:
            if name in TRAININGS:
                comparison.compare_training(name)
            else:
                getattr(comparison, f"compare_{name}")()
        return report.finish(time.monotonic() - started)
    finally:
        if args.keep:
            print(f"kept: {folder}")
        else:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
