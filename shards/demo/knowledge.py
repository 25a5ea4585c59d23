"""Asks the text LLM what it knows by itself: greedy answers to written questions, in the speech model's own prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPT = "<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
"""A user turn alone: the speech model's prompt with the question's text in place of its sound."""

_MAX_NEW_TOKENS = 16


class TextModel:
    """A causal LM that answers batches of written questions.

    Args:
        folder: Hugging Face folder of a model with ChatML turns.
    """

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ask(
        self, questions: Sequence[str], progress: Callable[[int, int], None] | None = None, batch: int = 128
    ) -> list[str]:
        """Greedy answers, one a question, each up to its first line end or the end of its first sentence.

        Args:
            questions: written questions.
            progress: called with (questions done, questions in all) after each batch.
            batch: questions at a time.
        """
        import torch
        from transformers import StoppingCriteria, StoppingCriteriaList

        tokenizer = self._tokenizer
        ends = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids([".", "Ċ"])}
        ends_E = torch.tensor(sorted(number for number in ends if number is not None))

        class SentenceEnd(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
                return torch.isin(input_ids[:, -1], ends_E)

        # Equal lengths together: left padding then costs next to nothing.
        order = sorted(range(len(questions)), key=lambda index: len(questions[index]))
        answers = [""] * len(questions)
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            prompts = [PROMPT.format(question=questions[index]) for index in chosen]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True)
            with torch.inference_mode():
                output_BT = self._model.generate(
                    **inputs,
                    max_new_tokens=_MAX_NEW_TOKENS,
                    do_sample=False,
                    stopping_criteria=StoppingCriteriaList([SentenceEnd()]),
                )
            new_BT = output_BT[:, inputs["input_ids"].shape[1] :]
            for index, text in zip(chosen, tokenizer.batch_decode(new_BT, skip_special_tokens=True), strict=True):
                answers[index] = text.strip()
            if progress is not None:
                progress(start + len(chosen), len(questions))
        return answers
