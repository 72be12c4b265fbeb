# Copyright 2026 The DiffiT for diffusers authors. Licensed under the Apache License, Version 2.0.
"""The flags of the training formulation. `diffit.formulations` turns them into a formulation."""

import math
from dataclasses import dataclass

from diffit.command_line import flag, number_type

FORMULATIONS = ("ddpm", "edm", "flow")  # the keys of `diffit.formulations.FORMULATIONS`, whose import is slow

positive_float, non_negative_float = number_type(float, 0, open_ends=True), number_type(float, 0)
any_float, fraction = number_type(float, -math.inf, open_ends=True), number_type(float, 0, 1)


@dataclass(frozen=True)
class DiffusionConfig:
    """The training formulation. If --pretrained_model_name_or_path has a scheduler, the defaults are taken from it."""

    formulation: str | None = flag(
        None,
        "ddpm: discrete timesteps; edm: continuous noise levels with preconditioning, arXiv 2206.00364; flow: "
        "rectified flow, straight paths from images to noise, arXiv 2209.03003 (default: that of "
        "--pretrained_model_name_or_path, otherwise ddpm)",
        choices=FORMULATIONS,
        fixed=True,
    )
    sigma_mean: float | None = flag(None, "EDM only: mean of ln sigma (default: -1.2)", type=any_float, fixed=True)
    sigma_std: float | None = flag(
        None, "EDM only: standard deviation of ln sigma (default: 1.2)", type=positive_float, fixed=True
    )
    prediction_type: str | None = flag(
        None,
        "prediction target; DDPM: epsilon, sample or v_prediction; flow: flow (the velocity, noise minus image) or "
        "sample (the image) (default: that of --pretrained_model_name_or_path, otherwise v_prediction or flow)",
        choices=("epsilon", "sample", "v_prediction", "flow"),
        fixed=True,
    )
    beta_schedule: str | None = flag(
        None,
        "DDPM only: noise schedule (default: that of --pretrained_model_name_or_path, otherwise squaredcos_cap_v2)",
        choices=("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
        fixed=True,
    )
    num_train_timesteps: int | None = flag(
        None,
        "DDPM only: number of timesteps (default: that of --pretrained_model_name_or_path, otherwise 1000)",
        type=number_type(int, 1),
        fixed=True,
    )
    snr_gamma: float | None = flag(
        None,
        "DDPM only: cap of the signal-to-noise ratio in the min-SNR loss weights (arXiv 2303.09556); 0 disables the "
        "weighting (default: 5 for v_prediction, otherwise 0)",
        type=non_negative_float,
        fixed=True,
    )
    timestep_sampling: str | None = flag(
        None,
        "flow only: distribution of the fraction of noise before the shift, arXiv 2403.03206 (default: logit_normal)",
        choices=("logit_normal", "uniform"),
        fixed=True,
    )
    logit_mean: float | None = flag(
        None,
        "flow with logit_normal only: mean of the logit of the fraction of noise; below 0, images with less noise are "
        "trained more often (default: 0)",
        type=any_float,
        fixed=True,
    )
    logit_std: float | None = flag(
        None,
        "flow with logit_normal only: standard deviation of the logit of the fraction of noise (default: 1)",
        type=positive_float,
        fixed=True,
    )
    flow_shift: float | None = flag(
        None,
        "flow only: shift of the fractions of noise toward more noise, in training and sampling; 1 is none (default: "
        "that of --pretrained_model_name_or_path, otherwise the square root of the network's input size, channels x "
        "height x width, over 4096, and at least 1)",
        type=positive_float,
        fixed=True,
    )
    label_dropout: float = flag(
        0.1,
        "fraction of class labels replaced by the null class, which classifier-free guidance needs",
        type=fraction,
        fixed=True,
    )
