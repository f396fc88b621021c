"""Valid families without a model: fake engines behind real manifests, hashes and a real tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from fettle import __version__
from fettle.certificates import certify
from fettle.family import (
    FAMILY_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    Family,
    record_files,
    variant_directory,
    write_manifest,
)
from fettle.manifest import (
    BatchInvariance,
    DataSplit,
    DecoderSpec,
    FamilyManifest,
    Gate,
    Hardware,
    Head,
    LatencyCell,
    LatencyTable,
    Level,
    Measurements,
    OperatingPoint,
    Outcome,
    PassRecord,
    Precision,
    Quality,
    Runtime,
    Source,
    Stage,
    Step,
    Task,
    TaskKind,
    TokenizerSpec,
    VariantEntry,
    VariantManifest,
)
from fettle.points import fingerprint
from fettle.store import sha256_bytes

PAD, UNKNOWN, CLS, SEP = 0, 1, 2, 3
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
# Word n has the token id n + 4; "poison" and "crash" are handy for engines that fail on a token.
WORDS = ["the", "quick", "brown", "fox", "poison", "crash", *(f"word{n}" for n in range(250))]
HARDWARE = Hardware(processor="fake", cores=1, memory_bytes=1 << 30)


@dataclass(frozen=True)
class FakeVariant:
    """See `workers.fake`. An early one of several `stages` has read only the beginning of a row."""

    id: str = "fake"
    ms_per_call: float = 0.0
    ms_per_token: float = 0.0
    fail_on_token: int | None = None
    exit_on_token: int | None = None
    corrupt_every: int | None = None
    stall_file: str | None = None
    tokens_read: int | None = None
    stages: int = 1
    salt: int = 0
    disagreement: float = 0.0
    invariant: bool = True


def token_id(word: str) -> int:
    return WORDS.index(word) + len(SPECIAL)


def classify_task(labels: Sequence[str] = ("red", "green", "blue")) -> Task:
    return Task(kind=TaskKind.CLASSIFY, head=Head.SINGLE_LABEL, labels=list(labels), width=len(labels))


def embed_task(width: int = 8) -> Task:
    return Task(kind=TaskKind.EMBED, width=width, pooling="mean", normalized=True)


def tokenizer_json() -> bytes:
    """A word-level tokenizer that adds [CLS] and [SEP] and knows pairs."""
    fast = FastTokenizer(
        WordLevel({word: index for index, word in enumerate([*SPECIAL, *WORDS])}, unk_token=SPECIAL[UNKNOWN])
    )
    fast.pre_tokenizer = Whitespace()
    fast.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)],
    )
    return fast.to_str().encode()


def tokenizer_spec(max_length: int = 64) -> TokenizerSpec:
    return TokenizerSpec(max_length=max_length, vocabulary=len(SPECIAL) + len(WORDS), pad_id=PAD, segments=True)


def make_fake_family(
    directory: Path,
    *,
    name: str = "fake",
    task: Task | None = None,
    variants: Sequence[FakeVariant] = (FakeVariant(),),
    default: str | None = None,
    max_length: int = 64,
    points: Sequence[OperatingPoint] = (),
) -> Family:
    """Write a family of fake variants into `directory` and open it. The first variant is the reference."""
    task = task or classify_task()
    spec = tokenizer_spec(max_length)
    (directory / "tokenizer").mkdir(parents=True)
    (directory / TOKENIZER_FILE).write_bytes(tokenizer_json())
    entries = [_write_variant(directory, variant, task, spec) for variant in variants]
    manifest = FamilyManifest(
        fettle_version=__version__,
        name=name,
        source=Source(name=name, architecture="Fake", sha256=sha256_bytes(name.encode())),
        task=task,
        tokenizer=spec,
        tokenizer_files=[
            record.model_copy(update={"path": f"tokenizer/{record.path}"})
            for record in record_files(directory / "tokenizer")
        ],
        reference=variants[0].id,
        default=default or variants[0].id,
        data={"test": DataSplit(rows=100, sha256=sha256_bytes(b"test"), labelled=False)},
        hardware=HARDWARE,
        variants=entries,
        points=list(points),
        levels=[Level(alpha=point.certificate.alpha, point=point.id) for point in points],
    )
    write_manifest(directory / FAMILY_FILE, manifest)
    return Family.open(directory)


def make_step(variant: str, *thresholds: float) -> Step:
    """A step with a gate for each stage; one that takes everything if no threshold is given."""
    return Step(variant=variant, gates=[Gate(threshold=threshold) for threshold in thresholds or (0.0,)])


def make_point(id: str, alpha: float, *steps: Step, cost: float = 1.0) -> OperatingPoint:
    """A point that passed its test with errors to spare. On `test` each open gate took half of what was left."""
    rows, errors = math.ceil(400 / alpha), 300
    answered, left = [], 1.0
    for step in steps:
        answered.append([0.0] * len(step.gates))
        for stage, gate in enumerate(step.gates):
            if gate.threshold <= 1:
                answered[-1][stage] = left if gate.threshold == 0 else left / 2
                left -= answered[-1][stage]
    answered[-1][-1] += left
    return OperatingPoint(
        id=id,
        steps=list(steps),
        certificate=certify(errors, rows, alpha, 0.05),
        expected_cpu_ms=cost,
        tuned_disagreement=0.7 * alpha,
        test=Outcome(
            rows=1000,
            errors=round(750 * alpha),
            disagreement=0.75 * alpha,
            answered=answered,
            cpu_ms_per_row=cost,
            reference_cpu_ms_per_row=10.0,
        ),
    )


def renewed(point: OperatingPoint) -> OperatingPoint:
    """The same way to answer with a new certificate, and so another fingerprint, as `fettle recertify` makes it."""
    found = point.certificate
    again = certify(found.errors + 1, found.rows + 1, found.alpha, found.delta)
    made = point.model_copy(update={"certificate": again.model_copy(update={"source": "traffic"})})
    assert fingerprint(made) != fingerprint(point)
    return made


def give_points(directory: Path, points: Sequence[OperatingPoint]) -> None:
    """Replace the points of a family on the disk."""
    change_json(directory / FAMILY_FILE, points=[point.model_dump(mode="json") for point in points])


def change_json(path: Path, **changes: object) -> None:
    """Overwrite top-level keys of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def latency_table(variant: FakeVariant, max_length: int = 64) -> LatencyTable:
    def cell(batch: int, length: int) -> LatencyCell:
        ms = max(0.01, variant.ms_per_call + variant.ms_per_token * batch * length)
        return LatencyCell(batch=batch, length=length, median_ms=ms, p95_ms=ms * 1.1)

    lengths = [length for length in (16, 32, 64, 128) if length <= max_length] or [max_length]
    return LatencyTable(
        device="cpu", threads=1, cells=[cell(batch, length) for batch in (1, 4, 8, 16, 32) for length in lengths]
    )


def _write_variant(directory: Path, variant: FakeVariant, task: Task, spec: TokenizerSpec) -> VariantEntry:
    folder = variant_directory(directory, variant.id)
    folder.mkdir(parents=True)
    (folder / "weights.bin").write_bytes(variant.id.encode() * 100)
    stages = []
    if variant.stages > 1:
        stages = [Stage(file=f"stage{number}.bin", layers=number + 1) for number in range(variant.stages)]
    for stage in stages:
        (folder / stage.file).write_bytes(f"{variant.id} {stage.file}".encode() * 100)
    parameters = {
        "ms_per_call": variant.ms_per_call,
        "ms_per_token": variant.ms_per_token,
        "fail_on_token": variant.fail_on_token,
        "exit_on_token": variant.exit_on_token,
    }
    generates = task.kind is TaskKind.GENERATE
    if generates:
        parameters |= {"salt": variant.salt}
    else:
        parameters |= {
            "corrupt_every": variant.corrupt_every,
            "tokens_read": variant.tokens_read,
            "stall_file": variant.stall_file,
        }
    manifest = VariantManifest(
        id=variant.id,
        runtime=Runtime.FAKE,
        precision=Precision.FP32,
        recipe=[PassRecord(name="fake", parameters=parameters, seconds=0)],
        tokenizer=spec,
        task=task,
        files=record_files(folder),
        stages=stages,
        decoder=DecoderSpec(layers=2, kv_heads=2, head_dim=8, context=spec.max_length) if generates else None,
        measured=_measured(variant, spec.max_length),
    )
    return VariantEntry(id=variant.id, manifest_sha256=write_manifest(folder / MANIFEST_FILE, manifest))


def _measured(variant: FakeVariant, max_length: int) -> Measurements:
    return Measurements(
        fingerprint=sha256_bytes(variant.id.encode()),
        hardware=HARDWARE,
        quality=Quality(rows=100, disagreement=variant.disagreement, loss="another label first", max_difference=0.0),
        batching=BatchInvariance(
            rows=100, batch=32, changed=0.0, max_difference=0.0, tolerance=1e-4, invariant=variant.invariant
        ),
        latency=latency_table(variant, max_length),
        prompts=latency_table(variant, max_length),
        typical_length=min(16, max_length),
        stage_cpu_ms=[1.0] * variant.stages if variant.stages > 1 else [],
        peak_memory_bytes=100 << 20,
        load_seconds=0.01,
        seconds=1.0,
    )
