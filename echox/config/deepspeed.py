"""Checks and completes the DeepSpeed JSON.

DeepSpeed silently accepts a misspelt top-level key and then runs with its default (`gradient_cliping: 0.1` clips at
1.0), so the top level is checked here against the keys it reads; sub-sections are checked through DeepSpeed's own
models. What the recipe already says (batch sizes, precision, clipping) is written by us, never left to a default.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from echox.config.mistakes import Mistake, did_you_mean, raise_all, shown
from echox.files import read_text

# Filled from the recipe; the file may leave them out or say "auto".
FILLED = {
    "train_batch_size": "data.global_batch",
    "train_micro_batch_size_per_gpu": "data.micro_batch",
    "gradient_accumulation_steps": "data.global_batch, data.micro_batch and scaling.workers",
    "gradient_clipping": "optim.clip",
    "bf16": "engine.precision",
}
# Sections that would decide what the recipe decides.
OWNED = {
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "engine.precision",
    "torch_autocast": "engine.precision",
    "pipeline": "the stage",
    "data_efficiency": "data",
    "dataloader_drop_last": "data",
    "monitor": "tracking",
    "tensorboard": "tracking",
    "wandb": "tracking",
    "csv_monitor": "tracking",
    "comet": "tracking",
    "autotuning": "the recipe",
    "hybrid_engine": "the stage",
    "tensor_parallel": "the stage",
    "expert_parallel": "the stage",
}
# Top-level keys DeepSpeed 0.19 reads and a recipe has no say in; None where the value is no section with its own model.
PASSED: dict[str, str | None] = {
    "zero_optimization": "deepspeed.runtime.zero.config:DeepSpeedZeroConfig",
    "comms_logger": "deepspeed.comm.config:CommsLoggerConfig",
    "compile": "deepspeed.compile.config:CompileConfig",
    "activation_checkpointing": None,
    "aio": None,
    "checkpoint": None,
    "communication_data_type": None,
    "data_types": None,
    "datastates_ckpt": None,
    "disable_allgather": None,
    "disable_python_gc": None,
    "dump_state": None,
    "flops_profiler": None,
    "gradient_allreduce_op": None,
    "gradient_predivide_factor": None,
    "log_level": None,
    "managed_gradient_accumulation": None,
    "memory_breakdown": None,
    "prescale_gradients": None,
    "seq_parallel_communication_data_type": None,
    "steps_per_print": None,
    "timers": None,
    "wall_clock_breakdown": None,
    "zero_allow_untested_optimizer": None,
    "zero_force_ds_cpu_optimizer": None,
}
# Sections DeepSpeed reads key by key, without a model that would refuse a misspelt one.
PLAIN_SECTIONS: dict[str, frozenset[str]] = {
    "activation_checkpointing": frozenset(
        {
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "cpu_checkpointing",
            "profile",
        }
    ),
    "aio": frozenset(
        {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
    ),
    "checkpoint": frozenset(
        {
            "tag_validation",
            "load_universal",
            "use_node_local_storage",
            "parallel_write",
            "writer",
            "checkpoint_serialization",
        }
    ),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "flops_profiler": frozenset(
        {"enabled", "recompute_fwd_factor", "profile_step", "module_depth", "top_modules", "detailed", "output_file"}
    ),
}
BF16_KEYS = (
    "enabled",
    "immediate_grad_update",
    "check_grad_overflow",
    "bf16_master_weights_and_grads",
    "bf16_optimizer_states",
)


def check_file(path: Path) -> list[Mistake]:
    """Mistakes that can be seen without DeepSpeed: no file, no JSON, top-level keys, owned sections, stray "auto".

    Cheap enough for the process that only submits a job.
    """
    return _read(path)[1]


def load_deepspeed(
    path: str | Path,
    *,
    global_batch: int,
    micro_batch: int,
    world_size: int,
    clip: float,
    precision: Literal["bf16", "fp32"],
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of a run.

    Args:
        path: JSON file.
        global_batch: samples in one optimizer step over all ranks.
        micro_batch: samples in one forward on one rank.
        world_size: number of ranks.
        clip: largest global gradient norm.
        precision: of parameters and activations under the engine.

    Raises:
        RecipeError: every mistake in the file, and every value in it that contradicts the recipe.
    """
    file = Path(path)
    config, mistakes = _read(file)
    per_step = micro_batch * world_size
    if global_batch % per_step:
        rule = (
            f"a global batch of {global_batch} is not a multiple of micro-batch * ranks = {micro_batch} * {world_size}"
        )
        mistakes.append(Mistake("", rule, f"choose a multiple of {per_step}"))
    fill: dict[str, Any] = {
        "train_batch_size": global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": max(1, global_batch // per_step),
        "gradient_clipping": clip,
    }
    for key, value in fill.items():
        given = config.get(key, "auto")
        if given != "auto" and given != value:
            rule = f"contradicts the recipe, where {FILLED[key]} makes it {shown(value)}"
            mistakes.append(Mistake(f"{key}={shown(given)}", rule, 'write "auto"'))
    mistakes += _precision_mistakes(config, precision)
    mistakes += _section_mistakes(config)
    mistakes += _rank_mistakes(config, world_size)
    raise_all(mistakes, str(path))
    bf16 = config.get("bf16", {})
    sections = dict(bf16) if isinstance(bf16, Mapping) else {}
    return {**config, **fill, "bf16": {**sections, "enabled": precision == "bf16"}}


def _read(path: Path) -> tuple[dict[str, Any], list[Mistake]]:
    try:
        config = json.loads(read_text(path), object_pairs_hook=_no_key_twice)
    except FileNotFoundError:
        return {}, [Mistake("", f"DeepSpeed JSON {path} does not exist", "see ds_configs for those that do")]
    except json.JSONDecodeError as error:
        rule = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        return {}, [Mistake("", rule, "correct that line")]
    except (OSError, UnicodeDecodeError, ValueError) as error:
        return {}, [Mistake("", f"DeepSpeed JSON cannot be used: {error}", "correct the file")]
    if not isinstance(config, dict):
        return {}, [Mistake("", "a DeepSpeed JSON is one object", "see ds_configs")]
    return config, _top_level_mistakes(config)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f'key "{next(n for n in names if names.count(n) > 1)}" is given twice')
    return result


def _top_level_mistakes(config: Mapping[str, Any]) -> list[Mistake]:
    found: list[Mistake] = []
    for key, value in config.items():
        if key in OWNED:
            found.append(Mistake(key, f"belongs to the recipe ({OWNED[key]})", "remove it from the DeepSpeed JSON"))
        elif key not in FILLED and key not in PASSED:
            rule = "unknown key, which DeepSpeed would ignore without a word"
            found.append(Mistake(key, rule, did_you_mean(key, {*FILLED, *PASSED})))
        elif key not in FILLED:
            found += _stray_auto(key, value)
        for_section = PLAIN_SECTIONS.get(key)
        if for_section is not None:
            if not isinstance(value, Mapping):
                found.append(Mistake(f"{key}={shown(value)}", "must be a section with keys", "write an object"))
                continue
            for name in value:
                if name not in for_section:
                    found.append(Mistake(f"{key}.{name}", "unknown key", did_you_mean(name, for_section)))
    return found


def _stray_auto(key: str, value: Any) -> list[Mistake]:
    """ "auto" that is not filled from the recipe: DeepSpeed drops it and silently takes its default."""
    if value == "auto" and key != "data_types.keep_in_fp32_modules":
        return [
            Mistake(f'{key}="auto"', "is not filled by anyone", f'write a value; "auto" is for {", ".join(FILLED)}')
        ]
    if isinstance(value, Mapping):
        return [mistake for name, item in value.items() for mistake in _stray_auto(f"{key}.{name}", item)]
    return []


def _precision_mistakes(config: Mapping[str, Any], precision: str) -> list[Mistake]:
    section = config.get("bf16", {})
    if section == "auto":
        return []
    if not isinstance(section, Mapping):
        return [Mistake(f"bf16={shown(section)}", "must be a section with keys", 'write {"enabled": "auto"}')]
    found = [Mistake(f"bf16.{k}", "unknown key", did_you_mean(k, BF16_KEYS)) for k in section if k not in BF16_KEYS]
    enabled = section.get("enabled", "auto")
    if enabled != "auto" and enabled != (precision == "bf16"):
        rule = f"contradicts the precision of this run, {precision}"
        found.append(Mistake(f"bf16.enabled={shown(enabled)}", rule, 'write "auto", or set engine.precision'))
    return found


def _section_mistakes(config: Mapping[str, Any]) -> list[Mistake]:
    """Sub-sections through DeepSpeed's own pydantic models, imported only here: the import takes seconds."""
    found: list[Mistake] = []
    for key, model in PASSED.items():
        if model is None or key not in config:
            continue
        section = config[key]
        if not isinstance(section, Mapping):
            found.append(Mistake(f"{key}={shown(section)}", "must be a section with keys", "write an object"))
            continue
        module, _, name = model.partition(":")
        schema = getattr(importlib.import_module(module), name)
        try:
            schema(**section)
        except ValidationError as error:
            known = {field.alias or field_name for field_name, field in schema.model_fields.items()}
            for detail in error.errors(include_url=False):
                where = ".".join([key, *map(str, detail["loc"])])
                if detail["type"] == "extra_forbidden":
                    siblings = known if len(detail["loc"]) == 1 else set()
                    found.append(Mistake(where, "unknown key", did_you_mean(str(detail["loc"][-1]), siblings)))
                else:
                    found.append(Mistake(f"{where}={shown(detail['input'])}", detail["msg"], "correct the value"))
        except (AssertionError, ValueError) as error:
            found.append(Mistake(key, str(error), "correct the section"))
    return found


def _rank_mistakes(config: Mapping[str, Any], world_size: int) -> list[Mistake]:
    """Settings that fit neither the number of ranks nor our optimizer."""
    zero = config.get("zero_optimization")
    if not isinstance(zero, Mapping):
        return [Mistake("zero_optimization", "missing", 'write {"stage": 3}')] if zero is None else []
    found: list[Mistake] = []
    group = zero.get("zero_hpz_partition_size", 1)
    if isinstance(group, int) and group > 1 and world_size % group:
        rule = f"does not divide the number of ranks, {world_size}"
        found.append(
            Mistake(f"zero_optimization.zero_hpz_partition_size={group}", rule, "set it to the GPUs of one node")
        )
    offload = zero.get("offload_optimizer")
    device = offload.get("device") if isinstance(offload, Mapping) else None
    if device not in (None, "none") and config.get("zero_force_ds_cpu_optimizer", True):
        rule = "must be false with zero_optimization.offload_optimizer: the optimizer is torch's AdamW"
        found.append(Mistake("zero_force_ds_cpu_optimizer", rule, "set it to false"))
    return found
