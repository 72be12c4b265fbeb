# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The library behind the scripts at the top of this repository. Where to look:

    ../diffit_model.py                the networks of the paper        } both travel with every saved model and import
    ../diffit_pipeline.py             samplers, schedulers, guidance   } nothing from this package
    ../train_diffit.py                the training loop

    config                            what may be asked of a training, and what must stay the same when it is resumed
    plan                              what follows from that, from the data and from the processes
    source_config, validation_config  flags for where images come from, and for what is measured during a training
    config_file                       YAML lists of flags
    latents_config, vae_config,       settings of prepare_latents.py, train_vae.py and
    convert_config                        convert_nvidia_checkpoint.py
    sources, decode, stream, latents  images or prepared latents, to the tensors at a position of the stream
    image_formats, colour_profiles    what the numbers in an image file mean; other colour spaces to sRGB
    batches, augment                  a micro-batch on the device: encoded, augmented, noisy
    formulations                      DDPM and EDM: noise levels, network inputs, loss, schedulers
    networks                          build, adapt, load and place networks and VAEs; attention backends
    cpu_kernels                       fast CPU layers put in place of the reference ones
    optimization                      AdamW, Muon, schedules, averages, skipped steps, the state of a training
    checkpoint, run_dir, lock         what is saved, what in a folder is ours, and which run owns it
    processes, launcher               several processes: start, agreement, stop signals, launchers that die
    logs, validation, export          trackers; held-out loss, metrics, previews; the pipeline folder and the hub
                                          (model_card.md is its template)
    sampling_config, sampling         settings of sampling and their rules; load a model, sample seeds (the samplers
                                          themselves are in diffit_pipeline.py)
    eval_config, evaluation           settings of an evaluation; samples and features kept on disk
    image_sets, features              images from folders, zips, npz, ...; feature extractors
    metrics, plots                    Frechet and kernel distance and others; plots of an evaluation
    command_line, errors              how flags are read, and how an error ends a script

No module imports one that imports it. A script imports something of this package before diffusers, which imports
xformers where that is installed.
"""

import logging


def _has_cuda(record: logging.LogRecord) -> bool:
    import torch

    return torch.cuda.is_available()


# Without a CUDA device nothing uses xformers, and "Please reinstall xformers" would be a newcomer's first screen.
logging.getLogger("xformers").addFilter(_has_cuda)
