"""Counts what the host does for a training step as the number of ranks grows, on one CPU.

One process stands for rank 0 of a world whose collectives do nothing (torch's fake process group), with the layers of
the real models at tiny widths, so that next to nothing is computed: what is left is Python and launching.

    python -m echox.bench.host_cost 3b/s2t --ranks 8 64 512
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TINY = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
TINY |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
TINY_WHISPER = {"d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_layers": 1}
TINY_WHISPER |= {"decoder_attention_heads": 2, "decoder_ffn_dim": 32, "encoder_layers": 2}
TINY_T2C = {"width": 32, "heads": 2, "ffn": 32}


def measure(recipe_name: str, ranks: int, *, steps: int = 3, placement: str = "replicate") -> dict[str, float]:
    """Steps of rank 0 in a world of `ranks`; to be called once in a process.

    Returns:
        `trainable` tensors that ZeRO-3 sees, `cpu_s` of the fastest step, and of one step `python_calls` and
        `operators` (kernels and views; slices and padding for every rank are among them).
    """
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from echox.bench.micro_batch import Load
    from echox.bench.step import synthetic_batch
    from echox.config.load import load_recipe
    from echox.engine.deepspeed_engine import Engine, prepare_deepspeed
    from echox.engine.frozen import replicate_as_buffers
    from echox.engine.loss_guard import LossGuard
    from echox.engine.step import train_step
    from echox.engine.world import World
    from echox.release.shapes import SHAPES

    torch.manual_seed(0)
    torch.set_num_threads(1)
    os.environ.update(RANK="0", WORLD_SIZE=str(ranks), LOCAL_RANK="0")  # DeepSpeed reads them
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    device = torch.device("cpu")
    prepare_deepspeed(device)
    for shape in SHAPES.values():
        shape.update(TINY_WHISPER if shape["model_type"] == "whisper" else TINY)
    recipe = load_recipe(recipe_name, ["engine.precision=fp32", "model.random_init=true", *_tiny_t2c(recipe_name)])
    # The world of the step is of one, so that it has no group between the hosts.
    world = World(0, 1, device)
    stage, batch = synthetic_batch(recipe, Load(rows=2, response=8, words=20), 0)
    stage.train()
    if placement == "replicate":
        replicate_as_buffers(stage, device, torch.float32)
    zero = {"stage": 3, "overlap_comm": False, "stage3_max_reuse_distance": 1_000_000}
    config = {
        "train_batch_size": 2 * ranks,
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {**zero, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000_000},
    }
    engine = Engine(recipe, stage, device=device, precision="fp32", config=config)
    health = LossGuard(recipe.health, device)
    seconds = []
    for step in range(2 + steps):
        began = time.process_time()
        train_step(engine, [batch], step, world, health)
        seconds.append(time.process_time() - began)
    calls, operators = Counter[str](), _operators()

    def note(frame: Any, event: str, argument: Any) -> None:
        calls[event] += 1

    sys.setprofile(note)
    train_step(engine, [batch], steps, world, health)
    sys.setprofile(None)
    with operators:
        train_step(engine, [batch], steps + 1, world, health)
    return {
        "ranks": ranks,
        "trainable": sum(parameter.requires_grad for parameter in engine.stage.parameters()),
        "cpu_s": min(seconds[2:]),
        "python_calls": calls["call"] + calls["c_call"],
        "operators": operators.count,
    }


def measured_apart(recipe_name: str, ranks: int, **options: Any) -> dict[str, float]:
    """`measure` in a process of its own."""
    code = f"import json; from {__name__ if __name__ != '__main__' else 'echox.bench.host_cost'} import measure; "
    code += f"print('\\n' + json.dumps(measure({recipe_name!r}, {ranks}, **{options!r})))"
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "stderr"
        with said.open("w") as errors:
            found = subprocess.run(
                [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors, text=True, check=False
            )
        if found.returncode:
            raise RuntimeError(said.read_text()[-4000:])
    return dict(json.loads(found.stdout.strip().splitlines()[-1]))


def _tiny_t2c(recipe_name: str) -> list[str]:
    if recipe_name.endswith("/s2t"):
        return []
    more = ["model.echo.labels=teacher"] if recipe_name.endswith("/echo") else []
    return [*(f"model.t2c.{key}={value}" for key, value in TINY_T2C.items()), *more]


def _operators() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Operators(TorchDispatchMode):
        """Counts all operators, views too."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    return Operators()


def main() -> None:
    """Print a line a number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--placement", default="replicate", choices=["replicate", "shard"])
    given = parser.parse_args()
    print("ranks  trainable  CPU-s a step  Python calls  operators")
    for ranks in given.ranks:
        row = measured_apart(given.recipe, ranks, placement=given.placement)
        print(
            "{ranks:5.0f}  {trainable:9.0f}  {cpu_s:12.3f}  {python_calls:12.0f}  {operators:9.0f}".format(**row),
            flush=True,
        )


if __name__ == "__main__":
    main()
