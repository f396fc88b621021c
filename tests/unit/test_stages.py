"""A classifier cut into stages: every stage answers as torch does, and rows leave where their own thresholds say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from fettle.answers import confidence
from fettle.errors import EngineError, PassError
from fettle.manifest import Precision, Runtime, Stage, VariantManifest
from fettle.rows import Exits, Rows, joined
from optimize.exits import ExitHead, Heads, MultiExit, layer_count, reads_first_token
from optimize.export import export_onnx
from optimize.first_token import first_token
from optimize.fuse import fuse
from optimize.load import Reference, load_reference
from optimize.pack import pack
from optimize.quantize import quantize_dynamic_int8
from optimize.quantize_static import quantize_static_int8
from optimize.stages import export_multi_exit, split
from tests.unit import tiny_models
from tests.unit.test_architectures import distance, sample_rows
from workers.engine import EngineOptions, open_engine
from workers.onnx_encoder import in_calls, taken
from workers.staged_encoder import StagedEncoder

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Staged:
    reference: Reference
    model: MultiExit
    directory: Path
    stages: list[Stage]
    packed: bool = False

    def manifest(self, **changes) -> VariantManifest:
        return VariantManifest(
            id="v", runtime=Runtime.ONNX, precision=Precision.FP32, recipe=[], tokenizer=self.reference.tokenizer,
            task=self.reference.task, files=[], stages=self.stages, packed=self.packed, **changes,
        )  # fmt: skip

    def engine(self, **changes) -> StagedEncoder:
        return StagedEncoder(self.directory, self.manifest(**changes), EngineOptions())

    def expected(self, rows: Rows) -> np.ndarray:
        """What torch answers at every exit and at the end: [rows, stages, width]."""
        arrays = rows.padded(self.reference.tokenizer.pad_id)[: 3 if self.reference.tokenizer.segments else 2]
        with torch.inference_mode():
            return np.stack([values.numpy() for values in self.model(*map(torch.from_numpy, arrays))], axis=1)


def random_heads(reference: Reference, layers: list[int], *, first: bool | None = None) -> Heads:
    torch.manual_seed(1)
    if first is None:
        ids = torch.randint(5, 80, (2, 6))
        first = reads_first_token(reference.model, [ids, torch.ones_like(ids)])
    heads = {}
    for layer in layers:
        heads[layer] = ExitHead(64 if first else 32, reference.task.width).eval().requires_grad_(False)
        heads[layer].outer.weight.mul_(8)
    return Heads(heads, first, dict.fromkeys(layers, 0.0))


def staged(
    source: Path, directory: Path, layers: list[int], *, first: bool | None = None, packed: bool = False
) -> Staged:
    directory.mkdir()
    reference = load_reference(str(source))
    model = MultiExit(reference.model, random_heads(reference, layers, first=first)).eval()
    sample = sample_rows(reference)
    export_multi_exit(reference, model, directory / "whole.onnx", sample)
    fuse(directory / "whole.onnx", directory / "fused.onnx", sample, reference.tokenizer)
    first_token(directory / "fused.onnx", directory / "narrow.onnx", sample, reference.tokenizer)
    if packed:
        notes = pack(directory / "narrow.onnx", directory / "packed.onnx", sample, reference.tokenizer)
        assert notes["packed"], notes
    whole = directory / ("packed.onnx" if packed else "narrow.onnx")
    return Staged(reference, model, directory, split(whole, directory), packed)


# Packed, one whose attention is a single operator and one where it is several.
EACH = [*((name, False) for name in tiny_models.CLASSIFIERS), ("bert", True), ("modernbert", True)]


@pytest.fixture(scope="module", params=EACH, ids=lambda each: each[0] + "-packed" * each[1])
def each(request, tmp_path_factory) -> Staged:
    name, packed = request.param
    folder = tmp_path_factory.mktemp(name)
    return staged(tiny_models.classifier(folder / "source", name), folder / "v", [1], packed=packed)


@pytest.fixture(scope="module", params=[False, True], ids=["padded", "packed"])
def deep(request, tmp_path_factory) -> Staged:
    """BERT of four layers with exits after 1 and 3."""
    folder = tmp_path_factory.mktemp("deep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.SIZES, "num_hidden_layers", 4)
        source = tiny_models.classifier(folder / "source")
    return staged(source, folder / "v", [1, 3], packed=request.param)


def gates(rows: Rows, *thresholds: float | np.ndarray, temperatures: tuple[float, ...] | None = None) -> Exits:
    table = np.stack([np.broadcast_to(np.float32(value), len(rows)) for value in thresholds], axis=1)
    each = np.asarray(temperatures or (1.0,) * len(thresholds), np.float32)
    return Exits(table, np.tile(each, (len(table), 1)))


def test_every_stage_answers_as_torch_does(each):
    rows = sample_rows(each.reference, seed=1, typed=True)
    values = each.engine().by_stage(rows)
    assert values.shape == (len(rows), 2, each.reference.task.width)
    assert distance(values, each.expected(rows)) < TOLERANCE


def test_the_last_stage_is_the_model_itself(each):
    rows = sample_rows(each.reference, seed=2)
    arrays = rows.padded(tiny_models.PAD)[: 3 if each.reference.tokenizer.segments else 2]
    with torch.inference_mode():
        own = each.reference.model(*map(torch.from_numpy, arrays)).numpy()
    outputs = each.engine().run(rows)
    assert distance(outputs.values, own) < TOLERANCE
    assert outputs.stages.tolist() == [1] * len(rows)


def test_stages_know_their_layers_and_carry_their_own_weights_alone(each):
    assert [stage.layers for stage in each.stages] == [1, layer_count(each.reference.model)]
    first, second = (onnx.load(each.directory / stage.file) for stage in each.stages)
    assert [item.name for item in second.graph.input][-1] == "hidden"
    assert [item.name for item in first.graph.output] == ["values", "next_hidden"]
    assert [item.name for item in second.graph.output] == ["values"]
    vocabulary = [item.name for item in first.graph.initializer if item.dims[:1] == [tiny_models.VOCABULARY]]
    assert vocabulary
    assert not set(vocabulary) & {item.name for item in second.graph.initializer}


def test_rows_leave_by_their_own_thresholds(deep):
    rows = sample_rows(deep.reference, seed=3)
    expected = deep.expected(rows)
    early = np.where(np.arange(len(rows)) % 3 == 0, 0.0, 2.0)
    later = np.where(np.arange(len(rows)) % 3 == 1, 0.0, 2.0)
    outputs = deep.engine().run(rows, gates(rows, early, later))
    assert outputs.stages.dtype == np.int8
    assert outputs.stages.tolist() == [index % 3 for index in range(len(rows))]
    assert distance(outputs.values, expected[np.arange(len(rows)), outputs.stages]) < TOLERANCE


def test_scores_decide_at_each_stages_temperature(deep):
    rows = sample_rows(deep.reference, seed=4)
    expected = deep.expected(rows)
    temperatures = (0.5, 3.0)
    scores = [confidence(expected[:, i], deep.reference.task, temperatures[i]) for i in range(2)]
    # Between two rows' scores, so that rounding decides nothing.
    thresholds = [float(np.sort(each)[len(rows) // 2 - 1 : len(rows) // 2 + 1].mean()) for each in scores]
    stages = np.where(scores[0] >= thresholds[0], 0, np.where(scores[1] >= thresholds[1], 1, 2))
    assert set(stages) == {0, 1, 2}
    outputs = deep.engine().run(rows, gates(rows, *thresholds, temperatures=temperatures))
    assert outputs.stages.tolist() == stages.tolist()


@pytest.mark.parametrize("compact_at", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("row_by_row", [False, True])
def test_who_shares_the_batch_changes_nothing(deep, compact_at, row_by_row):
    rows = sample_rows(deep.reference, seed=5)
    random = np.random.default_rng(0)
    exits = gates(rows, random.choice([0.0, 2.0], len(rows)), random.choice([0.0, 2.0], len(rows)))
    engine = deep.engine(row_by_row=row_by_row)
    engine.compact_at = compact_at
    outputs = engine.run(rows, exits)
    assert set(outputs.stages.tolist()) == {0, 1, 2}
    assert distance(outputs.values, deep.expected(rows)[np.arange(len(rows)), outputs.stages]) < TOLERANCE
    assert distance(engine.by_stage(rows), deep.expected(rows)) < TOLERANCE


def test_rows_that_have_left_are_computed_no_more(deep, monkeypatch):
    engine = deep.engine(row_by_row=False)
    seen = []
    inner = engine._stages[1].session.run

    def counted(names, feed):
        seen.append((feed["hidden"].shape, feed["attention_mask"].shape))
        return inner(names, feed)

    monkeypatch.setattr(engine._stages[1].session, "run", counted)
    rows = sample_rows(deep.reference, seed=6)
    stay = rows.lengths < 12
    engine.run(rows, gates(rows, np.where(stay, 2.0, 0.0), 2.0))
    assert sum(mask[0] for _, mask in seen) == stay.sum()
    assert max(mask[1] for _, mask in seen) == rows.lengths[stay].max()
    tokens = sum(hidden[0] * hidden[1] for hidden, _ in seen)
    assert tokens == (rows.lengths[stay].sum() if deep.packed else sum(mask[0] * mask[1] for _, mask in seen))


def test_what_is_left_of_many_calls_shares_calls_again(deep, monkeypatch):
    engine = deep.engine(row_by_row=False)
    engine._call_tokens = 64
    rows = joined([sample_rows(deep.reference, seed=seed) for seed in range(6)])
    expected = deep.expected(rows)
    stay = np.arange(len(rows)) % 4 == 0
    calls = []
    inner = engine._stages[1].session.run
    monkeypatch.setattr(engine._stages[1].session, "run", lambda *args: calls.append(1) or inner(*args))
    outputs = engine.run(rows, gates(rows, np.where(stay, 2.0, 0.0), 2.0))
    assert distance(outputs.values, expected[np.arange(len(rows)), outputs.stages]) < TOLERANCE
    assert outputs.stages.tolist() == np.where(stay, 2, 0).tolist()
    # As few as for a batch of these rows alone.
    assert len(calls) == len(in_calls(taken(rows, np.flatnonzero(stay).tolist()), 64, deep.manifest()))
    assert len(calls) < len(in_calls(rows, 64, deep.manifest()))


def test_a_score_that_is_nan_never_leaves(deep, monkeypatch):
    engine = deep.engine()
    inner = engine._stages[0].session.run

    def broken(names, feed):
        values, hidden = inner(names, feed)
        return [np.full_like(values, np.nan), hidden]

    monkeypatch.setattr(engine._stages[0].session, "run", broken)
    rows = sample_rows(deep.reference, seed=7)
    outputs = engine.run(rows, gates(rows, 0.0, 2.0))
    assert outputs.stages.tolist() == [2] * len(rows)
    assert np.isfinite(outputs.values).all()


def test_mean_pooled_exits_end_with_their_layer(tmp_path):
    """Nothing is saved by the first token then, and the boundary is the output of the exit's layer."""
    built = staged(tiny_models.classifier(tmp_path / "source"), tmp_path / "v", [1], first=False)
    rows = sample_rows(built.reference, seed=8)
    assert distance(built.engine().by_stage(rows), built.expected(rows)) < TOLERANCE
    graphs = [onnx.load(built.directory / stage.file).graph for stage in built.stages]
    assert [sum(node.op_type == "Attention" for node in graph.node) for graph in graphs] == [1, 1]


def test_a_quantized_graph_splits_as_well(deep, tmp_path):
    quantize_dynamic_int8(deep.directory / "narrow.onnx", tmp_path / "int8.onnx")
    stages = split(tmp_path / "int8.onnx", tmp_path)
    assert stages == deep.stages
    rows = sample_rows(deep.reference, seed=9)
    values = StagedEncoder(tmp_path, deep.manifest(), EngineOptions()).by_stage(rows)
    expected = deep.expected(rows)
    assert np.abs(values - expected).mean() < 0.35 * expected.std()
    weights = onnx.load(tmp_path / "stage_2.onnx").graph.initializer
    assert sum(item.data_type == onnx.TensorProto.INT8 for item in weights) >= 6


def test_a_graph_with_exits_is_quantized_statically_as_well(deep, tmp_path):
    spec, sample = deep.reference.tokenizer, sample_rows(deep.reference, seed=5)
    notes = quantize_static_int8(deep.directory / "narrow.onnx", tmp_path / "int8.onnx", sample, spec)
    assert notes["quantized"]
    assert split(tmp_path / "int8.onnx", tmp_path) == deep.stages


def test_a_graph_without_exits_is_refused_by_name(deep, tmp_path):
    export_onnx(deep.reference, tmp_path / "plain.onnx", sample_rows(deep.reference))
    with pytest.raises(PassError, match=r"plain\.onnx.*export it with exits"):
        split(tmp_path / "plain.onnx", tmp_path)


def test_the_manifest_opens_it_and_closing_ends_it(deep):
    (deep.directory / "manifest.json").write_text(deep.manifest().model_dump_json())
    engine = open_engine(deep.directory)
    assert isinstance(engine, StagedEncoder)
    engine.warm_up()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(sample_rows(deep.reference))
