"""Which recipe to try next, from the measurements so far. Pure: no files, no models.

The agenda is walked from its start each time; the first recipe on it that was not tried is next. What later entries
are (the quantization of students, the layers of exits, how much is pruned) depends on what the earlier ones measured,
and each such decision is a sentence in the report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fettle.config import Effort
from fettle.manifest import Task, TaskKind, VariantManifest
from fettle.points import has_scores
from optimize.recipes import (
    ONNX_REFERENCE,
    TRIMMED,
    Plan,
    Recipe,
    Round,
    Scheme,
    bfloat16_recipe,
    onnx_recipe,
    quantized_recipe,
    reference_recipe,
    small_recipe,
    student_recipe,
    trimmed_recipe,
)

# A variant that changes this many answers is worth pruning further; one that changes so many needs less pruning.
FAITHFUL, UNFAITHFUL = 0.05, 0.15
# Among quantizations of about the same quality the faster one is taken.
ABOUT_THE_SAME = 0.005


@dataclass(frozen=True, slots=True)
class Tried:
    """What is known of a variant: the share of tuning rows it answers otherwise, its cost, and if batches matter."""

    disagreement: float
    cpu_ms: float
    invariant: bool
    size_bytes: int

    @classmethod
    def of(cls, variant: VariantManifest) -> Tried:
        found = variant.measured
        assert found is not None
        tuned = found.tuned_disagreement
        return cls(
            disagreement=found.quality.disagreement if tuned is None else tuned,
            cpu_ms=found.row_cpu_ms or 0.0,
            invariant=found.batching.invariant,
            size_bytes=variant.size_bytes,
        )


@dataclass(frozen=True, slots=True)
class Facts:
    """What the search may rely on: the model's task and depth, the splits that the data have, how much is wanted."""

    task: Task
    layers: int
    shared: bool
    splits: frozenset[str]
    effort: Effort
    kv_heads: int = 0

    @property
    def trains(self) -> bool:
        return {"train", "validation"} <= self.splits

    @property
    def has_scores(self) -> bool:
        """Whether answers have a confidence to exit by."""
        return has_scores(self.task)


@dataclass
class State:
    """`closed`: recipes that are not to be tried any more, whether they failed or were not wanted."""

    facts: Facts
    tried: dict[str, Tried] = field(default_factory=dict)
    closed: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def next(self) -> Recipe | None:
        self.notes.clear()
        for recipe in agenda(self):
            if recipe.id not in self.tried and recipe.id not in self.closed:
                return recipe
        return None


def agenda(state: State) -> Iterator[Recipe]:
    """All recipes in the order of trying; parents before children, cheap ones before dear ones."""
    if state.facts.task.kind is TaskKind.GENERATE:
        # A circle otherwise.
        from optimize.text_recipes import text_agenda

        yield from text_agenda(state)
        return
    yield reference_recipe()
    yield onnx_recipe()
    yield bfloat16_recipe()
    if state.facts.task.kind is TaskKind.CLASSIFY:
        yield trimmed_recipe()
    base = TRIMMED if TRIMMED in state.tried else ONNX_REFERENCE
    schemes = [Scheme.DYNAMIC, Scheme.ROWS, Scheme.STATIC]
    if state.facts.effort is Effort.THOROUGH:
        schemes += [Scheme.WEIGHTS8, Scheme.WEIGHTS4]
    quantized = {scheme: quantized_recipe(scheme, base) for scheme in schemes}
    yield from quantized.values()
    scheme = best_scheme({scheme: recipe.id for scheme, recipe in quantized.items()}, state)
    if state.facts.effort is not Effort.QUICK:
        yield small_recipe(scheme)
    if state.facts.trains:
        yield from students(scheme, state)


def students(scheme: Scheme, state: State) -> Iterator[Recipe]:
    """Variants whose weights are trained: exits first, since they are cheap, then what takes minutes each."""
    facts = state.facts
    if facts.has_scores and facts.layers > 1:
        yield student_recipe(Plan("exits-frozen", exits=inner(facts.layers), frozen=True), scheme)
    if facts.effort is Effort.QUICK:
        return
    thorough = facts.effort is Effort.THOROUGH
    if thorough and facts.has_scores and facts.layers > 1:
        change = Round("none", epochs=4.0, learning_rate=1e-4)
        yield student_recipe(Plan("exits-distilled", (change,), exits=inner(facts.layers)), scheme)
    yield from shallower(scheme, state, epochs=2.0 if thorough else 1.0)
    yield from narrower(scheme, state, epochs=1.0 if thorough else 0.4)
    if not facts.shared and facts.layers > 1:
        yield student_recipe(Plan("shared-layers", (Round("share", epochs=2.0 if thorough else 0.7),)), scheme)
    if thorough:
        yield student_recipe(
            Plan("factorized", (Round("factorize", {"rank": 128}, epochs=0.5), Round("width", {"share": 0.75}))), scheme
        )


def shallower(scheme: Scheme, state: State, epochs: float) -> Iterator[Recipe]:
    """Layers dropped by influence, and DistilBERT's every other layer."""
    layers = state.facts.layers
    if layers < 2:
        return
    dropped = max(1, layers // 3)
    first = student_recipe(
        Plan(f"pruned-layers-{layers - dropped}", (Round("drop-layers", {"count": dropped}, epochs / 2),)), scheme
    )
    yield first
    half = max(1, layers // 2)
    found = state.tried.get(first.id)
    if found is not None and half > 1 and found.disagreement > UNFAITHFUL:
        state.notes.append(
            f"{first.id} still changes {found.disagreement:.1%} of the answers, so the distilled student "
            "gets twice the training"
        )
        epochs *= 2
    change = Round("alternate-layers", {"count": half}, 4 * epochs)
    yield student_recipe(Plan(f"distilled-{half}", (change,)), scheme)
    if state.facts.effort is Effort.THOROUGH:
        inside = replace(change, hidden_weight=1.0, relation_weight=1.0)
        yield student_recipe(Plan(f"distilled-{half}-states", (inside,)), scheme)
    if state.facts.has_scores and half > 1:
        plan = Plan(f"distilled-{half}-exits", (change, Round("none", epochs=1.5 * epochs)), exits=inner(half))
        yield student_recipe(plan, scheme)


def narrower(scheme: Scheme, state: State, epochs: float) -> Iterator[Recipe]:
    """Heads and neurons removed in two rounds, with distillation after each; then more or fewer of them."""
    first = student_recipe(pruned_widths(0.6, epochs), scheme)
    yield first
    found = state.tried.get(first.id)
    if found is None or state.facts.effort is not Effort.THOROUGH:
        return
    if found.disagreement < FAITHFUL:
        share, word = 0.4, "only"
    elif found.disagreement > UNFAITHFUL:
        share, word = 0.8, "as much as"
    else:
        return
    state.notes.append(f"{first.id} changes {found.disagreement:.1%} of the answers: {word} {share:.0%} is kept next")
    yield student_recipe(pruned_widths(share, epochs), scheme)


def pruned_widths(share: float, epochs: float) -> Plan:
    """Half of the way, distillation, and the rest of it."""
    halfway = share**0.5
    rounds = tuple(Round("prune", {"keep_share": round(kept, 3)}, epochs) for kept in (halfway, share / halfway))
    return Plan(f"pruned-widths-{share * 100:.0f}", rounds)


def inner(layers: int) -> tuple[int, ...]:
    """Every layer but the last, 1-based; of deep models every second, since each exit costs a head and a cut."""
    step = 1 if layers <= 8 else 2
    return tuple(range(step, layers, step))


def best_scheme(ids: Mapping[Scheme, str], state: State) -> Scheme:
    """The quantization of students: of those as faithful as the best, batch-invariant ones first, the fastest."""
    found = {scheme: state.tried[name] for scheme, name in ids.items() if name in state.tried}
    if not found:
        return Scheme.ROWS
    lowest = min(result.disagreement for result in found.values())
    good = [scheme for scheme, result in found.items() if result.disagreement <= lowest + ABOUT_THE_SAME]
    chosen = min(good, key=lambda scheme: (not found[scheme].invariant, found[scheme].cpu_ms))
    state.notes.append(
        f"students are quantized as {ids[chosen]} is: it changes {found[chosen].disagreement:.1%} of the answers, "
        f"costs {found[chosen].cpu_ms:.2f} ms a row, and its answers "
        f"{'do not depend' if found[chosen].invariant else 'depend'} on the batch"
    )
    return chosen


def outlook(state: State) -> list[Recipe]:
    """What is still to be tried if each recipe turns out as good as the average; for the estimate of the time left."""
    imagined = State(state.facts, dict(state.tried), set(state.closed))
    ahead = []
    while (recipe := imagined.next()) is not None:
        ahead.append(recipe)
        imagined.tried[recipe.id] = Tried(0.1, 1.0, True, 1)
    return ahead


def dominated(tried: Mapping[str, Tried], keep: Sequence[str]) -> dict[str, str]:
    """Variants that another one equals or beats in every respect, each with that other; never those in `keep`."""
    better = {
        name: [other for other, theirs in tried.items() if _beats(theirs, result)]
        for name, result in tried.items()
        if name not in keep
    }
    worse = {name for name, others in better.items() if others}
    # Whatever beats it, one that is not beaten itself does too.
    return {
        name: min((other for other in others if other not in worse), key=lambda other: tried[other].cpu_ms)
        for name, others in better.items()
        if others
    }


def _beats(one: Tried, other: Tried) -> bool:
    pairs = [
        (one.disagreement, other.disagreement),
        (one.cpu_ms, other.cpu_ms),
        (one.size_bytes, other.size_bytes),
        (not one.invariant, not other.invariant),
    ]
    return all(left <= right for left, right in pairs) and any(left < right for left, right in pairs)
