"""Request and reply bodies of the HTTP API, in the shapes that OpenAI, vLLM and TEI document.

Unknown request fields are refused: a field that is silently ignored is an answer to another question.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(min_length=1)]
Ids = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
IdLists = Annotated[list[Ids], Field(min_length=1)]
Pair = Annotated[list[Text], Field(min_length=1, max_length=2)]
Inputs = Text | Texts | Ids | IdLists


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Wished(Body):
    """Who is to answer a request, and how; all but `model` are extensions to every shape."""

    model: str | None = None
    max_disagreement: Annotated[float, Field(ge=0, le=1)] | Text | None = Field(
        default=None,
        description="share of answers that may differ from the original model's: a number, `exact`, or a named class",
    )
    allow_degraded: bool = Field(
        default=False, description="under load, points certified at weaker levels may answer; the reply says so"
    )
    priority: Literal["interactive", "batch"] = Field(
        default="interactive", description="`batch` fills gaps that interactive requests leave"
    )


class Explained(Wished):
    explain: bool = Field(default=False, description="show the way that each row took")


class EmbeddingsRequest(Explained):
    """OpenAI's `POST /v1/embeddings`."""

    model: str
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1, description="-1: the model's own limit")


class ClassifyRequest(Explained):
    """vLLM's `POST /classify`."""

    model: str | None = None
    input: Inputs
    user: str | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=-1)


class EmbedRequest(Wished):
    """TEI's `POST /embed`."""

    inputs: Inputs
    model: str | None = None
    normalize: bool = True
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] = "right"
    dimensions: int | None = Field(default=None, ge=1)


class PredictRequest(Wished):
    """TEI's `POST /predict`: a text, a pair `[a, b]`, or a batch of `[a]` and `[a, b]`."""

    inputs: Text | Pair | Annotated[list[Pair], Field(min_length=1)]
    model: str | None = None
    raw_scores: bool = False
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] = "right"


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class ExplainedStep(BaseModel):
    """A row at one step of its way: `scores` are what its exits saw, before the stage that answered."""

    variant: str
    stage: int
    score: float | None = Field(description="of the answer, in [0, 1]; none for numbers and vectors")
    threshold: float = Field(description="that this stage's gate asks for; above 1: it takes nothing")
    temperature: float
    taken: bool
    scores: list[float | None]
    thresholds: list[float]
    queue_ms: float
    infer_ms: float
    batch_rows: int


class Served(BaseModel):
    """Who answered, what is promised, and where the time went, in milliseconds; an extension that clients may ignore.

    `variant` and `stage` name each that answered a row, separated by commas.
    """

    router: str
    family: str
    quality: str = Field(alias="class", description="as it was asked: a share, a named class, `exact` or `pinned`")
    point: str | None = Field(description="the operating point; none where one variant answered all the way")
    bound: float | str = Field(description="certified upper bound of disagreement, `exact`, or `none`")
    variant: str
    stage: str
    gear: int
    degraded: bool
    truncated: int = Field(description="inputs that were cut to the model's limit")
    tokenize_ms: float
    queue_ms: float
    infer_ms: float
    explain: list[list[ExplainedStep]] | None = None


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsReply(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage
    fettle: Served


class Classification(BaseModel):
    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyReply(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classification]
    usage: Usage
    fettle: Served


class Score(BaseModel):
    score: float
    label: str


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["fettle"] = "fettle"
    max_model_len: int = Field(description="tokens of an input, with the answer where that is a text")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class VariantInfo(BaseModel):
    id: str
    runtime: str
    precision: str
    default: bool
    size_bytes: int
    disagreement: float | None
    batch_invariant: bool | None
    queued: int = Field(description="rows that wait for a replica")
    backlog_s: float = Field(description="predicted time until all admitted interactive work is done")
    rows: int = Field(description="rows answered since this router's start; so are the counts that follow")
    batches: int
    refused: int = Field(description="requests refused because the queue was full")
    late: int = Field(description="rows that could not be in time for their deadline")
    withdrawn: int = Field(description="rows whose client left while they waited")
    retried: int = Field(description="rows sent again, after a lost replica or beside a row that failed")


class FamilyInfo(BaseModel):
    name: str
    task: str
    max_length: int
    width: int
    labels: list[str]
    instruction: str | None = Field(description="of a text generator: what the texts that it was measured on stood in")
    variants: list[VariantInfo]


class Info(BaseModel):
    version: str
    families: list[FamilyInfo]


class PointQuality(BaseModel):
    """A certified point and what production says of it: an alarm comes when `evidence` reaches `alarm_at`."""

    family: str
    point: str
    fingerprint: str
    alpha: float
    upper_bound: float
    certified_rows: int
    certified_errors: int
    shadows: int = Field(description="answers compared with the reference's")
    disagreements: int
    evidence: float
    alarm_at: float
    status: Literal["watched", "revoked"]
    revoked_at: float | None
    drift: dict[str, float | bool | None] | None = Field(description="of exits and scores, without labels")


class FamilyQuality(BaseModel):
    name: str
    points: list[PointQuality]


class QualityReply(BaseModel):
    families: list[FamilyQuality]


class Live(BaseModel):
    """What the page at `/` shows; its inner shape may change."""

    at: float
    version: str
    routers: int
    shadow_share: float | None
    live: dict[str, object]
    quality: list[PointQuality]


class State(BaseModel):
    status: Literal["ok"] = "ok"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    error: ErrorDetail
