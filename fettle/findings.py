"""What optimize found out about a family: its operating points with their certificates, and what the report shows.

Part of `family.json` (`fettle.manifest`). Only shapes and checks: the tests are `fettle.certificates`, and how a point
answers is `fettle.points`.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fettle.schema import Identifier, Strict

TextFeature = Literal["sum", "lowest", "tenth", "median", "mean", "length"]


class Gate(Strict):
    """Where a stage's answer is taken: its score, at this temperature, reaches the threshold.

    Scores lie in [0, 1] (`fettle.points.confidence`), so a threshold above 1 is never reached; NaN reaches none.
    """

    threshold: float = Field(ge=0)
    temperature: float = Field(default=1.0, gt=0)


class EndGate(Strict):
    """A text ends before a token where the model gave ending here at least this probability instead."""

    threshold: float = Field(gt=0, le=1)
    min_tokens: int = Field(default=1, ge=0, description="of the text, before it may end so")


class AnswerGate(Strict):
    """A text ends where the answer in it is there, stable, and sure.

    It is looked for after `first` tokens and then after every `every`, in long texts after a 32nd part more; the same
    one has been found `stable` times in a row, and the probabilities of the tokens that it consists of multiply to the
    threshold, or the lowest reaches it.
    """

    threshold: float = Field(ge=0, le=1)
    measure: Literal["product", "lowest"] = "product"
    stable: int = Field(default=1, ge=1)
    first: int = Field(default=1, ge=1)
    every: int = Field(default=1, ge=1)


class StopGates(Strict):
    """When a generation ends early with what it has. What a client sets itself (`early_stop`) has this shape too."""

    end: EndGate | None = None
    answer: AnswerGate | None = None


class TextScore(Strict):
    """How probable it is that the reference gives the same answer, from the log-probabilities of an answer's tokens.

    The weighted sum of some features (`fettle.text_scores`), through a line that rises from knot to knot: `raw` to
    `agreed`. Fitted on `rows` validation rows.
    """

    weights: dict[TextFeature, float] = Field(min_length=1)
    raw: list[float] = Field(min_length=1)
    agreed: list[Annotated[float, Field(ge=0, le=1)]]
    rows: int = Field(ge=1)

    @model_validator(mode="after")
    def rises(self) -> TextScore:
        if len(self.raw) != len(self.agreed):
            raise ValueError("raw and agreed must be equally long")
        if any(right <= left for left, right in pairwise(self.raw)):
            raise ValueError("raw must rise from knot to knot")
        if any(right < left for left, right in pairwise(self.agreed)):
            raise ValueError("agreed must not fall from knot to knot")
        return self


class Floor(Strict):
    """An attempt whose score after exactly `after` tokens is below this is given up."""

    after: int = Field(ge=1)
    score: float = Field(ge=0, le=1)


class TextGates(StopGates):
    """How a variant's text is stopped and, where another step follows, scored and given up.

    Without floors an attempt is still given up as soon as its score cannot reach the step's gate any more.
    """

    score: TextScore | None = None
    floors: list[Floor] = []


class Step(Strict):
    """One variant of an operating point, with one gate for each of its stages (one if it has no exits).

    A row that passes no gate goes to the next step; what reaches the last gate of the last step is answered there. For
    texts there is one gate, for the score of the whole answer, and `text` says how the generation is stopped.
    """

    variant: Identifier
    gates: list[Gate] = Field(min_length=1)
    text: TextGates | None = None


class Certificate(Strict):
    """The exact test that bounds an operating point's disagreement with the reference.

    With `errors` of `rows` calibration rows answered otherwise, `p_value` = P(Bin(rows, alpha) <= errors), at most
    `delta` for a certified point; `upper_bound` is the Clopper-Pearson bound at confidence 1 - delta. With rows from
    `traffic` (`fettle.recertify`) both hold whenever they were looked at: `p_value` is 1 over the evidence, and
    `upper_bound` is `fettle.evidence.bound_at_any_time`.
    """

    alpha: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    rows: int = Field(ge=1)
    errors: int = Field(ge=0)
    p_value: float = Field(ge=0, le=1)
    upper_bound: float = Field(ge=0, le=1)
    batchings: Literal["any", "worst of alone, mixed and full", "as served"] = "any"
    source: Literal["calibration", "traffic"] = "calibration"


class Outcome(Strict):
    """An operating point tried on `test`. `answered` [step][stage]: share of the rows answered there.

    `cpu_ms_per_row` and `reference_cpu_ms_per_row` (the fp32 ONNX reference) are from one run, same threads. `scores`:
    rows by the score of their answer, in 20 equal bins over [0, 1]; empty where it was not recorded.
    """

    rows: int = Field(ge=1)
    errors: int = Field(ge=0)
    disagreement: float = Field(ge=0, le=1)
    answered: list[list[float]]
    cpu_ms_per_row: float = Field(gt=0)
    reference_cpu_ms_per_row: float = Field(gt=0)
    metric_name: str | None = None
    metric: float | None = None
    scores: list[int] = []


class TextFigures(Strict):
    """What an operating point for texts draws, on average a request of `rows`, beside the reference alone.

    `tokens` by step, end tokens and given-up attempts included; `reached` by step, the share of the requests.
    """

    rows: int = Field(ge=1)
    errors: int = Field(ge=0)
    disagreement: float = Field(ge=0, le=1)
    reached: list[float]
    tokens: list[float]
    cost_ms: float = Field(ge=0)
    reference_tokens: float = Field(ge=0)
    reference_cost_ms: float = Field(ge=0)
    given_up: float = Field(ge=0, le=1, description="share of the requests whose first attempt was given up")


class OperatingPoint(Strict):
    """A way to answer: variants in order with their gates, what it costs, and what is certified about it."""

    id: Identifier
    steps: list[Step] = Field(min_length=1)
    certificate: Certificate
    expected_cpu_ms: float = Field(ge=0, description="a row on average, from the stages' costs and validation's rows")
    tuned_disagreement: float = Field(ge=0, le=1, description="on validation, where the thresholds were chosen")
    test: Outcome | None = None
    text: TextFigures | None = Field(default=None, description="of a point for texts, on validation")


class VotePoint(Strict):
    """When a vote among `choices` sampled answers may end early; `certificate`: how often that changes the winner.

    `confidence` None ends it only where no vote left to draw can change the winner. `drawn`: choices on average.
    """

    id: Identifier
    choices: int = Field(ge=2)
    confidence: float | None = Field(default=None, gt=0.5, lt=1)
    temperature: float = Field(gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    drawn: float = Field(ge=1)
    certificate: Certificate | None = Field(default=None, description="none is needed where no winner can change")


class Tested(Strict):
    """One test on a level's path, whether it was passed or not."""

    label: str
    expected_cpu_ms: float
    tuned_disagreement: float
    certificate: Certificate


class Level(Strict):
    """What came of one level of disagreement: the point that may be served at it, and every test on the way.

    Without a point, `reason` says why, and `rows_needed` how many calibration rows it would take at the least.
    """

    alpha: float = Field(gt=0, lt=1)
    point: Identifier | None = None
    reason: str | None = None
    rows_needed: int | None = None
    path: list[Tested] = []


class SelfDisagreement(Strict):
    """The reference against itself, answered alone and in mixed batches: no level below this can be promised."""

    rows: int = Field(ge=1)
    changed: float = Field(ge=0, le=1)
    max_difference: float = Field(ge=0)


class Bin(Strict):
    """Rows whose score lies in [low, high): how many, and the share of them that the reference answers alike."""

    low: float
    high: float
    rows: int = Field(ge=0)
    mean_score: float
    agreed: float


class ScoreCalibration(Strict):
    """How far a variant's score can be trusted, at one of its stages, on validation rows."""

    variant: Identifier
    stage: int = Field(ge=0)
    temperature: float = Field(gt=0)
    bins: list[Bin]


class LabelDisagreement(Strict):
    """On the test rows that the reference gives this label: the share that each point or variant answers otherwise."""

    label: str
    rows: int = Field(ge=0)
    changed: dict[str, float]


class Analysis(Strict):
    """What the passes learnt about this model; for the report only.

    `layer_influence`: 1 - cosine of each layer's input and output. `head_importance` [layer][head] and
    `neuron_importance` [layer][decile]: first-order Taylor importance, each scaled so that the largest is 1.
    `top10_overlap`: for embeddings, the mean share of a text's ten nearest neighbours that a variant keeps.
    """

    layer_influence: list[float] = []
    head_importance: list[list[float]] = []
    neuron_importance: list[list[float]] = []
    scores: list[ScoreCalibration] = []
    labels: list[LabelDisagreement] = []
    top10_overlap: dict[str, float] = {}
    notes: list[str] = Field(default=[], description="what the search decided, in order, in words")
