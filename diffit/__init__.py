# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The library behind the scripts at the top of this repository. Where to look:

    ../diffit_model.py                the networks of the paper        } both travel with every saved model and import
    ../diffit_pipeline.py             samplers, schedulers, guidance   } nothing from this package
    ../train_diffit.py                the training loop

    config                            training flags, and which of them must not change when a run is resumed
    plan                              everything derived from the flags, the data and the processes
    diffusion_config, source_config,  flags of the formulation, of image sources, of measurements during training, and
    validation_config, device_config      of the device
    config_file                       YAML lists of flags
    latents_config, vae_config,       flags of prepare_latents.py, train_vae.py and
    convert_config                        convert_nvidia_checkpoint.py
    sources, decode, stream, latents  reading images or prepared latents; the tensors at each position of the stream
    image_formats, colour_profiles    what the numbers in an image file mean; other color spaces to sRGB
    listing, labels                   the files in a folder or zip of images, and their classes
    packing, decoded_images           a micro-batch in one block of memory; small data sets that stay decoded in memory
    batches, augment                  micro-batches on the device: VAE encoding, augmentation, noise
    formulations                      DDPM, EDM and rectified flow: noise levels, network inputs, loss, schedulers
    losses, learned_variance          the loss of a batch; that of a variance which the network predicts
    scheduler_configs                 configs of saved schedulers, with their classes' defaults
    pretrained                        models to start from: which weights a path means, how they were trained
    sharding                          weights, optimizer and averages sharded by FSDP2
    networks                          building, loading, adapting and placing networks and VAEs; attention backends
    cpu_kernels                       fast CPU layers that replace the reference ones
    weight_copies                     weights in low precision for training under autocast
    optimization                      AdamW, Muon, learning-rate schedules, EMA, non-finite steps, the training state
    checkpoint, run_dir, lock         saving and resuming; which files in a folder are ours; which run owns a folder
    devices                           a GPU that cannot be used, answers of `accelerate config`, TensorFloat-32
    processes, launcher               joining processes, agreement, stop signals; the death of a launcher
    logs, validation, export          trackers; held-out loss, metrics, previews; the pipeline folder and the hub
                                          (model_card.md is its template)
    sampling_config, sampling         sampling flags and their rules; loading a pipeline, sampling seeds (the samplers
                                          themselves are in diffit_pipeline.py)
    eval_config, evaluation, sweep    evaluation flags; cached samples and features; combinations of settings
    image_sets, features              images from folders, zips, npz, ...; feature extractors
    metrics, plots                    Frechet distance, kernel distance and others; plots of an evaluation
    command_line, errors              parsing flags; reporting errors

The imports form no cycle. A script must import this package before diffusers, because diffusers imports xformers if it
is installed, whose warnings are filtered below.
"""

import logging

# xformers warns when it is imported, by diffusers, that it was built for another torch. Nobody needs its own kernels:
# the operator that takes our bias is torch's. If even that is missing, `--attention_backend xformers` says why.
logging.getLogger("xformers").setLevel(logging.ERROR)
