"""Defines the `model` section of a recipe: every part of the speech-to-speech model, its sizes and its options.

"U1" to "U27" number the paper's unknowns. Descriptions and docstrings are also the text of `README.md` beside this
file.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveFloat, PositiveInt, model_validator

from echox.config.section import Free, Guarded, Section


def _targets(given: object) -> object:
    if given == "auto":
        return ("auto",)
    return tuple(given) if isinstance(given, list) else given  # strict: what a validator hands on must be the type


class LoraConfig(Section):
    """Low-rank adaptation of the LLM's linear maps (U6)."""

    r: PositiveInt = Field(64, description="rank of the update; 64 fits the published number of trainable parameters")
    alpha: PositiveFloat = Field(
        16.0, description="scale numerator: the update is alpha/r * BA; 16 as in Soundwave, on which Stage I is built"
    )
    dropout: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="share of the inputs of A dropped while training; 0.05 as in Qwen's fine-tuning script",
    )
    targets: Annotated[tuple[str, ...], BeforeValidator(_targets)] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        min_length=1,
        description="names of the linear maps that get an adapter, each in every layer; all seven of a Llama layer, "
        "since attention alone has too few parameters for the published number; `auto`: all that the LLM's layers have",
    )


class PromptConfig(Section):
    """The template around one spoken turn, in the LLM's own special tokens (U17: one BOS, no quirks).

    `prompt: auto`, the default, takes the chat template of the LLM's tokenizer: one user turn, with the audio as what
    the user says, and thinking switched off where the template has such a switch. A part that is given replaces that of
    the template.
    """

    before: str | None = Field(None, description="text before the audio; null: as in the chat template")
    after: str | None = Field(
        None, description="text between the audio and the response; null: as in the chat template"
    )
    end: str | None = Field(
        None, description="token that ends the response; null: the one after an answer in the chat template"
    )
    begin: str | None = Field(
        None,
        description="token that begins every response, as the released models begin theirs with their first token of "
        "all; null: the text begins it",
    )
    unseen: str | None = Field(
        None,
        description="token of the prompt that nothing attends to, while its place counts, as the released models do "
        "with the end of a turn, which is their padding too; null: none",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, given: object) -> object:
        if isinstance(given, str) and given != "auto":
            raise ValueError("auto, or a section with before, after and end")
        return {} if given == "auto" else given


class LlmConfig(Section):
    """Any Hugging Face causal LM (U24)."""

    path: Guarded[str] = Field(description="model folder, or a name below $ECHOX_CACHE/models")
    lora: LoraConfig = LoraConfig()
    prompt: PromptConfig = PromptConfig()


class SpeechEncoderConfig(Section):
    """The frozen Whisper encoder."""

    path: Guarded[str] = Field(description="Whisper folder, or a name below $ECHOX_CACHE/models")
    input: Literal["trim", "pad_30s", "all_30s"] = Field(
        "trim",
        description="trim: real frames plus a margin; pad_30s: as Whisper was pretrained, with silence up to 30 s that "
        "it attends to, 3 to 7 times the cost; all_30s: the released models' form, in which CTC and adapters get the "
        "frames of that silence too",
    )
    margin_s: float = Field(
        0.5, ge=0, le=5, description="silence after the audio of which the frames are kept too, seconds"
    )
    max_audio_s: float = Field(
        30.0,
        gt=0,
        le=600,
        description="longer audio is cut here and counted in `data/cut` (U27), seconds; Whisper hears 30 at once, so "
        "what is longer is encoded in windows of 30 without overlap, and joined",
    )
    precomputed: bool = Field(
        False, description="read the encoder's output from the shards (`echox shards encode`), no forward in training"
    )


class AlignmentAdapterConfig(Section):
    """Frame stacking, projection to the LLM width, one Transformer encoder layer, LayerNorm (Soundwave)."""

    stack: PositiveInt = Field(2, description="encoder frames joined into one; 2 gives 25 Hz")
    heads: PositiveInt | None = Field(None, description="attention heads; null takes the LLM's")
    ffn_multiple: PositiveFloat = Field(2.0, description="feed-forward width over LLM width; 2 as released")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share dropped in the Transformer layer while training; 0.1 as released"
    )
    attention: Literal["time", "frame_local"] = Field(
        "time", description="U18: attention over time, or the released code's effective per-frame form"
    )


class CtcConfig(Section):
    """The auxiliary CTC head over LLM tokens; blank is the audio placeholder token (released code)."""

    weight: float = Field(0.3, ge=0, description="weight beside the text loss, which counts 1; 0.3 as released")
    vocabulary: Literal["llm", "corpus"] = Field(
        "llm", description="classes: every LLM token, or only those in the training transcripts (cheap on a CPU)"
    )
    init_from_llm: bool = Field(
        True, description="U26: start the head from the LLM's token table, so that fewer steps are needed to train it"
    )
    align_steps: int = Field(
        0, ge=0, description="U26: first optimizer steps, which train only the alignment adapter and this head by CTC"
    )


class ShrinkConfig(Section):
    """Keep one frame a run of equal CTC labels, then look back at the frames by cross-attention (Soundwave)."""

    heads: PositiveInt | None = Field(None, description="attention heads; null takes the LLM's")
    dropout: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the look-back, its attention weights and its output, dropped while training; 0.1 as "
        "released",
    )
    keys: Literal["all", "kept"] = Field("all", description="frames the look-back attends: all, or the release's kept")
    blanks: Literal["keep", "drop"] = Field(
        "keep", description="whether a run of CTC blanks keeps a frame, as released"
    )
    ctc_embedding: bool = Field(
        False,
        description="add the text embedding the CTC head expects: speech reads as text before the LLM was ever tuned",
    )


class T2cConfig(Section):
    r"""The text-to-codec decoder: frozen text table, trained unit table, small Llama stack, unit head (U16).

    `prefix` and `unit_header` are the template around the answer's text (U17). The recipes have a clean one. That of
    the released code, with its quirks (a begin-of-text token in every piece, and ` arrested`, 12800, where the end of
    the prefix was to be 128000), is a matter of two values:

    ```yaml
    prefix: "<|start_header_id|><|begin_of_text|>speaker<|end_header_id|><|begin_of_text|>\n arrested"
    unit_header: "<|eot_id|><|start_header_id|><|begin_of_text|>speaker<|end_header_id|><|begin_of_text|>\n"
    ```
    """

    layers: PositiveInt = Field(6, description="Transformer layers; 6 as in the published 3B model, the 8B has 8")
    width: PositiveInt = Field(
        512, description="hidden width, a multiple of 2 * heads; 512 as in the published 3B model, the 8B has 768"
    )
    heads: PositiveInt = Field(8, description="attention heads; 8 as in the published 3B model, the 8B has 12")
    ffn: PositiveInt = Field(2048, description="feed-forward width; 2048 as published, for 3B and 8B")
    max_positions: PositiveInt = Field(
        2048, description="most tokens of a row, text and unit-language words together; 2048 as published"
    )
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the projected input embeddings dropped while training; 0: none"
    )
    text_stride: PositiveFloat | None = Field(
        None,
        description="unit-language words spoken a text token: token i gets rotary position i * text_stride and word m "
        "position m, so that what belongs together is close; null counts on from the text to its words",
    )
    units_per_character: PositiveFloat | None = Field(
        None,
        description="speech units a character: instead of text_stride, a token's rotary position is so many times the "
        "characters before it, and a word's the units up to its end; steady where tokens and words differ in length",
    )
    history_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the words before a word that are hidden from it while training, so that a small corpus "
        "teaches to read the text and not to recite; 0: none",
    )
    window_units: PositiveFloat | None = Field(
        None,
        description="units to either side that attention reaches, of text and words alike, so that a small corpus "
        "teaches to read and not to recite; needs units_per_character; null: all that came before",
    )
    text_embeddings: Literal["raw", "centred"] = Field(
        "raw",
        description="raw: the LLM's text embeddings, as released. centred: minus their mean over the vocabulary, of "
        "variance 1 in every dimension, for T2C, Echo decoder and the Denoising Adapter's target alike: rows of an "
        "LLM's table share one large direction, which hides which token it is",
    )
    text_table: Literal["head", "own"] | None = Field(
        None,
        description="which table gives text its embeddings. null: the LLM's input table. head: that of its head, as "
        "the released 8B model probably has it; own: one that came with the folder of init.t2c (`echox import`)",
    )
    body: Literal["llm"] | None = Field(
        None,
        description="rotary embedding and norm epsilon. null: Llama's first, 10,000 and 1e-6; llm: the LLM's own, as "
        "released",
    )
    head: Literal["units", "full_vocab"] = Field("units", description="U15: unit classes only, or text and units")
    prefix: str = Field(min_length=1, description="template before the answer's text, in the LLM's own special tokens")
    unit_header: str = Field(min_length=1, description="template between the answer's text and its units")
    unit_language: str = Field(
        description="unit-language JSON fitted on the corpus, file path or name below $ECHOX_CACHE/data"
    )


class DenoisingConfig(Section):
    """Maps the LLM's hidden states to text embeddings: Linear, ReLU, dropout, Linear (Eq. 2)."""

    ffn: PositiveInt | None = Field(None, description="hidden width; null takes the LLM's feed-forward width")
    dropout: float = Field(
        0.1, ge=0, lt=1, description="share dropped between the two maps while training; 0.1 as released"
    )
    weighting: Literal["dynamic_cap", "fixed"] = Field("dynamic_cap", description="U1: how lambda of Eq. 4 is set")
    cap: PositiveFloat = Field(
        0.2, description="dynamic_cap: the share of the echo loss that this loss may not exceed; 0.2 as released"
    )
    weight: float = Field(0.1, ge=0, description="fixed: lambda itself")
    align_steps: int = Field(
        0,
        ge=0,
        description="first optimizer steps, which train only this adapter, forward through the LLM and without the "
        "teacher: the Echo decoder then starts on inputs it knows (0 in the paper)",
    )


class SegmentationConfig(Section):
    """Where the response is cut into segments (U3): by the streaming trigger, unless `mode` says otherwise.

    The trigger's score is the cosine of a hidden state with the LM-head row of the full stop. A segment ends at a peak
    of the score. Numbers are those of the released inference code.
    """

    mode: Literal["trigger", "none", "fixed"] = Field(
        "trigger", description="trigger: as when streaming; none: one segment; fixed: segments of `fixed_tokens`"
    )
    min_tokens: PositiveInt = Field(
        20, description="mode=trigger: text tokens of a segment before a peak above `threshold` can end it"
    )
    max_wait: PositiveInt = Field(50, description="mode=trigger: text tokens of a segment before any peak can end it")
    threshold: float = Field(
        0.1, description="mode=trigger: score, a cosine, that a peak before `max_wait` must be above"
    )
    look_ahead: PositiveInt = Field(
        5,
        description="mode=trigger: text tokens on each side, none of which scores above a peak; streaming waits for as "
        "many before a cut",
    )
    fixed_tokens: PositiveInt = Field(20, description="mode=fixed: text tokens in a segment")


class RespondConfig(Section):
    """How the S2T model answers the questions beforehand (`echox respond`), for `pseudo_text: generated`."""

    temperature: float = Field(
        0.0, ge=0, description="0: the most probable token (greedy); otherwise logits are divided by it, and sampled"
    )
    top_p: float = Field(
        1.0, gt=0, le=1, description="sample among the most probable tokens that together have this probability"
    )
    max_tokens: PositiveInt = Field(
        256, le=512, description="most tokens of an answer; one without its end by then is rejected as cut"
    )
    seed: int = Field(17, description="of sampling; an answer depends on it and on the sample's id alone")
    batch: Free[PositiveInt] = Field(
        32, description="questions answered at once, on one rank, as memory allows; the answers do not depend on it"
    )


class EchoConfig(Section):
    """Stage III: pseudo text, segments, teacher decoding.

    Where the paper can be read in two ways, both are here, and the description says whose reading is which.
    """

    pseudo_text: Literal["generated", "argmax_teacher_forced", "reference", "free_run"] = Field(
        "generated",
        description="U2: the text X' that the teacher speaks. generated: the LLM's own answers, made beforehand by "
        "`echox respond`; free_run: the same with the weights of every step, greedy and at the cost of decoding. Two "
        "ablations need no answer. reference: the data's answer, which is not the LLM's own text. "
        "argmax_teacher_forced: the LLM's most probable token after each beginning of the reference; nothing joins "
        "one such token to the next, so X' is no text that the LLM would ever say",
    )
    respond: RespondConfig = RespondConfig()
    refresh_every: int = Field(
        0,
        ge=0,
        description="pseudo_text=generated: epochs after which the run answers its training questions again, with the "
        "weights it then has; 0: never",
    )
    segmentation: SegmentationConfig = SegmentationConfig()
    denoising: DenoisingConfig = DenoisingConfig()
    s2t_weight: float = Field(1.0, ge=0, description="U4: weight of the text loss in Eq. 4, which has it at 1")
    units_per_token: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="U20: unit-language words a text token; the teacher stops a segment of T tokens after "
        "units_per_token * T + 32 words. auto: what nearly all texts of the T2C run's data need, which that run "
        "measured, and 12 where it did not; a run that has begun keeps its own",
    )
    free_run_tokens: PositiveInt = Field(64, description="pseudo_text=free_run: tokens generated for every sample")
    train_speech_adapters: bool = Field(
        False,
        description="train alignment and shrink adapter in Stage III too; the release's parameter count says they are "
        "frozen",
    )
    ctc_weight: float = Field(
        0.0,
        ge=0,
        description="weight of CTC on the questions' transcripts beside the other losses, as in Stage I; it trains the "
        "CTC head, and the adapters under train_speech_adapters. 0: Eq. 4, which has no CTC, and the head frozen; "
        "0.3: the reading of the released joint training code, which keeps it",
    )
    state: Literal["predicting", "own"] = Field(
        "predicting",
        description="U5: H of a token. predicting: the state one position before it, as the released inference has it, "
        "and the only one there is when the token is chosen; own: the state at the token itself, as in the released "
        "joint training code, known one step later when streaming",
    )
    labels: Literal["teacher", "cached", "drafted", "annotated"] = Field(
        "teacher",
        description="Y' that the Echo decoder learns. teacher: units that the frozen T2C decodes in the step, the "
        "paper's pseudo labels; cached: the same, each segment decoded once and kept below storage for every run with "
        "this teacher, as labels made before training are: it pays off where segments come again, so where text and "
        "cuts do not change. "
        "drafted: for texts that do change: what the teacher said of a segment that begins alike is verified in one "
        "pass, and decoded on from the first word that it would not say; the labels are those of teacher. "
        "annotated: the ablation with the units of the recorded answers (`answer.units`), which needs "
        "pseudo_text=reference and segmentation.mode=none, and decodes nothing",
    )


class ModelConfig(Section):
    """The parts of the speech-to-speech model; a stage builds those it needs."""

    llm: LlmConfig
    speech_encoder: SpeechEncoderConfig | None = None
    alignment: AlignmentAdapterConfig = AlignmentAdapterConfig()
    ctc: CtcConfig = CtcConfig()
    shrink: ShrinkConfig = ShrinkConfig()
    t2c: T2cConfig | None = None
    echo: EchoConfig = EchoConfig()
    layout: Literal["packed", "padded"] = Field(
        "packed",
        description="rows of a training forward: end to end, or each padded to the longest under a mask; same losses",
    )
    random_init: bool = Field(False, description="true shapes, random weights: needs config.json and tokenizer only")
