"""What a user may set, as strict models: one for `optimize`, one for `serve`. Few dials; the rest is derived.

Nothing here reads the environment or a file.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from fettle.key_terms import KeyConfig as KeyConfig
from fettle.manifest import Identifier, TaskKind

Device = Literal["cpu", "cuda"]
ANSWER = r"^(text|labels|pattern=.+|function=[A-Za-z_][\w.]*:[A-Za-z_]\w*)$"


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataFiles(Settings):
    """Either one file that Fettle splits, or one for each split. JSONL (also .gz), CSV or Parquet."""

    data: Path | None = None
    train: Path | None = None
    validation: Path | None = None
    calibration: Path | None = None
    test: Path | None = None
    text_column: str = "text"
    pair_column: str | None = None
    label_column: str = "label"

    @model_validator(mode="after")
    def one_way_or_the_other(self) -> DataFiles:
        splits = [self.train, self.validation, self.calibration, self.test]
        if (self.data is None) == (not any(splits)):
            raise ValueError("give either data, or some of train, validation, calibration and test (at least test)")
        if self.data is None and self.test is None:
            raise ValueError("test is missing: quality is reported on rows that nothing else has seen")
        return self


class Effort(StrEnum):
    """Minutes, about an hour, or several hours for a small encoder on two cores."""

    QUICK = "quick"
    STANDARD = "standard"
    THOROUGH = "thorough"


class OptimizeConfig(Settings):
    """One run of `fettle optimize`."""

    model: str = Field(description="a hub id or a directory")
    out: Path
    files: DataFiles
    name: Identifier | None = Field(default=None, description="the family's name; the model's last path part if None")
    task: TaskKind | None = Field(default=None, description="read from the checkpoint if None")
    recipes: list[Identifier] | None = Field(default=None, description="variant ids to build; all if None")
    effort: Effort = Field(default=Effort.QUICK, description="how much is tried")
    time_budget_minutes: float | None = Field(default=None, gt=0, description="no recipe is begun that would exceed it")
    levels: list[Annotated[float, Field(gt=0, lt=1)]] = Field(
        default=[0.005, 0.01, 0.02, 0.05], min_length=1, description="shares of changed answers to certify"
    )
    delta: float = Field(default=0.05, gt=0, lt=1, description="1 - the confidence of each certificate")
    cosine_floor: float = Field(
        default=0.98,
        gt=0,
        le=1,
        description="for embeddings: a lower cosine to the reference's vector is a changed answer",
    )
    threads: int = Field(default=1, ge=1, description="threads of one engine while measuring, as it will be served")
    max_rows: int = Field(default=4000, ge=16, description="rows of `test` that figures are reported on")
    prompt: str | None = Field(
        default=None, description="for text: what the model is asked, with {text} or another column where it goes"
    )
    answer: Annotated[str, StringConstraints(pattern=ANSWER)] | None = Field(
        default=None,
        description="for text: what of it is compared: text, labels, pattern=REGEX or function=module:name",
    )
    max_tokens: int = Field(default=64, ge=1, description="for text: tokens of a generated text, at most")
    votes: int | None = Field(
        default=None, ge=2, le=128, description="for text: certify votes among so many sampled answers; none if None"
    )
    vote_temperature: float = Field(default=1.0, gt=0, le=2, description="at which the answers of a vote are sampled")
    remeasure: bool = Field(default=False, description="measure again what was measured, e.g. on a busy machine")
    seed: int = 0


class ReplicaConfig(Settings):
    """How many replicas each variant has, and what one asks of Ray; None means: from the manifest."""

    min_replicas: int = Field(default=1, ge=0)
    max_replicas: int = Field(default=2, ge=1)
    max_per_node: int | None = Field(
        default=None, ge=1, description="replicas of one variant on one node, at most; 1 spreads them against its death"
    )
    threads: int = Field(default=1, ge=1, description="intra-op threads of one replica on CPU")
    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)
    gpu_memory_bytes: int | None = Field(
        default=None, ge=1, description="of one GPU: replicas then share GPUs as far as their memory fits"
    )
    device: Device = "cpu"
    prefetch: int = Field(default=1, ge=0, description="batches that wait at a replica while it works on one")
    stuck_after_s: float = Field(
        default=10.0,
        gt=0,
        description="a call without a reply for so long, and twenty times what a full one takes, is done elsewhere; "
        "a replica whose engine hangs for twice that is started again",
    )

    @property
    def places(self) -> int:
        """Batches that one replica holds: the one it works on, and those that wait there."""
        return 1 + self.prefetch

    @model_validator(mode="after")
    def ordered(self) -> ReplicaConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        return self


class PlacementConfig(Settings):
    """Of one variant: where its replicas run, and what differs from `replicas`. None: as said there."""

    min_replicas: int | None = Field(default=None, ge=0)
    max_replicas: int | None = Field(default=None, ge=1)
    threads: int | None = Field(default=None, ge=1)
    cpus: float | None = Field(default=None, ge=0)
    gpus: float | None = Field(default=None, ge=0)
    device: Device | None = None
    memory_bytes: int | None = Field(default=None, ge=1, description="that Ray keeps free for one replica")
    accelerator: str | None = Field(default=None, description="as Ray names it, such as L4, A10G, A100-80G or H100")
    labels: dict[str, str] = Field(default={}, description="of nodes, in Ray's syntax: {zone: a} or {zone: '!in(a,b)'}")

    @model_validator(mode="after")
    def accelerated(self) -> PlacementConfig:
        if self.accelerator is not None and self.device == "cpu":
            raise ValueError("accelerator is for device cuda; leave one of them out")
        return self


class BatchConfig(Settings):
    """Bounds of a batch and of the queue before it."""

    max_rows: int = Field(default=64, ge=1)
    max_tokens: int | None = Field(
        default=None, ge=1, description="padded tokens in a batch; from the latency table and objective if None"
    )
    max_age_ms: float = Field(default=100.0, gt=0, description="a row waiting longer is not passed over any more")
    max_queue_s: float = Field(
        default=2.0, gt=0, description="predicted time to drain the queue, above which requests are refused"
    )
    max_batch_queue_s: float = Field(default=60.0, gt=0, description="the same for requests of priority `batch`")


class TextConfig(Settings):
    """Of the replicas that generate text."""

    slots: int = Field(default=16, ge=1, description="generations that decode together in one replica, at most")
    cache_bytes: int = Field(
        default=1 << 30, ge=1, description="memory of one replica for keys and values; long texts take more of it"
    )
    chunk_tokens: int = Field(default=128, ge=1, description="of a prompt, fed between two steps of running texts")
    waiting: int = Field(default=8, ge=0, description="generations that wait at a replica whose slots are full")
    lookup: bool = Field(
        default=True,
        description="guess tokens that stood in the text before, while that pays; in float32, where it changes nothing",
    )
    draft: Identifier | Literal["auto", "off"] = Field(
        default="auto",
        description="the variant that guesses for float32 ones, while a replica writes one text alone and it pays; "
        "auto: the one, if any, that helps most by what was measured",
    )


class LimitConfig(Settings):
    """Bounds of one request."""

    max_body_bytes: int = Field(default=2_000_000, ge=1)
    max_inputs: int = Field(default=256, ge=1)
    body_within_s: float = Field(default=30.0, gt=0, description="a body that is not complete by then gets 408")


Share = Annotated[float, Field(ge=0, le=1)]


class AutoscaleConfig(Settings):
    """How many replicas there are between the least and the most: see `fettle.autoscale`."""

    target_utilisation: float = Field(
        default=0.95, gt=0, le=1, description="part of the replicas' time that the work which comes should take"
    )
    drain_s: float = Field(default=5.0, gt=0, description="in which more replicas should drain what waits")
    down_delay_s: float = Field(
        default=30.0, ge=0, description="how long less must have been enough before replicas go, a quarter at a time"
    )
    zero_delay_s: float = Field(
        default=300.0, ge=0, description="without a request before the last one goes, where min_replicas is 0"
    )
    memory_bytes: int | None = Field(
        default=None, ge=1, description="for the replicas of all variants together; no bound if None"
    )


class MonitorConfig(Settings):
    """The watch over what is promised: a share of the traffic is also answered by the reference, and compared."""

    share: Share = Field(default=0.01, description="of the rows, chosen before anything else is known about them")
    delta: float = Field(default=0.01, gt=0, lt=1, description="an alarm needs evidence of 1/delta")
    directory: str | None = Field(
        default=None, description="where the evidence is kept; `quality` in the family's directory if None"
    )


class GearConfig(Settings):
    """When load shifts a quality class to a cheaper point of its own, and back."""

    objective_ms: float = Field(default=100.0, gt=0, description="time in the system that a request should not exceed")
    up: float = Field(default=0.7, gt=0, description="predicted drain time over the objective, above which to shift")
    down: float = Field(default=0.3, gt=0, description="below which, after the dwell time, to go back")
    dwell_s: float = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def ordered(self) -> GearConfig:
        if self.down >= self.up:
            raise ValueError(f"down {self.down:g} must be below up {self.up:g}, or gears oscillate")
        return self


class StoreConfig(Settings):
    """A node's copies of families that are at a URL."""

    cache: str = Field(default="~/.cache/fettle/models", description="a directory on a disk of each node")
    max_bytes: int = Field(default=200 << 30, ge=1, description="of model files; what no replica uses is evicted")


class TracingConfig(Settings):
    """OpenTelemetry traces; none where there is no endpoint."""

    endpoint: str | None = Field(
        default=None, description="where spans go, by OTLP over HTTP: http://127.0.0.1:4318/v1/traces"
    )
    share: Share = Field(default=0.01, description="of the requests that come without a trace of their own")


Step = Annotated[float, Field(gt=0, lt=1)]


class RolloutConfig(Settings):
    """A new version of a family beside the old one: how its share of the requests grows, and what ends it."""

    path: str = Field(description="the new version, a family directory")
    steps: list[Step] = Field(
        default=[0.05, 0.25, 0.5], min_length=1, description="shares of the requests; after the last one it gets all"
    )
    hold_s: float = Field(default=60.0, ge=0, description="a step takes at least so long")
    min_requests: int = Field(default=200, ge=1, description="and so many requests at the new version")
    shadow: Share = Field(default=0.2, description="of its rows, which are compared with the old version's reference")
    min_compared: int = Field(default=50, ge=0, description="comparisons before the second step, where they are judged")
    slower: float = Field(
        default=1.5, ge=1, description="times the old version's 90th percentile, above which an answer is slow"
    )
    max_disagreement: Step | None = Field(
        default=None, description="share of answers that may differ from the old reference's; judged only if given"
    )
    delta: float = Field(
        default=0.01, gt=0, lt=1, description="chance to roll back a version that is no worse than the old one"
    )
    ready_within_s: float = Field(default=900.0, gt=0)
    attempt: str = Field(default="", description="anything: another one begins the same rollout again")

    @field_validator("steps")
    @classmethod
    def growing(cls, steps: list[float]) -> list[float]:
        if sorted(set(steps)) != steps:
            raise ValueError("steps must grow, such as [0.05, 0.25, 0.5]")
        return steps


class FamilyConfig(Settings):
    """One family behind the service."""

    path: str = Field(description="a directory, or a URL that fsspec knows, such as s3://bucket/family")
    name: Identifier | None = None
    variants: list[Identifier] | None = Field(
        default=None, description="variants to serve; the measured frontier and the default one if None"
    )
    max_disagreement: Share | Literal["exact"] = Field(
        default=0.01, description="the class of requests that name none, where the family has certified points"
    )
    default: Identifier | None = Field(
        default=None, description="a variant that answers requests that name no class, without a promise"
    )
    rollout: RolloutConfig | None = Field(default=None, description="a new version that takes over in steps")


class ServeConfig(Settings):
    """What `deployments.app:build` takes; `serve run deployments.app:build family=DIR` is the short form."""

    families: list[FamilyConfig] = Field(min_length=1)
    replicas: ReplicaConfig = ReplicaConfig()
    placement: dict[str, PlacementConfig] = Field(default={}, description="by variant, or family:variant")
    cpu_nodes: bool | None = Field(
        default=None,
        description="CPU variants run on machines without accelerators only; None: if there is one at deployment",
    )
    batch: BatchConfig = BatchConfig()
    text: TextConfig = TextConfig()
    limits: LimitConfig = LimitConfig()
    gears: GearConfig = GearConfig()
    monitor: MonitorConfig = MonitorConfig()
    store: StoreConfig = StoreConfig()
    tracing: TracingConfig = TracingConfig()
    autoscale: AutoscaleConfig = AutoscaleConfig()
    classes: dict[Identifier, Share] = Field(
        default={}, description="names that requests may use for a level of disagreement, such as gold: 0.005"
    )
    routers: int = Field(default=1, ge=1, description="router replicas; they share nothing")
    max_routers: int | None = Field(
        default=None, ge=1, description="as load may need, `routers` if None; keys' limits are shared out by `routers`"
    )
    router_cpus: float = Field(default=1.0, ge=0)
    routers_per_node: int | None = Field(
        default=None, ge=1, description="routers on one node, at most; 1 spreads them against its death"
    )
    wire: bool = Field(
        default=True,
        description="routers call replicas over sockets of their own; if false, through Ray, which costs more",
    )
    surge_percent: int = Field(
        default=25, ge=1, le=100, description="replicas beyond the number wanted, while others replace them; rounded up"
    )
    drain_s: float = Field(
        default=300.0, gt=0, description="time for requests under way, such as long texts, when a router is replaced"
    )
    api_keys: list[KeyConfig] = Field(default=[], repr=False)
    keys_file: str | None = Field(
        default=None, description="API keys as `fettle keys` writes them, read when it changes"
    )
    proxy_secret_file: str | None = Field(
        default=None, description="holds the word that HAProxy adds to requests; routers refuse those without it"
    )

    @model_validator(mode="before")
    @classmethod
    def short_form(cls, value: object) -> object:
        """`family=DIR` (or several, separated by commas) stands for `families`."""
        if isinstance(value, dict) and "family" in value:
            if "families" in value:
                raise ValueError("give either family or families")
            rest = {key: item for key, item in value.items() if key != "family"}
            return {"families": [{"path": path} for path in str(value["family"]).split(",")], **rest}
        return value

    @field_validator("api_keys", mode="before")
    @classmethod
    def bare_keys(cls, value: object) -> object:
        """A string stands for a key without limits; its name is its place in the list."""
        if not isinstance(value, list | tuple):
            return value
        return [
            {"key": item, "name": f"key-{place}"} if isinstance(item, str) else item
            for place, item in enumerate(value, 1)
        ]

    @model_validator(mode="after")
    def evidence_has_a_place(self) -> ServeConfig:
        for number, family in enumerate(self.families):
            paths = [family.path, *([family.rollout.path] if family.rollout else [])]
            if self.monitor.directory is None and any("://" in path for path in paths):
                raise ValueError(
                    f"monitor.directory is needed, since families.{number}.path is a URL, where no evidence can be "
                    "written; give a directory that all nodes share"
                )
        return self

    @model_validator(mode="after")
    def routers_ordered(self) -> ServeConfig:
        if self.max_routers is not None and self.max_routers < self.routers:
            raise ValueError(f"max_routers {self.max_routers} is less than routers {self.routers}")
        return self

    @model_validator(mode="after")
    def keys_differ(self) -> ServeConfig:
        for field in ("key", "name"):
            seen = [getattr(item, field) for item in self.api_keys]
            if len(set(seen)) < len(seen):
                raise ValueError(f"two api_keys have the same {field}; give each its own")
        return self
