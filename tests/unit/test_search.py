"""Which recipe is next: synthetic measurements in, decisions out. No files, no models."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from fettle.config import Effort
from fettle.errors import UsageError
from fettle.manifest import Head, Task, TaskKind
from optimize import recipes, search
from optimize.recipes import ONNX_REFERENCE, REFERENCE, TRIMMED, Recipe, Scheme
from optimize.search import Facts, State, Tried
from tests.fake_optimize import config_for, fake_recipe, install, run
from tests.fakes import classify_task, embed_task

ALL_SPLITS = frozenset({"train", "validation", "calibration", "test"})
QUANTIZED = {
    Scheme.DYNAMIC: "onnx-int8-dynamic",
    Scheme.ROWS: "onnx-int8",
    Scheme.STATIC: "onnx-int8-static",
    Scheme.WEIGHTS8: "onnx-weights-int8",
    Scheme.WEIGHTS4: "onnx-weights-int4",
}
FIRST = [REFERENCE, ONNX_REFERENCE, "torch-bf16", TRIMMED]
INT8 = ["onnx-int8-dynamic", "onnx-int8", "onnx-int8-static"]
# Where all schemes turn out alike, the first is taken for what follows.
SMALL = "onnx-int8-dynamic-small"
DEEP = [
    "pruned-layers-4-int8",
    "distilled-3-int8",
    "distilled-3-exits-int8",
    "pruned-widths-60-int8",
    "shared-layers-int8",
]
THOROUGH = [*DEEP[:2], "distilled-3-states-int8", *DEEP[2:]]


def facts(effort: Effort = Effort.QUICK, *, task: Task | None = None, layers: int = 6, **changes: object) -> Facts:
    values = {"shared": False, "splits": ALL_SPLITS, **changes}
    return Facts(task=task or classify_task(), layers=layers, effort=effort, **values)  # type: ignore[arg-type]


def tried(disagreement: float = 0.1, cpu_ms: float = 1.0, *, invariant: bool = True, size: int = 100) -> Tried:
    return Tried(disagreement, cpu_ms, invariant, size)


def walk(state: State, **found: Tried) -> list[Recipe]:
    """Try all that the search asks for. `found`, with _ for -, is what comes of some; a middling figure of the rest."""
    results = {name.replace("_", "-"): result for name, result in found.items()}
    seen = []
    while (recipe := state.next()) is not None:
        assert recipe.id not in {other.id for other in seen}
        seen.append(recipe)
        state.tried[recipe.id] = results.get(recipe.id, tried())
    return seen


def ids(chosen: list[Recipe]) -> list[str]:
    return [recipe.id for recipe in chosen]


# The agenda.


def test_quick_trains_exit_heads_only() -> None:
    assert ids(walk(State(facts()))) == [*FIRST, *INT8, "exits-frozen-int8"]


def test_standard_tries_a_student_of_every_kind() -> None:
    found = ids(walk(State(facts(Effort.STANDARD))))
    assert found == [*FIRST, *INT8, SMALL, "exits-frozen-int8", *DEEP]


def test_thorough_adds_weight_only_quantization_and_narrower_models() -> None:
    found = ids(walk(State(facts(Effort.THOROUGH))))
    weights = ["onnx-weights-int8", "onnx-weights-int4"]
    exits = ["exits-frozen-int8", "exits-distilled-int8"]
    assert found == [*FIRST, *INT8, *weights, SMALL, *exits, *THOROUGH, "factorized-int8"]


@pytest.mark.parametrize("effort", list(Effort))
@pytest.mark.parametrize("layers", [1, 2, 3, 12, 24])
def test_parents_come_before_their_children(effort: Effort, layers: int) -> None:
    seen: set[str | None] = {None}
    for recipe in walk(State(facts(effort, layers=layers))):
        assert recipe.parent in seen
        seen.add(recipe.id)


@pytest.mark.parametrize("splits", [{"test"}, {"train", "test"}, {"validation", "calibration", "test"}])
def test_nothing_is_trained_without_rows_to_train_and_tune_on(splits: set[str]) -> None:
    found = walk(State(facts(Effort.THOROUGH, splits=frozenset(splits))))
    assert not [recipe.id for recipe in found if recipe.plan is not None]
    assert ids(found)[-2:] == ["onnx-weights-int4", SMALL]


def test_what_is_trained_needs_both_splits() -> None:
    for recipe in walk(State(facts(Effort.THOROUGH))):
        assert recipe.needs == (("train", "validation") if recipe.plan else ())


@pytest.mark.parametrize(
    "task",
    [
        embed_task(),
        Task(kind=TaskKind.CLASSIFY, head=Head.REGRESSION, labels=["score"], width=1),
        Task(kind=TaskKind.CLASSIFY, head=Head.SINGLE_LABEL, labels=["only"], width=1),
    ],
    ids=["vectors", "numbers", "one logit"],
)
def test_answers_without_a_score_have_no_exits(task: Task) -> None:
    found = walk(State(facts(Effort.STANDARD, task=task)))
    assert not [recipe.id for recipe in found if recipe.plan and recipe.plan.exits]
    assert [name for name in ids(found) if name in DEEP] == [name for name in DEEP if "exits" not in name]


def test_many_labels_at_once_have_exits() -> None:
    task = classify_task().model_copy(update={"head": Head.MULTI_LABEL})
    assert "exits-frozen-int8" in ids(walk(State(facts(task=task))))


def test_vectors_read_every_token_so_nothing_is_trimmed() -> None:
    assert TRIMMED not in ids(walk(State(facts(task=embed_task()))))


def test_a_model_of_one_layer_has_nothing_to_leave_out() -> None:
    found = ids(walk(State(facts(Effort.STANDARD, layers=1))))
    assert found == [*FIRST, *INT8, SMALL, "pruned-widths-60-int8"]


def test_layers_that_are_shared_already_are_not_shared_again() -> None:
    assert "shared-layers-int8" not in ids(walk(State(facts(Effort.STANDARD, shared=True))))


@pytest.mark.parametrize(
    ("layers", "after"), [(2, (1,)), (6, (1, 2, 3, 4, 5)), (8, tuple(range(1, 8))), (12, (2, 4, 6, 8, 10))]
)
def test_exits_come_after_inner_layers(layers: int, after: tuple[int, ...]) -> None:
    assert search.inner(layers) == after


def test_the_widths_kept_in_two_rounds_make_up_the_share() -> None:
    plan = search.pruned_widths(0.6, 0.5)
    shares = [change.parameters["keep_share"] for change in plan.rounds]
    assert shares[0] * shares[1] == pytest.approx(0.6, abs=1e-3)
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)


# Decisions.


def scheme_of(found: list[Recipe], name: str = "exits-frozen-int8") -> str:
    (recipe,) = [recipe for recipe in found if recipe.id == name]
    (scheme,) = [step.parameters["scheme"] for step in recipe.passes if step.name == "quantize"]
    return str(scheme)


def test_students_take_the_batch_invariant_scheme_among_equally_faithful_ones() -> None:
    state = State(facts())
    found = walk(
        state,
        onnx_int8_dynamic=tried(0.010, 1.0, invariant=False),
        onnx_int8=tried(0.014, 1.5),
        onnx_int8_static=tried(0.012, 1.7),
    )
    assert scheme_of(found) == "rows"


def test_students_take_the_fastest_of_several_invariant_ones() -> None:
    found = walk(State(facts()), onnx_int8=tried(0.010, 1.5), onnx_int8_static=tried(0.014, 1.2))
    assert scheme_of(found) == "static"


def test_a_less_faithful_scheme_is_not_taken_for_its_speed_or_invariance() -> None:
    found = walk(
        State(facts()),
        onnx_int8_dynamic=tried(0.01, 2.0, invariant=False),
        onnx_int8=tried(0.03, 1.0),
        onnx_int8_static=tried(0.05, 0.5),
    )
    assert scheme_of(found) == "dynamic"


def test_the_choice_of_scheme_is_a_note() -> None:
    state = State(facts())
    state.tried = {name: tried() for name in [*FIRST, *INT8]}
    state.tried["onnx-int8"] = tried(0.004, 0.75)
    recipe = state.next()
    assert recipe is not None
    assert recipe.id == "exits-frozen-int8"
    (note,) = state.notes
    assert "onnx-int8" in note
    assert "0.4%" in note
    assert "0.75 ms" in note
    assert "do not depend" in note


def test_the_embeddings_are_quantized_on_top_of_the_chosen_scheme() -> None:
    found = walk(State(facts(Effort.STANDARD)), onnx_int8_dynamic=tried(0.2), onnx_int8_static=tried(0.2))
    (small,) = [recipe for recipe in found if recipe.id.endswith("-small")]
    assert (small.id, small.parent) == ("onnx-int8-small", "onnx-int8")


def test_without_any_quantization_there_is_a_scheme_to_try_still() -> None:
    state = State(facts(), closed=set(QUANTIZED.values()))
    assert scheme_of(walk(state)) == "rows"


def test_quantization_starts_from_the_trimmed_graph_where_there_is_one() -> None:
    with_trim = {recipe.id: recipe.parent for recipe in walk(State(facts()))}
    without = {recipe.id: recipe.parent for recipe in walk(State(facts(), closed={TRIMMED}))}
    assert {with_trim[name] for name in INT8} == {TRIMMED}
    assert {without[name] for name in INT8} == {ONNX_REFERENCE}


def test_a_poor_shallow_student_doubles_the_training_of_the_next() -> None:
    def epochs(disagreement: float) -> float:
        found = walk(State(facts(Effort.STANDARD)), pruned_layers_4_int8=tried(disagreement))
        (plan,) = [recipe.plan for recipe in found if recipe.id == "distilled-3-int8"]
        assert plan is not None
        return plan.rounds[0].epochs

    assert epochs(0.10) == 4.0
    assert epochs(0.16) == 8.0


@pytest.mark.parametrize(
    ("disagreement", "extra"),
    [(0.02, ["pruned-widths-40-int8"]), (0.10, []), (0.20, ["pruned-widths-80-int8"])],
    ids=["faithful, so prune more", "in between", "unfaithful, so prune less"],
)
def test_how_much_is_pruned_follows_from_the_first_try(disagreement: float, extra: list[str]) -> None:
    state = State(facts(Effort.THOROUGH))
    found = ids(walk(state, pruned_widths_60_int8=tried(disagreement)))
    assert [name for name in found if name.startswith("pruned-widths")] == ["pruned-widths-60-int8", *extra]
    standard = ids(walk(State(facts(Effort.STANDARD)), pruned_widths_60_int8=tried(disagreement)))
    assert [name for name in standard if name.startswith("pruned-widths")] == ["pruned-widths-60-int8"]


def test_closed_recipes_are_not_tried_again() -> None:
    state = State(facts(Effort.STANDARD), closed={"onnx-int8-static", "shared-layers-int8"})
    assert not state.closed & set(ids(walk(state)))


# Looking ahead.


@pytest.mark.parametrize("effort", list(Effort))
def test_the_outlook_is_what_would_come_and_changes_nothing(effort: Effort) -> None:
    state = State(facts(effort), {REFERENCE: tried(0.0)}, {"onnx-int8-static"})
    ahead = ids(search.outlook(state))
    assert state.tried == {REFERENCE: tried(0.0)}
    assert state.closed == {"onnx-int8-static"}
    assert ahead == ids(walk(state))
    assert search.outlook(state) == []


# What is dominated.


def test_only_what_is_beaten_in_every_respect_is_dominated() -> None:
    results = {
        "base": tried(0.02, 1.0, size=100),
        "same": tried(0.02, 1.0, size=100),
        "worse": tried(0.03, 1.1, size=101),
        "faithful": tried(0.01, 9.0, size=900),
        "fast": tried(0.90, 0.1, size=900),
        "small": tried(0.90, 9.0, size=10),
        "fickle": tried(0.02, 1.0, invariant=False, size=100),
    }
    assert search.dominated(results, []) == {"worse": "base", "fickle": "base"}


def test_what_is_kept_is_never_dominated() -> None:
    results = {"good": tried(0.0), "bad": tried(0.5)}
    assert search.dominated(results, ["bad"]) == {}
    assert search.dominated(results, ["good"]) == {"bad": "good"}


def test_invariance_alone_saves_a_variant() -> None:
    results = {"fickle": tried(0.0, 1.0, invariant=False, size=1), "steady": tried(0.1, 2.0, size=2)}
    assert search.dominated(results, []) == {}


def test_every_dominated_variant_names_one_that_stays_and_beats_it() -> None:
    dice = random.Random(0)
    for _ in range(200):
        results = {
            f"v{number}": tried(dice.choice((0.0, 0.1)), dice.choice((1.0, 2.0)), size=dice.choice((1, 2, 3)))
            for number in range(8)
        }
        keep = ["v0", "v5"]
        found = search.dominated(results, keep)
        for name, better in found.items():
            mine, theirs = results[name], results[better]
            assert better not in found
            assert theirs.disagreement <= mine.disagreement
            assert theirs.cpu_ms <= mine.cpu_ms
            assert theirs.size_bytes <= mine.size_bytes
            assert theirs != mine
        # Nothing that stays is beaten by another that stays, except what is kept on purpose.
        stays = {name: result for name, result in results.items() if name not in found}
        assert search.dominated(stays, keep) == {}


# Recipes asked for by name, through the pipeline.

PLAN = [recipes.reference_recipe(), recipes.onnx_recipe(), recipes.quantized_recipe(Scheme.DYNAMIC, ONNX_REFERENCE)]


def faked(recipe: Recipe) -> Recipe:
    return fake_recipe(recipe.id, parent=recipe.parent)


def test_a_recipe_brings_what_it_is_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, [*map(faked, PLAN), faked(recipes.bfloat16_recipe())])
    family = run(config_for(tmp_path, recipes=["onnx-int8-dynamic"]))
    made = [*family.variants, *(item.id for item in family.manifest.dropped)]
    assert made == [REFERENCE, ONNX_REFERENCE, "onnx-int8-dynamic"]
    assert family.manifest.not_built == []


def test_an_unknown_recipe_lists_those_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, list(map(faked, PLAN)))
    with pytest.raises(UsageError, match="no recipe 'int3' at effort quick; there are torch-fp32, onnx-fp32"):
        run(config_for(tmp_path, recipes=["int3"]))
    assert not (tmp_path / "family" / "family.json").exists()
    assert not (tmp_path / "family" / "variants").exists()
