"""Converts a Llama-shaped GGUF file to an ordinary Hugging Face folder with dequantised weights."""

from __future__ import annotations

from pathlib import Path

from echox.errors import AlteredModelError


def convert(source: Path, target: Path) -> None:
    """Write a Hugging Face causal LM folder (fp32, so that dequantising loses nothing) with its chat template.

    Args:
        source: the `.gguf` file.
        target: empty folder that gets weights, configuration, generation configuration and tokenizer.

    Raises:
        AlteredModelError: a key of the Hugging Face model is missing, or one is left over.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder, name = str(source.parent), source.name
    loaded = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    config = loaded.config
    # A model loaded from GGUF carries a quantisation note that makes transformers refuse to save it.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = type(loaded)(config)
    missing, extra = model.load_state_dict(loaded.state_dict(), strict=False, assign=True)
    if missing or extra:
        raise AlteredModelError(f"GGUF conversion misses {missing} and has left over {extra}", where=str(source))
    model.generation_config = loaded.generation_config
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
