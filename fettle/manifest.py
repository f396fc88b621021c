"""What the files of a family say: the typed content of `family.json` and `variants/<id>/manifest.json`.

Only shapes and checks; reading, writing and verifying them is `fettle.family`. Unknown keys and unknown schema
versions fail, since a manifest is the only truth about its files.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, Literal

from pydantic import Field, JsonValue

from fettle.extract import AnswerSpec as AnswerSpec
from fettle.findings import Analysis as Analysis
from fettle.findings import AnswerGate as AnswerGate
from fettle.findings import Bin as Bin
from fettle.findings import Certificate as Certificate
from fettle.findings import EndGate as EndGate
from fettle.findings import Floor as Floor
from fettle.findings import Gate as Gate
from fettle.findings import LabelDisagreement as LabelDisagreement
from fettle.findings import Level as Level
from fettle.findings import OperatingPoint as OperatingPoint
from fettle.findings import Outcome as Outcome
from fettle.findings import ScoreCalibration as ScoreCalibration
from fettle.findings import SelfDisagreement as SelfDisagreement
from fettle.findings import Step as Step
from fettle.findings import StopGates as StopGates
from fettle.findings import Tested as Tested
from fettle.findings import TextFigures as TextFigures
from fettle.findings import TextGates as TextGates
from fettle.findings import TextScore as TextScore
from fettle.findings import VotePoint as VotePoint
from fettle.schema import Identifier as Identifier
from fettle.schema import RelativePath as RelativePath
from fettle.schema import Sha256 as Sha256
from fettle.schema import Strict as Strict

SCHEMA_VERSION: Final = 1


class TaskKind(StrEnum):
    CLASSIFY = "classify"
    EMBED = "embed"
    GENERATE = "generate"


class Head(StrEnum):
    """How logits become an answer: softmax and argmax, a sigmoid for each label, or the number itself."""

    SINGLE_LABEL = "single_label"
    MULTI_LABEL = "multi_label"
    REGRESSION = "regression"


class Task(Strict):
    """What the model answers. `labels` in the order of the logits; `width` is the length of an output row.

    For text `width` is the vocabulary that logits are over, and `end_ids` the tokens that end a text; `answer` says
    what of a text is compared with the reference's (all of it if None), `instruction` how the texts of the data became
    prompts, with `{text}` for the text.
    """

    kind: TaskKind
    head: Head | None = None
    labels: list[str] = []
    width: int = Field(ge=1)
    pooling: Literal["mean", "cls", "max"] | None = None
    normalized: bool = False
    end_ids: list[int] = []
    answer: AnswerSpec | None = None
    instruction: str | None = None


class TokenizerSpec(Strict):
    """How texts become rows. `max_length` counts the special tokens; `vocabulary` bounds the token ids."""

    max_length: int = Field(ge=2)
    vocabulary: int = Field(ge=1)
    pad_id: int = Field(ge=0)
    segments: bool = Field(description="the model reads token type ids")


class FileRecord(Strict):
    path: RelativePath
    sha256: Sha256
    bytes: int = Field(ge=0)


class PassRecord(Strict):
    """One step of a recipe, with every parameter that it used and how long it took."""

    name: Identifier
    parameters: dict[str, JsonValue] = {}
    seconds: float = Field(ge=0)
    notes: dict[str, JsonValue] = Field(default={}, description="what the pass found, e.g. fused node counts")


class Runtime(StrEnum):
    ONNX = "onnx"
    TORCH = "torch"
    FAKE = "fake"


class Precision(StrEnum):
    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    INT8 = "int8"
    INT4 = "int4"


class Hardware(Strict):
    """Where something was measured, and with what."""

    processor: str
    cores: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    accelerator: str | None = None
    versions: dict[str, str] = {}


class LatencyCell(Strict):
    batch: int = Field(ge=1)
    length: int = Field(ge=1)
    median_ms: float = Field(gt=0)
    p95_ms: float = Field(gt=0)


class LatencyTable(Strict):
    """Milliseconds of one engine call by (rows, tokens per row), on `threads` threads of one device."""

    device: Literal["cpu", "cuda"]
    threads: int = Field(ge=1)
    cells: list[LatencyCell] = Field(min_length=1)


class TextQuality(Strict):
    """How a text generator's greedy texts of at most `max_tokens` tokens compare with the reference's, row by row.

    `token_agreement`: share of the reference's tokens, end tokens included, that come before the first difference.
    `perplexity` is that of the data's own prompts and answers, token by token, over `perplexity_tokens` of them.
    """

    max_tokens: int = Field(ge=1)
    tokens: float = Field(ge=0, description="drawn for a text, on average")
    token_agreement: float = Field(ge=0, le=1)
    identical_texts: float = Field(ge=0, le=1)
    perplexity: float = Field(ge=1)
    reference_perplexity: float = Field(ge=1)
    perplexity_tokens: int = Field(ge=1)


class Quality(Strict):
    """How the variant's answers compare with the reference's on `rows` rows that nothing was tuned on.

    `disagreement` is the worst over the batchings that were tried (see `BatchInvariance`), as a share in [0, 1].
    `metric` is the task's own figure against the labels, where the data have them.
    """

    rows: int = Field(ge=1)
    disagreement: float = Field(ge=0, le=1)
    loss: str = Field(description="what counts as a disagreement, in words")
    max_difference: float = Field(ge=0, description="largest absolute difference of an output value")
    mean_cosine: float | None = None
    top10_overlap: float | None = Field(default=None, description="share of ten nearest neighbours kept; for vectors")
    metric_name: str | None = None
    metric: float | None = None
    reference_metric: float | None = None
    text: TextQuality | None = Field(default=None, description="of a text generator")


class DecoderSpec(Strict):
    """What a runner of a text generator must know to hold its keys and values.

    One buffer a layer for the keys and one for the values, [slots, kv_heads, context, head_dim] each. The graph is
    described in `workers/onnx_decoder.py`.
    """

    layers: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    context: int = Field(ge=2, description="tokens of a prompt and its output together, at most")

    @property
    def kv_floats_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


class Stage(Strict):
    """A consecutive run of encoder layers that ends in an exit head; the last one ends in the model's own head."""

    file: RelativePath
    layers: int = Field(ge=1, description="encoder layers up to and including the one that this stage answers from")


class BatchInvariance(Strict):
    """Whether an answer depends on who shares the batch: the same rows alone and in mixed batches.

    `changed` is the share of rows whose answer differs between the two; `invariant` is false as soon as an output
    value moves by more than `tolerance`.
    """

    rows: int = Field(ge=1)
    batch: int = Field(ge=2)
    changed: float = Field(ge=0, le=1)
    max_difference: float = Field(ge=0)
    tolerance: float = Field(gt=0)
    invariant: bool


class Measurements(Strict):
    """`fingerprint` covers what the figures depend on: the variant, the test rows, the hardware, the settings."""

    fingerprint: Sha256
    hardware: Hardware
    quality: Quality
    batching: BatchInvariance
    tuned_disagreement: float | None = Field(
        default=None, ge=0, le=1, description="on validation rows in mixed batches; what the search goes by"
    )
    latency: LatencyTable = Field(description="of a text generator: one step of decoding, `length` tokens before it")
    prompts: LatencyTable | None = Field(default=None, description="of a text generator: feeding one prompt")
    typical_length: int = Field(ge=1, description="median tokens of a measured row")
    row_cpu_ms: float | None = Field(
        default=None, gt=0, description="processor time of an average measured row, through all stages, in best batches"
    )
    stage_cpu_ms: list[float] = Field(
        default=[], description="the same for each stage alone, where there are several; they add up to `row_cpu_ms`"
    )
    prompt_token_cpu_ms: float | None = Field(
        default=None, ge=0, description="of a text generator with full slots: processor time for a token of a prompt"
    )
    decode_token_cpu_ms: float | None = Field(
        default=None, ge=0, description="the same for each token that is drawn after a text's first"
    )
    peak_memory_bytes: int = Field(ge=0, description="resident memory of a process that runs this variant alone")
    load_seconds: float = Field(ge=0)
    seconds: float = Field(ge=0, description="how long the measuring took")


class Resources(Strict):
    """What one replica asks of Ray."""

    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    memory_bytes: int = Field(default=0, ge=0)


class VariantManifest(Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    id: Identifier
    parent: Identifier | None = None
    runtime: Runtime
    precision: Precision
    recipe: list[PassRecord]
    tokenizer: TokenizerSpec
    task: Task
    files: list[FileRecord]
    stages: list[Stage] = Field(default=[], description="where there are exits; otherwise the files are one model")
    decoder: DecoderSpec | None = Field(default=None, description="of a variant that generates text")
    row_by_row: bool = Field(
        default=False, description="each row is a call of its own, so that no answer depends on who shares the batch"
    )
    packed: bool = Field(
        default=False, description="padding costs nothing: the graph computes over the tokens of all rows in a row"
    )
    fingerprint: Sha256 | None = Field(
        default=None, description="over all that the build depended on; a run reuses the variant while it is the same"
    )
    resources: Resources = Resources()
    measured: Measurements | None = None

    @property
    def size_bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def exits(self) -> int:
        """Places before the last at which a row can leave with an answer."""
        return max(0, len(self.stages) - 1)


class VariantEntry(Strict):
    """A variant as the family knows it: the manifest's own hash makes it part of the chain."""

    id: Identifier
    manifest_sha256: Sha256


class NotBuilt(Strict):
    """A variant that was asked for and is not there, and why."""

    id: Identifier
    reason: str


class Dropped(Strict):
    """A variant that was built and measured and is not in the family, since another one is better in every respect.

    Its manifest stays, so that a second run need not build it again; its model files are gone.
    """

    id: Identifier
    reason: str
    manifest_sha256: Sha256


class DataSplit(Strict):
    rows: int = Field(ge=0)
    sha256: Sha256
    labelled: bool


class Source(Strict):
    """Where the reference came from."""

    name: str
    architecture: str
    sha256: Sha256 = Field(description="over the model's own files")


class FamilyManifest(Strict):
    schema_version: Literal[1] = SCHEMA_VERSION
    fettle_version: str
    name: Identifier
    source: Source
    task: Task
    tokenizer: TokenizerSpec
    tokenizer_files: list[FileRecord]
    reference: Identifier
    default: Identifier = Field(description="the variant that answers when a request pins none")
    data: dict[str, DataSplit]
    hardware: Hardware
    variants: list[VariantEntry] = Field(min_length=1)
    not_built: list[NotBuilt] = []
    dropped: list[Dropped] = []
    cosine_floor: float = Field(default=0.98, gt=0, le=1, description="for embeddings: below it is a disagreement")
    points: list[OperatingPoint] = []
    levels: list[Level] = []
    votes: list[VotePoint] = Field(default=[], description="of a text generator: when a vote may end")
    self_disagreement: SelfDisagreement | None = None
    analysis: Analysis = Analysis()
    command: str = Field(default="", description="what reproduces this family")
