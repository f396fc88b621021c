"""A classifier with exits as one graph, and that graph cut into the stages that are served.

One graph first, so that it is fused and quantized as a whole; then `split`. Where an exit reads the first token alone,
its stage stops before the exit's layer and computes that layer for the first token only (`optimize.first_token`);
rows that go on compute the layer in full in the next stage. Otherwise a stage ends with its exit's layer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx
from onnx import helper
from pydantic import JsonValue
from torch import Tensor, nn

from fettle.errors import PassError, first_line
from fettle.manifest import Stage
from fettle.rows import Rows
from optimize.exits import MultiExit, layer_count
from optimize.export import OPSET, TOLERANCE, check_against_torch, quiet, save_graph, trace
from optimize.fuse import drop_unused
from optimize.load import Reference

# In the graph's own metadata, which rewriting keeps.
LAYERS = "fettle.answers_after_layers"
# A graph cannot have an input and an output of one name.
VALUES, HIDDEN, NEXT_HIDDEN = "values", "hidden", "next_hidden"


class _Cut(nn.Module):
    """Answers, then the hidden states that go from stage to stage."""

    def __init__(self, model: MultiExit) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        answers, states = self.model.answers_and_states(input_ids, attention_mask, token_type_ids)
        before = 1 if self.model.first_token else 0
        return (*answers, *(states[layer - before] for layer in self.model.layers))


def export_multi_exit(reference: Reference, model: MultiExit, path: Path, sample: Rows) -> dict[str, JsonValue]:
    """Write one graph with inputs as `export_onnx` has them.

    Outputs: `exit_0`.. and `values`, float32 [batch, width]; `hidden_0`.., [batch, length, hidden], what the stage
    after that exit starts from, or [1, tokens, hidden] once the graph is packed (`optimize.pack`).

    Raises:
        PassError: the exporter failed, or an answer on `sample` differs from torch's beyond the tolerance.
    """
    exits = range(len(model.layers))
    outputs = [*map(_exit, exits), VALUES, *map(_boundary, exits)]
    try:
        with quiet():
            trace(_Cut(model), reference.tokenizer, outputs, path)
    except Exception as error:
        # The exporter raises whatever the model's code happens to raise under tracing.
        raise PassError(
            f"torch.onnx.export failed on {reference.source.architecture} with exits: {first_line(error)}"
        ) from error
    _note_layers(path, [*model.layers, layer_count(model.scorer)])
    onnx.checker.check_model(str(path))
    difference = check_against_torch(model, reference.tokenizer, path, sample)
    return {
        "opset": OPSET,
        "exits_after": list(model.layers),
        "first_token": model.first_token,
        "max_difference": difference,
        "tolerance": TOLERANCE,
    }


def split(path: Path, directory: Path) -> list[Stage]:
    """Cut a finished graph of `export_multi_exit` into `stage_0.onnx`.. in `directory`.

    A stage reads what it still needs of the graph's inputs, and `hidden` if it is not the first ([batch, length,
    hidden], of a packed graph [1, tokens, hidden]); it gives `values` [batch, width], and `next_hidden` if it is not
    the last. It holds its own weights alone.

    Raises:
        PassError: the graph was not exported with exits, or has lost one on its way.
    """
    model = onnx.load(path)
    layers = _layers(model, path)
    exits = len(layers) - 1
    answers = [*map(_exit, range(exits)), VALUES]
    boundaries = [_boundary(index) for index in range(exits)]
    missing = sorted({*answers, *boundaries} - {item.name for item in model.graph.output})
    if missing:
        raise PassError(f"{path}: the graph has no output {', '.join(missing)}; export it with exits again")
    stages = []
    for index, layer in enumerate(layers):
        name = f"stage_{index}.onnx"
        entry = boundaries[index - 1] if index else None
        departure = boundaries[index] if index < exits else None
        save_graph(_stage(model, entry, answers[index], departure), directory / name)
        onnx.checker.check_model(str(directory / name))
        stages.append(Stage(file=name, layers=layer))
    return stages


def _note_layers(path: Path, layers: Sequence[int]) -> None:
    model = onnx.load(path)
    helper.set_model_props(model, {LAYERS: json.dumps(layers)})
    save_graph(model, path)


def _layers(model: onnx.ModelProto, path: Path) -> list[int]:
    """After which layers the graph answers; the last is its number of layers."""
    for item in model.metadata_props:
        if item.key == LAYERS:
            return [int(layer) for layer in json.loads(item.value)]
    raise PassError(f"{path}: the graph does not say where its exits are; export it with exits first")


def _exit(index: int) -> str:
    return f"exit_{index}"


def _boundary(index: int) -> str:
    return f"hidden_{index}"


def _stage(model: onnx.ModelProto, entry: str | None, answer: str, departure: str | None) -> onnx.ModelProto:
    """What `answer` and `departure` need, from `entry` on."""
    stage = onnx.ModelProto()
    stage.CopyFrom(model)
    graph = stage.graph
    outputs = {item.name: item for item in model.graph.output}
    if entry is not None:
        # Its maker has no readers then, and is dropped with all that only it needed.
        _rename(graph, entry, HIDDEN, makers=False)
        graph.input.append(_described_as(outputs[entry], HIDDEN))
    names = {answer: VALUES} | ({departure: NEXT_HIDDEN} if departure is not None else {})
    del graph.output[:]
    graph.output.extend(outputs[name] for name in names)
    drop_unused(stage)
    # Renamed after the dropping, since the whole graph had a `values` of its own.
    for name, role in names.items():
        _rename(graph, name, role, makers=True)
    del graph.output[:]
    graph.output.extend(_described_as(outputs[name], role) for name, role in names.items())
    read = {name for node in graph.node for name in node.input}
    inputs = [item for item in graph.input if item.name in read]
    del graph.input[:]
    graph.input.extend(inputs)
    del graph.value_info[:]
    # What is said there is about the whole graph.
    del stage.metadata_props[:]
    return stage


def _rename(graph: onnx.GraphProto, old: str, new: str, *, makers: bool) -> None:
    for node in graph.node:
        for names in (node.input, node.output) if makers else (node.input,):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new


def _described_as(item: onnx.ValueInfoProto, name: str) -> onnx.ValueInfoProto:
    renamed = onnx.ValueInfoProto()
    renamed.CopyFrom(item)
    renamed.name = name
    return renamed
