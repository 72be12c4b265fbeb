# Commands of this project. `make quickstart` and `make test` need only Python and this repository.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# `constraints.txt` pins the tested versions. `make install CONSTRAINTS=` installs the newest releases that
# requirements.txt allows.
CONSTRAINTS ?= -c constraints.txt
QUICKSTART = outputs/quickstart
LATENT = outputs/latent-digits

.PHONY: install install-dev quickstart latent-quickstart say-quickstart say-latent-quickstart test test-slow test-slurm test-cpus chaos orphans quality style benchmark benchmark-gpu counts benchmark-quality benchmark-quality-tuning same-numbers

install: $(VENV)/installed
install-dev: $(VENV)/installed-dev

$(VENV)/installed: requirements.txt constraints.txt
	@echo "Installing into $(VENV). This takes a few minutes, once; a CUDA build of PyTorch needs 6 GB on disk."
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
	@echo "Training a DiffiT with 1.4 M parameters on 1,797 handwritten digits (about 3 minutes on two CPU cores) and then"
	@echo "generating ten of each digit. Result: $(QUICKSTART)/samples/grid.png"

# The same in latent space: train a small VAE, encode the digits, train a DiffiT on the latents, sample ten per class.
latent-quickstart: say-latent-quickstart install
	$(BIN)/python train_vae.py --train_data_file data/digits.parquet --output_dir $(LATENT)/vae
	$(BIN)/python prepare_latents.py --train_data_file data/digits.parquet --resolution 32 --no-mirror \
		--vae_model_name_or_path $(LATENT)/vae --output_dir $(LATENT)/latents
	$(BIN)/python train_diffit.py --config configs/train/latent_digits.yaml --vae_model_name_or_path $(LATENT)/vae \
		--latents_dir $(LATENT)/latents --output_dir $(LATENT)/run --overwrite_output_dir
	$(BIN)/python sample_diffit.py --model_path $(LATENT)/run --output_dir $(LATENT)/samples \
		--overwrite_output_dir --class_labels all --num_images_per_class 10 --guidance_scale 1.5 --batch_size 100

say-latent-quickstart:
	@echo "Training a small VAE on 1,797 handwritten digits, encoding them, training a DiffiT on the latents and"
	@echo "generating ten of each digit (7 to 17 minutes on a CPU). Result: $(LATENT)/samples/grid.png"

test: install-dev
	$(BIN)/python -m pytest

test-slow: install-dev
	$(BIN)/python -m pytest -m slow

test-slurm: install-dev
	$(BIN)/python -m pytest -m slurm

# Runs the tests with the instruction sets and thread counts of other CPUs; about half an hour on two cores.
test-cpus: install-dev
	PYTHON=$(BIN)/python tests/cpus.sh

KILLS = 50
chaos: install-dev
	KILLS=$(KILLS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s tests/test_chaos.py

# Kills only the launcher; SEED=N chooses other moments.
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
	$(BIN)/python -m benchmarks.speed
	$(BIN)/python -m benchmarks.reliability
	$(BIN)/python -m benchmarks.loop
	$(BIN)/python -m benchmarks.data_path

# Checks correctness and speed on a CUDA machine. `python -m benchmarks.gpu --quick` is shorter.
benchmark-gpu: install-dev
	$(BIN)/python -m benchmarks.gpu

# Operators, bytes, host synchronizations and memory of each config, counted without a GPU in a few minutes.
counts: install-dev
	$(BIN)/python -m benchmarks.counts

# Is DiffiT worth it? About two hours on two cores, plus two more for the tuning, whose results this one reads.
benchmark-quality: install-dev
	$(BIN)/python -m benchmarks.quality prove
	$(BIN)/python -m benchmarks.quality_report

benchmark-quality-tuning: install-dev
	$(BIN)/python -m benchmarks.quality tune

# Does the working tree reproduce the numbers of commit BASE bit for bit? Takes minutes. Set ALLOW="--allow PATTERN" for
# intended differences.
BASE ?= HEAD
ALLOW ?=
same-numbers: install-dev
	$(BIN)/python benchmarks/same_numbers.py $(BASE) $(ALLOW)
