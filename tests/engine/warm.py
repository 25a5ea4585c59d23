"""Imported once by the server that the ranks of the engine tests are forked from."""

import importlib

import torch

for _name in (
    "deepspeed",
    "deepspeed.ops.adam",
    "echox.config.deepspeed",
    "echox.builders.setup",
    "echox.engine.trainer",
    "echox.stream.collate",
    "safetensors.torch",
    "transformers.models.llama.modeling_llama",
    "transformers.models.whisper.modeling_whisper",
):
    importlib.import_module(_name)

torch.set_num_threads(1)
