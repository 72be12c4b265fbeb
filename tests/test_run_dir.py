"""Files that are not listed in a folder's mark are the user's: never overwritten, deleted, moved or read as data."""

import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from diffusers import DDPMPipeline, DDPMScheduler

import eval_diffit
from diffit.errors import UserError
from diffit.export import save_pipeline
from diffit.run_dir import MARK, OutputFolder, our_files
from diffit.source_config import SourceConfig
from diffit.sources import load_image_table
from diffit_model import DiffiTUNet2DModel
from helpers import ROOT, TINY_CONFIG, mentions, run, sample, train


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_kept(before: dict[str, bytes], folder: Path) -> None:
    """Every earlier file still exists, byte for byte."""
    now = contents(folder)
    assert {name: now.get(name) for name in before} == before


def draw_images(folder: Path, names: list[str]) -> None:
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / name)


ONE_STEP = ["--max_train_steps=1", "--num_validation_images=1", "--validation_inference_steps=1"]


@pytest.fixture
def short(train_args) -> list[str]:
    """Flags of a training of one step; the last --output_dir counts."""
    return [*train_args, *ONE_STEP]


@pytest.fixture(scope="module")
def finished_run(base_args, tmp_path_factory) -> Path:
    """The folder of a finished run of one step. Tests must not modify it."""
    run_dir = tmp_path_factory.mktemp("finished")
    train([*base_args, *ONE_STEP, f"--output_dir={run_dir}"])
    return run_dir


@pytest.fixture
def run_folder(finished_run, tmp_path) -> Path:
    """A copy of that folder where `short` would write."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


# --- the mark


def test_changed_and_foreign_files_are_refused_and_stay(tmp_path):
    folder = OutputFolder(tmp_path, "script.py")
    folder.write("a.txt", lambda file: file.write_text("ours"))
    (tmp_path / "b.txt").write_text("theirs")
    OutputFolder(tmp_path, "script.py").check_free(["a.txt", "c.txt", "none/*"])
    with pytest.raises(UserError, match=mentions("--output_dir", "b.txt")):
        OutputFolder(tmp_path, "script.py").check_free(["a.txt", "b.txt"])
    (tmp_path / "a.txt").write_text("ours, edited")
    folder = OutputFolder(tmp_path, "script.py")
    with pytest.raises(UserError, match=mentions("--output_dir", "a.txt")):
        folder.check_free(["a.txt"])
    assert not folder.write("a.txt", lambda file: file.write_text("new"))
    folder.remove(["a.txt", "b.txt"])
    assert (tmp_path / "a.txt").read_text() == "ours, edited" and (tmp_path / "b.txt").read_text() == "theirs"


def test_large_file_is_known_by_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr("diffit.run_dir.HASHED_BYTES", 3)
    folder = OutputFolder(tmp_path, "script.py")
    folder.write("a", lambda file: file.write_text("12345"))
    assert folder.files == {"a": "size:5"} and folder.is_unchanged("a")
    (tmp_path / "a").write_text("123456")
    assert not folder.is_unchanged("a")


def test_file_that_was_being_written_when_the_run_died_is_ours(tmp_path):
    OutputFolder(tmp_path, "script.py").announce(["a.txt", "scratch/"])
    (tmp_path / "scratch").mkdir()
    for name in ("a.txt", "scratch/b.txt"):
        (tmp_path / name).write_text("half")
    folder = OutputFolder(tmp_path, "script.py")
    folder.check_free(["a.txt", "scratch"])
    folder.remove(["a.txt", "scratch/"])
    assert list(contents(tmp_path)) == [MARK]


def test_publishing_keeps_edited_files_and_removes_only_old_parts(tmp_path):
    folder = OutputFolder(tmp_path, "script.py")
    for name in ("README.md", "unet/old.bin", "unet/config.json"):
        folder.write(name, lambda file: file.write_text("1"))
    (tmp_path / "README.md").write_text("edited")
    (tmp_path / "unet" / "notes.txt").write_text("theirs")
    staged = tmp_path / "staged"
    for name in ("README.md", "unet/config.json", "model_index.json"):
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_text("2")
    earlier = ["README.md", "unet/old.bin", "unet/config.json"]
    assert folder.publish(staged, earlier=earlier) == ["README.md"]
    now = {name: data.decode() for name, data in contents(tmp_path).items() if name != MARK}
    assert now == {
        "README.md": "edited",
        "staged/README.md": "2",
        "unet/config.json": "2",
        "unet/notes.txt": "theirs",
        "model_index.json": "2",
    }


@pytest.mark.parametrize("text", ["", "[]", '{"files_written_by": 3}', '{"other": {}}', "{"])
def test_foreign_mark_proves_nothing(text, tmp_path):
    (tmp_path / MARK).write_text(text)
    assert our_files(tmp_path) == {}


# --- training


@pytest.mark.parametrize(
    "name",
    ["README.md", "unet/notes.txt", "vae/a", "model_index.json", "best/4.png", "previews/step_00000001.png"],
)
@pytest.mark.parametrize("flag", ["--no-overwrite_output_dir", "--overwrite_output_dir"])
def test_folder_with_foreign_files_of_our_names_is_refused(name, flag, short, tmp_path):
    (tmp_path / "set" / name).parent.mkdir(parents=True)
    (tmp_path / "set" / name).write_text("written by hand")
    before = contents(tmp_path / "set")
    with pytest.raises(UserError, match=mentions("--output_dir", name)):
        train([*short, f"--output_dir={tmp_path / 'set'}", flag])
    assert contents(tmp_path / "set") == before


@pytest.mark.parametrize("name", ["README.md", "previews", "logs", "unet"])
@pytest.mark.parametrize("kind", ["link", "other"])
def test_link_or_file_of_the_wrong_kind_is_refused(name, kind, short, tmp_path):
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / name
    if kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    elif name == "README.md":
        place.mkdir()
    else:
        place.write_text("mine")
    with pytest.raises(UserError, match=mentions("--output_dir", name)):
        train(short)
    assert place.is_symlink() if kind == "link" else place.exists()


def test_foreign_checkpoint_is_neither_deleted_nor_resumed(short, tmp_path):
    for flag in ("--overwrite_output_dir", "--resume_from_checkpoint=latest"):
        checkpoint = tmp_path / "run" / "checkpoint-1"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "model.safetensors").write_text("of accelerate")
        with pytest.raises(UserError, match=mentions("--output_dir", "checkpoint-1")):
            train([*short, flag])
        assert contents(tmp_path / "run") == {"checkpoint-1/model.safetensors": b"of accelerate"}


def test_overwriting_keeps_the_users_files(short, tmp_path):
    images = ["train/1.png", "train/2.png", "eval/3.png", "previews/5.png", "photos/6.png"]
    draw_images(tmp_path / "set", images)
    before = contents(tmp_path / "set")
    flags = [*short, f"--output_dir={tmp_path / 'set'}", "--overwrite_output_dir"]
    for _ in range(2):  # where no run has been, and where one has
        train(flags)
        assert_kept(before, tmp_path / "set")


def test_overwriting_a_run_keeps_what_others_put_into_its_folders(short, run_folder, tmp_path):
    mine = ["checkpoint-1/notes.txt", "notes.txt"]
    for name in mine:
        (run_folder / name).write_text("mine")
    shared = tmp_path / "shared" / "train_diffit"
    shutil.copytree(run_folder / "logs" / "train_diffit", shared)
    (shared / "events.out.tfevents.999.other").write_text("another run")
    shutil.rmtree(run_folder / "logs")
    (run_folder / "logs").symlink_to(tmp_path / "shared")
    train([*short, "--overwrite_output_dir", "--checkpointing_steps=5"])
    assert all((run_folder / name).read_text() == "mine" for name in mine)
    assert (shared / "events.out.tfevents.999.other").read_text() == "another run"


def test_foreign_logs_are_kept(short, tmp_path):
    logs = tmp_path / "run" / "logs" / "train_diffit"
    logs.mkdir(parents=True)
    (logs / "events.out.tfevents.1.mine").write_text("mine")
    train([*short, "--overwrite_output_dir"])
    assert (logs / "events.out.tfevents.1.mine").read_text() == "mine"


def test_foreign_checkpoint_in_a_run_is_refused_and_stays(short, run_folder):
    for name in ("manifest.json", "w.bin"):
        (run_folder / "checkpoint-7").mkdir(exist_ok=True)
        (run_folder / "checkpoint-7" / name).write_text("{}")
    for flags in (["--overwrite_output_dir"], ["--resume_from_checkpoint=latest", "--checkpoints_total_limit=1"]):
        with pytest.raises(UserError, match=mentions("--output_dir", "checkpoint-7")):
            train([*short, "--max_train_steps=2", *flags])
    assert sorted(contents(run_folder / "checkpoint-7")) == ["manifest.json", "w.bin"]


def test_empty_folders_of_a_checkpoint_are_removed(short, run_folder):
    """A run that was killed at the end of deleting a checkpoint leaves them, and its mark need not list them."""
    (run_folder / "checkpoint-7/unet").mkdir(parents=True)
    train([*short, "--max_train_steps=2", "--resume_from_checkpoint=latest"])
    assert not (run_folder / "checkpoint-7").exists()


def test_edited_model_card_is_refused_at_start_and_kept_in_training(short, run_folder, monkeypatch):
    card = run_folder / "README.md"
    original = card.read_text()
    card.write_text("my card")
    resume = [*short, "--max_train_steps=2", "--resume_from_checkpoint=latest"]
    with pytest.raises(UserError, match=mentions("--output_dir", "README.md")):
        train(resume)
    card.write_text(original)

    save = save_pipeline

    def edit_and_save(*arguments, **keywords):
        card.write_text("edited while it trained")
        save(*arguments, **keywords)

    monkeypatch.setattr("diffit.validation.save_pipeline", edit_and_save)
    train(resume)
    assert card.read_text() == "edited while it trained"


def test_code_is_not_overwritten(base_args, tmp_path):
    """`--output_dir .` in a checkout, with and without the flag to overwrite."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "outputs", "tests", "benchmarks", "docs", "data"))
    before = contents(copy)
    script = (
        "import sys\n"
        "import train_diffit\n"
        "from diffit.command_line import run_script\n"
        "from diffit.config import parse_args\n"
        "for flag in ('--no-overwrite_output_dir', '--overwrite_output_dir'):\n"
        "    try:\n"
        "        run_script(train_diffit.main, parse_args([*sys.argv[1:], flag]))\n"
        "    except SystemExit as end:\n"
        "        print('exit code', end.code)\n"
    )
    output = run(["-c", script, *base_args, "--output_dir=."], cwd=copy)
    refusals = [line for line in output.split("\n") if mentions("--output_dir .", "code").search(line)]
    assert output.count("exit code 2") == len(refusals) == 2
    assert_kept(before, copy)


@pytest.mark.parametrize("inside", ["", "unet"])
def test_model_that_is_fine_tuned_is_not_overwritten(inside, short, tmp_path):
    source = tmp_path / "source"
    DDPMPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler()).save_pretrained(source)
    before = contents(source)
    flags = [flag for flag in short if not flag.startswith(("--model_config", "--class_conditional"))]
    model = f"--pretrained_model_name_or_path={source / inside}"
    for flag in ("--no-overwrite_output_dir", "--overwrite_output_dir"):
        with pytest.raises(UserError, match=mentions("--output_dir", source, "--pretrained_model_name_or_path")):
            train([*flags, model, f"--output_dir={source}", flag])
    assert contents(source) == before


def test_trained_pipeline_without_checkpoints_needs_a_flag_to_replace(short, run_folder):
    shutil.rmtree(run_folder / "checkpoint-1")
    before = contents(run_folder)
    for flags in ([], ["--resume_from_checkpoint=latest"]):
        with pytest.raises(UserError, match=mentions("--output_dir", run_folder, "--overwrite_output_dir")):
            train([*short, *flags])
        assert_kept(before, run_folder)
    train([*short, "--overwrite_output_dir"])
    assert (run_folder / "checkpoint-1").is_dir()


def test_run_of_a_version_without_marks_is_resumed_and_overwritten(short, run_folder):
    (run_folder / MARK).unlink()
    train([*short, "--max_train_steps=2", "--resume_from_checkpoint=latest"])
    assert (run_folder / "checkpoint-2").is_dir()
    (run_folder / MARK).unlink()
    (run_folder / "previews" / "mine.png").write_bytes(b"a picture")
    (run_folder / "README.md").write_text("perhaps edited: nobody can tell")
    train([*short, "--overwrite_output_dir"])
    assert not (run_folder / "checkpoint-2").exists()
    assert (run_folder / "previews" / "mine.png").read_bytes() == b"a picture"
    assert (run_folder / "README.md").read_text() == "perhaps edited: nobody can tell"


# --- data


def table_files(folder: Path) -> list[str]:
    table = load_image_table(SourceConfig(train_data_dir=str(folder)))
    return sorted(Path(image["path"]).relative_to(folder).as_posix() for image in table.rows["image"])


@pytest.mark.parametrize("has_mark", [True, False])
def test_products_below_the_data_are_not_images(has_mark, short, tmp_path, caplog):
    images = ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    draw_images(tmp_path / "set", images)
    run = tmp_path / "set" / "runs" / "a"
    flags = [*short, f"--train_data_dir={tmp_path / 'set'}", f"--output_dir={run}"]
    train(flags)
    assert list(run.glob("previews/*.png"))
    if not has_mark:
        (run / MARK).unlink()
    assert table_files(tmp_path / "set") == images
    assert mentions("2 files", "runs/a").search(caplog.text)
    train([*flags, "--max_train_steps=2", "--resume_from_checkpoint=latest"])  # still the same data
    index = json.loads((run / "model_index.json").read_text())
    assert list(index["id2label"].values()) == ["cat", "dog"]


def test_user_images_are_read_and_our_products_are_not(short, run_folder, tmp_path):
    draw_images(run_folder, ["checkpoint-1/photo.png", "previews/photo.png"])
    assert table_files(tmp_path / "run") == ["checkpoint-1/photo.png", "previews/photo.png"]
    assert table_files(run_folder / "previews") == ["photo.png"]


def test_output_folder_may_be_the_data_folder(short, tmp_path):
    draw_images(tmp_path / "set", ["1.png", "2.png", "3.png", "4.png"])
    before = contents(tmp_path / "set")
    flags = [flag for flag in short if flag != "--class_conditional"]
    flags += [f"--train_data_dir={tmp_path / 'set'}", f"--output_dir={tmp_path / 'set'}"]
    train(flags)
    assert_kept(before, tmp_path / "set")
    assert table_files(tmp_path / "set") == ["1.png", "2.png", "3.png", "4.png"]
    train([*flags, "--max_train_steps=2", "--resume_from_checkpoint=latest"])


def test_output_folder_below_a_folder_for_load_dataset_is_refused(short, tmp_path):
    draw_images(tmp_path / "set", ["1.png", "2.png"])
    flags = [flag for flag in short if not flag.startswith(("--train_data_dir", "--class_conditional"))]
    with pytest.raises(UserError, match=mentions("--output_dir", tmp_path / "set" / "runs", "--dataset_name")):
        train([*flags, f"--dataset_name={tmp_path / 'set'}", f"--output_dir={tmp_path / 'set' / 'runs'}"])
    OutputFolder(tmp_path / "set" / "runs", "x").write("previews/a.png", lambda file: file.write_bytes(b""))
    with pytest.raises(UserError, match=mentions("--dataset_name", "previews/a.png")):
        load_image_table(SourceConfig(dataset_name=str(tmp_path / "set")))


# --- sampling, evaluation


@pytest.fixture
def model(tmp_path) -> Path:
    folder = tmp_path / "model"
    DDPMPipeline(DiffiTUNet2DModel(**TINY_CONFIG), DDPMScheduler()).save_pretrained(folder)
    return folder


def sample_two(model: Path, output_dir: Path, *flags: str) -> None:
    sample(model, output_dir, "--seeds=0-1", "--num_inference_steps=2", "--batch_size=2", *flags)


@pytest.mark.parametrize("name", ["grid.png", "samples.json", "seed_00000000.png"])
def test_sampling_overwrites_no_foreign_file(name, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text('{"samples": []}')  # what FiftyOne writes as samples.json
    with pytest.raises(UserError, match=mentions("--output_dir", name)):
        sample_two(model, tmp_path / "out", "--overwrite_output_dir")
    assert contents(tmp_path / "out") == {name: b'{"samples": []}'}


def test_overwriting_samples_deletes_only_samples(model, tmp_path):
    out = tmp_path / "out"
    sample_two(model, out)
    (out / "notes.txt").write_text("mine")
    retouched = (out / "seed_00000001.png").read_bytes() + b"retouched"
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        sample_two(model, out, "--num_inference_steps=3")
    (out / "seed_00000001.png").write_bytes(retouched)
    sample_two(model, out, "--num_inference_steps=3", "--overwrite_output_dir", "--seeds=5")
    left = ["grid.png", "notes.txt", "samples.json", "seed_00000001.png", "seed_00000005.png"]
    assert sorted(contents(out)) == [MARK, *left]
    assert (out / "seed_00000001.png").read_bytes() == retouched


def test_sampling_into_the_folder_of_a_run_leaves_the_run_alone(short, run_folder):
    before = {name: data for name, data in contents(run_folder).items() if name != MARK}
    for _ in range(2):
        sample_two(run_folder, run_folder, "--overwrite_output_dir")
    assert_kept(before, run_folder)
    train([*short, "--max_train_steps=2", "--resume_from_checkpoint=latest"])


def test_second_sampling_adds_to_the_first(model, tmp_path):
    sample_two(model, tmp_path / "out")
    sample_two(model, tmp_path / "out", "--seeds=7")
    names = [f"seed_{seed:08d}.png" for seed in (0, 1, 7)]
    assert [row["file"] for row in json.loads((tmp_path / "out" / "samples.json").read_text())["images"]] == names
    assert table_files(tmp_path / "out") == names


def test_samples_are_data_only_in_the_folder_that_is_named(model, tmp_path):
    draw_images(tmp_path / "set", ["1.png"])
    sample_two(model, tmp_path / "set" / "samples")
    assert table_files(tmp_path / "set") == ["1.png"]
    assert table_files(tmp_path / "set" / "samples") == ["seed_00000000.png", "seed_00000001.png"]


def test_evaluation_keeps_foreign_files_and_its_arrays_are_not_read(model, image_folder, tmp_path):
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "neighbours.png").write_text("mine")
    (tmp_path / "notes.json").write_text('{"settings": {"editor": 1}}')
    flags = [f"--images={image_folder}", f"--reference={image_folder}", "--feature_extractor=efficientnet_lite0"]
    flags += [f"--work_dir={tmp_path / 'set' / 'work'}", "--num_subsets=2"]
    for flag in (f"--output={tmp_path / 'notes.json'}", f"--plots={tmp_path / 'plots'}"):
        with pytest.raises(UserError, match=flag.split("=")[0]):
            eval_diffit.main(eval_diffit.parse_args([*flags, flag]))
    assert (tmp_path / "plots" / "neighbours.png").read_text() == "mine"
    assert (tmp_path / "notes.json").read_text() == '{"settings": {"editor": 1}}'
    result = tmp_path / "metrics.json"
    for _ in range(2):  # results of ours are replaced
        eval_diffit.main(eval_diffit.parse_args([*flags, f"--output={result}"]))
    draw_images(tmp_path / "set", ["1.png"])
    assert list((tmp_path / "set").rglob("*.npy"))
    assert table_files(tmp_path / "set") == ["1.png"]
