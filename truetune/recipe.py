"""The run as data: what the user wants, and nothing else.

A recipe is frozen, strict and versioned. It holds only what differs from the defaults; YAML, TOML and
``key=value`` are spellings of it (``truetune.spelling``). Parts that are chosen by name (``optimizer``,
``schedule``) take further options, which are checked against the signature of what the name stands for
(``truetune.registry``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    Strict,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from truetune import faults, registry
from truetune.errors import UserError

VERSION: Final = 1

Scalar = None | bool | int | float | str
Option = Scalar | Annotated[tuple[Scalar, ...], Strict(False)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Named(Part):
    """A part chosen by name; every key that it does not declare is an option of what the name stands for."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Option] = Field(init=False)

    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__)


class Model(Part):
    """Which model."""

    path: str = Field(min_length=1, description="a Hugging Face folder, a hub id, or a GGUF file (converted once)")
    revision: str | None = Field(None, description="commit, tag or branch on the hub")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="bf16: compute in bf16, whatever weights are; auto: bf16 where it is fast"
    )
    weights: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="what trained weights are kept in; bf16: half of their memory and their gradients', each update "
        "rounded stochastically, computed in bf16 too",
    )
    base: Literal["int8", "nf4"] | None = Field(
        None,
        description="LoRA's frozen base in training: int8, multiplied in 8 bits; nf4, kept in 4 (QLoRA); default: as "
        "precision says",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


Format = Literal["auto", "messages", "preference", "sharegpt", "alpaca", "prompt-completion", "text"]
FORMAT: Final = "what a row is; auto: told by its columns"
SOURCE: Final = "python-docs, a file of rows or text, a folder of them, or a hub id"


class Source(Part):
    """One of several sources of rows."""

    source: str = Field(min_length=1, description=SOURCE)
    split: str = Field("train", description="split of the source")
    format: Format = Field("auto", description=FORMAT)
    rows: int | None = Field(None, gt=0, description="use only the first rows")
    weight: float = Field(1.0, ge=0.001, le=1000, description="how many times an epoch has each of its rows")


class Data(Part):
    """Which rows are trained on: of one source, or of several."""

    source: str | None = Field(None, min_length=1, description=SOURCE)
    sources: Annotated[tuple[Source, ...], Strict(False), BeforeValidator(lambda value: value or ())] = Field(
        (), description="several in place of one, each with source, split, format, rows and weight"
    )
    split: str = Field("train", description="split of the source")
    format: Format = Field("auto", description=FORMAT)
    targets: Literal["assistant", "last", "all"] = Field(
        "assistant", description="tokens that are learned: every assistant turn, only the last, or all after the first"
    )
    weight_column: str | None = Field("weight", description="column of a row's weight in the loss, where it has one")
    rows: int | None = Field(None, gt=0, description="use only the first rows")
    max_length: int = Field(1024, gt=1, description="tokens a document may have")
    too_long: Literal["truncate", "drop", "split", "error"] = Field(
        "truncate", description="what becomes of longer ones; split: pieces that share one token, as context"
    )
    cut_limit: float = Field(0.05, ge=0, le=1, description="share of target tokens that truncation may cut")

    @model_validator(mode="after")
    def _some_data(self) -> Data:
        if self.source is None and not self.sources:
            raise _conflict(f"data.source is missing ({SOURCE}); add data.source=...", "data.source")
        idle = sorted(self.model_fields_set & {"source", "split", "format", "rows"}) if self.sources else ()
        if "source" in idle and self.source is not None:
            raise _conflict(
                "data.source and data.sources both say where rows come from; keep one, and drop the other with "
                "data.source=none or data.sources=none",
                "data.source",
                "data.sources",
            )
        for key in idle:
            if key != "source":
                raise _conflict(
                    f"data.{key} means nothing with data.sources, each of which has its own; write it there",
                    f"data.{key}",
                    "data.sources",
                )
        named = [(part.source, part.split) for part in self.sources]
        if twice := next((name for name in named if named.count(name) > 1), None):
            raise _conflict(
                f"data.sources has {twice[0]} ({twice[1]}) twice; name it once, and raise its weight", "data.sources"
            )
        return self


class HeldOut(Part):
    """What is held out. Without a source: the data's own held-out split, else a share of its rows."""

    source: str | None = Field(None, description="as data.source; default: the data's own")
    split: str | None = Field(None, description="split of the source that is held out")
    fraction: float = Field(0.05, gt=0, lt=1, description="share of the rows, where nothing else is named")
    rows: int = Field(200, gt=0, description="rows at most, drawn by the seed")
    every: int | None = Field(None, gt=0, description="steps between evaluations; default: four in a run")
    samples: int = Field(4, ge=0, description="held-out prompts that are answered")
    sample_tokens: int = Field(96, gt=0, description="tokens an answer may have")


class Adapter(Part):
    """How the model is adapted: LoRA on a frozen base, or every weight (full)."""

    method: Literal["lora", "full"] = Field("lora", description="lora: small matrices beside; full: every weight")
    rank: int = Field(16, gt=0, description="columns of LoRA's two factors")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    rslora: bool = Field(False, description="rank-stabilised: the update is scaled by alpha / sqrt(rank)")
    dora: bool = Field(False, description="DoRA: also learn the length of each row of the adapted weights")
    init: Literal["zero", "pissa"] = Field("zero", description="pissa: start from the weight's largest singular parts")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the adapter's inputs that are dropped in training")
    targets: str | list[str] = Field("all-linear", description="all-linear, a regex, or module names")
    also: str | list[str] = Field([], description="trained in full beside: embeddings, head, norms, or module names")
    path: str | None = Field(None, min_length=1, description="an adapter or a run whose adapter is trained further")
    lora_plus_ratio: float = Field(1.0, gt=0, description="rate of B over rate of A; LoRA+ suggests 16")


Kind = Literal["matrices", "embeddings", "head", "vectors"]


class Optimizer(Named):
    """The rule that moves the weights; `truetune show optimizers` lists names and options."""

    name: str = Field("adamw", description="of truetune show optimizers, or your own as module:attribute")
    rate: float = Field(3e-4, gt=0, description="peak learning rate")
    takes: Annotated[tuple[Kind, ...], Strict(False), Field(min_length=1)] | None = Field(
        None, description="kinds of parameters that the rule updates, AdamW the rest; default: as the rule is meant"
    )
    rest_rate: float | None = Field(
        None, gt=0, description="peak rate of AdamW for the rest, or of all but matrices under a rule that takes all"
    )
    mechanic: bool = Field(False, description="find the rate while it runs; set rate to 1")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an average of the weights, which is evaluated and kept in their place"
    )
    mup_width: int | None = Field(
        None, gt=0, description="muP: hidden size of the model that the rate was tuned on; for adapter.method=full"
    )
    nap: bool = Field(False, description="keep each hidden matrix as long as it began; for adapter.method=full")


class Schedule(Named):
    """The rate over the run, as a share of the peak; `truetune show schedules` lists names and options."""

    name: str = Field("linear", description="of truetune show schedules, or your own as module:attribute")
    warmup: float = Field(0.05, ge=0, description="below 1 a share of the run, else steps")
    warmup_from: float = Field(
        0.0, ge=0, lt=1, description="share of the peak that it rises from; to go on, where the earlier run ended"
    )


class Train(Part):
    """How long, in what portions. One of epochs, steps, tokens; the default is one epoch."""

    epochs: float | None = Field(None, gt=0, description="length of the run in passes over the rows")
    steps: int | None = Field(None, gt=0, description="length of the run in steps")
    tokens: int | None = Field(None, gt=0, description="length of the run in tokens, whole steps")
    tokens_per_step: int = Field(2048, gt=0, description="a step takes documents until it has this many")
    tokens_per_micro_batch: int = Field(2048, gt=0, description="at most this many in memory at once")
    activation_memory: float | None = Field(
        None,
        gt=0,
        description="GiB that layers may keep of a micro-batch for the backward pass, which computes the rest again; "
        "default: all",
    )
    clip: float | None = Field(1.0, gt=0, description="largest L2 norm of the gradient")
    clip_growth: float | None = Field(
        None, gt=1, description="largest factor by which that norm may grow from step to step; Fira has 1.01"
    )
    router_loss: float | None = Field(
        None,
        ge=0,
        description="weight of the load balance of experts in the loss; default: as the model's config has it",
    )
    filtered_loss: bool = Field(
        False,
        description="leave out of the gradient, at the output layer, tokens whose |probability - target| is below "
        "eps / 32 of the dtype of products for every row of a block; losses stay exact",
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="orders the rows, draws what is held out, starts the adapter")


class Checkpoint(Part):
    """What is saved on the way."""

    every: int | None = Field(None, gt=0, description="steps between checkpoints; default: four in a run")
    minutes: float = Field(30.0, gt=0, description="minutes after which a step is saved in any case")
    keep: int = Field(2, gt=0, description="newest checkpoints that are kept")
    keep_best: bool = Field(True, description="end with the weights of the best evaluation")


class Output(Part):
    """What is written at the end, and where."""

    folder: str | None = Field(None, description="run folder; default: runs/<name of the recipe>-<time>")
    merged: bool = Field(True, description="also write the merged model")
    gguf: Literal["f32", "f16", "bf16", "q8_0"] | None = Field(
        None, description="also write a GGUF file with weights of this type, for llama.cpp and Ollama"
    )
    tensorboard: bool = Field(False, description="also write scalars for TensorBoard")
    wandb: bool = Field(False, description="also hand scalars and recipe to Weights & Biases (WANDB_MODE=offline too)")


class Recipe(Part):
    """One run. ``truetune.train(Recipe(model={"path": ...}, data={"source": ...}))`` runs it.

    Raises UserError, one sentence, for a recipe that is wrong.
    """

    version: Literal[1] = Field(VERSION, description="of the format of recipes")
    model: Model
    data: Data
    evaluation: HeldOut = HeldOut()
    adapter: Adapter = Adapter()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    output: Output = Output()
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where torch sees it")

    @model_validator(mode="after")
    def _one_length(self) -> Recipe:
        named = [k for k in ("epochs", "steps", "tokens") if getattr(self.train, k) is not None]
        if len(named) > 1:
            raise _conflict(
                f"train.{named[0]} and train.{named[1]} both set the length of the run; "
                f"keep one and drop the other with train.{named[1]}=none",
                *(f"train.{k}" for k in named),
            )
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> Recipe:
        if self.data.max_length > self.train.tokens_per_micro_batch:
            raise _conflict(
                f"data.max_length ({self.data.max_length}) is above train.tokens_per_micro_batch "
                f"({self.train.tokens_per_micro_batch}), so a long row would not fit; raise the latter",
                "data.max_length",
                "train.tokens_per_micro_batch",
            )
        return self

    @model_validator(mode="after")
    def _weights_fit(self) -> Recipe:
        if self.model.weights == "bf16" and self.model.precision == "fp32":
            raise _conflict(
                "model.weights=bf16 does not go with model.precision=fp32, which would compute with numbers that the "
                "weights do not have; set model.precision=bf16, or keep weights in fp32",
                "model.weights",
                "model.precision",
            )
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Recipe:
        adapter, held_out = self.adapter.model_fields_set, self.evaluation.model_fields_set
        if self.adapter.method == "full" and (idle := sorted(adapter - {"method"})):
            raise _conflict(
                f"adapter.{idle[0]} means nothing with adapter.method=full, which trains every weight; remove it, or "
                "drop the section with adapter=none before adapter.method=full",
                "adapter.method",
                *(f"adapter.{k}" for k in idle),
            )
        whole = {"nap": "whose factors have no length to keep", "mup_width": "whose factors are as wide as their rank"}
        key = next((key for key in whole if getattr(self.optimizer, key)), None)
        if key and self.adapter.method == "lora":
            raise _conflict(
                f"optimizer.{key} means nothing with adapter.method=lora, {whole[key]}; remove it, or train every "
                "weight with adapter.method=full",
                f"optimizer.{key}",
                "adapter.method",
            )
        if self.model.base and (other := self._unquantized()):
            raise _conflict(
                f"model.base={self.model.base} means nothing with {other}, whose products are not those of plain LoRA; "
                "remove one",
                "model.base",
                other.partition("=")[0],
            )
        if self.data.too_long != "truncate" and "cut_limit" in self.data.model_fields_set:
            raise _conflict(
                f"data.cut_limit means nothing with data.too_long={self.data.too_long}, which truncates nothing; "
                "remove it",
                "data.cut_limit",
                "data.too_long",
            )
        started = next((k for k, v in (("path", self.adapter.path), ("dora", self.adapter.dora)) if v), None)
        if self.adapter.init == "pissa" and started:
            reason = {
                "path": "which has its weights already",
                "dora": "with which it can't be written as one adapter over the original weights",
            }
            raise _conflict(
                f"adapter.init=pissa does not go with adapter.{started}, {reason[started]}; remove one of them",
                "adapter.init",
                f"adapter.{started}",
            )
        if self.schedule.warmup_from and not self.schedule.warmup:
            raise _conflict(
                "schedule.warmup_from means nothing with schedule.warmup=0; remove it, or give the warm-up a length",
                "schedule.warmup_from",
                "schedule.warmup",
            )
        other = next((k for k in ("source", "split") if getattr(self.evaluation, k) is not None), None)
        if other and "fraction" in held_out:
            raise _conflict(
                f"evaluation.fraction means nothing with evaluation.{other}, which says what is held out; keep one",
                "evaluation.fraction",
                f"evaluation.{other}",
            )
        return self

    def _unquantized(self) -> str | None:
        """The key with which no layer is one of plain LoRA."""
        adapter = self.adapter
        found = {
            "adapter.method=full": adapter.method == "full",
            "adapter.dora": adapter.dora,
            "adapter.dropout": adapter.dropout > 0,
            "device=cuda": self.device == "cuda" and self.model.base == "int8",
        }
        return next((key for key, idle in found.items() if idle), None)

    # The last of the validators, since each wraps those above it.
    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, values: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Raises UserError for what is wrong, unless the caller says that it makes the sentences itself."""
        if info.context == faults.DETAILS or not isinstance(values, Mapping):
            return handler(values)
        required: dict[str, Any] = {name: {} for name, field in cls.model_fields.items() if field.is_required()}
        values = required | dict(values)  # so that what is missing is a key, not a section
        try:
            return handler(values)
        except ValidationError as error:
            raise UserError(registry.and_more(list(faults.sentences(error, cls, values).values()))) from None


def _conflict(sentence: str, *keys: str) -> PydanticCustomError:
    """Keys that do not go together; ``keys`` lets the spelling say where they are written."""
    return PydanticCustomError("conflict", "{sentence}", {"sentence": sentence, "keys": keys})
