# The commands of the project. `make quickstart` and `make test` need nothing but Python and this folder.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# `constraints.txt` pins what was tested; `make install CONSTRAINTS=` takes the newest that requirements.txt allows.
CONSTRAINTS ?= -c constraints.txt
QUICKSTART = outputs/quickstart
LATENT = outputs/latent-digits

.PHONY: install install-dev quickstart latent-quickstart say-quickstart say-latent-quickstart test test-slow test-slurm test-cpus chaos orphans quality style benchmark benchmark-gpu benchmark-quality benchmark-quality-tuning same-numbers

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt constraints.txt
	@echo "Installing into $(VENV), once: a few minutes. With a CUDA build of PyTorch it takes 6 GB on the disk."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -r requirements.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -r requirements-dev.txt
	touch $@

quickstart: say-quickstart install
	$(BIN)/python train_diffit.py --config configs/train/quickstart.yaml --output_dir $(QUICKSTART) --overwrite_output_dir
	$(BIN)/python sample_diffit.py --model_path $(QUICKSTART) --output_dir $(QUICKSTART)/samples \
		--overwrite_output_dir --class_labels all --num_images_per_class 10 --guidance_scale 1.5 --batch_size 100

say-quickstart:
	@echo "This trains a DiffiT of 1.4 M parameters on 1,797 handwritten digits, about 3 minutes on two CPU cores,"
	@echo "and then draws ten of each digit: look at $(QUICKSTART)/samples/grid.png."

# The same in latents: a small VAE, the digits' latents, DiffiT in them, ten digits of each class.
latent-quickstart: say-latent-quickstart install
	$(BIN)/python scripts/train_vae.py --train_data_file data/digits.parquet --output_dir $(LATENT)/vae
	$(BIN)/python scripts/prepare_latents.py --train_data_file data/digits.parquet --resolution 32 --no-mirror \
		--vae_model_name_or_path $(LATENT)/vae --output_dir $(LATENT)/latents
	$(BIN)/python train_diffit.py --config configs/train/latent_digits.yaml --vae_model_name_or_path $(LATENT)/vae \
		--latents_dir $(LATENT)/latents --output_dir $(LATENT)/run --overwrite_output_dir
	$(BIN)/python sample_diffit.py --model_path $(LATENT)/run --output_dir $(LATENT)/samples \
		--overwrite_output_dir --class_labels all --num_images_per_class 10 --guidance_scale 1.5 --batch_size 100

say-latent-quickstart:
	@echo "This trains a small VAE on 1,797 handwritten digits, encodes them, trains a DiffiT in its latents, and draws ten"
	@echo "of each digit: 7 to 17 minutes on a CPU. Look at $(LATENT)/samples/grid.png."

test: install-dev
	$(BIN)/python -m pytest

test-slow: install-dev
	$(BIN)/python -m pytest -m slow

test-slurm: install-dev
	$(BIN)/python -m pytest -m slurm

# The tests under the instruction sets and thread counts of other CPUs: about half an hour on two cores.
test-cpus: install-dev
	PYTHON=$(BIN)/python tests/cpus.sh

KILLS = 50
chaos: install-dev
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/test_chaos.py

# Kills the launcher alone; SEED=N chooses other moments.
orphans: KILLS = 10
orphans: install-dev
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/test_orphans.py

quality: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: install-dev
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/data_path.py

# On a machine with a CUDA device: is it right there, and how fast? `python benchmarks/gpu.py --quick` is shorter.
benchmark-gpu: install-dev
	$(BIN)/python benchmarks/gpu.py

# Is DiffiT worth it? About two hours on two cores; the tuning, whose figures it reads, about two hours more.
benchmark-quality: install-dev
	$(BIN)/python benchmarks/quality.py prove
	$(BIN)/python benchmarks/quality_report.py

benchmark-quality-tuning: install-dev
	$(BIN)/python benchmarks/quality.py tune

# Does the working tree give bit for bit the numbers of a commit? Minutes. `--allow PATTERN` in ALLOW for what is meant.
BASE ?= HEAD
ALLOW ?=
same-numbers: install-dev
	$(BIN)/python benchmarks/same_numbers.py $(BASE) $(ALLOW)
