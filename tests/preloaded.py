"""What the fork server imports so that ranks need not: DeepSpeed, and what engines import of it."""

from __future__ import annotations

import importlib

import torch

from train.engine import load_deepspeed

load_deepspeed(torch.device("cpu"))
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
# torch's optimizers import it when they get their first parameters.
importlib.import_module("torch._dynamo")
