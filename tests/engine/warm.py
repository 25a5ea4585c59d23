"""Imported once by the server that the ranks of the engine tests are forked from."""

import deepspeed  # noqa: F401
import torch

import echox.engine.setup
import echox.engine.train
import echox.stream.collate  # noqa: F401

torch.set_num_threads(1)
