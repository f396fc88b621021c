"""What is served is what was certified: each answer of the router is that of `fettle.load(...).predict`, to the bit."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fettle
from deployments.router import Inferred, Router, Wishes
from deployments.served import ServedFamily
from deployments.tickets import Terms, Ticket
from fettle.answers import probabilities
from fettle.errors import DeadlineError, EngineError, OverloadedError
from fettle.family import Family
from fettle.gears import Gear
from fettle.local import Bound, LocalFamily, Prediction
from fettle.manifest import Gate, Head, Step, Task, TaskKind
from fettle.points import NEVER as NO_EXIT
from fettle.scheduling import Entry, Queue
from tests.fakes import WORDS, FakeVariant, make_fake_family, make_point, make_step, token_id
from tests.inprocess import make_router, slots_of

pytestmark = pytest.mark.anyio

PLAIN_WORDS = [word for word in WORDS if word not in ("crash", "poison")]
LEVELS = [0.005, 0.01, 0.02, 0.05]
THRESHOLDS = [0.0, 0.02, 0.1, 0.3, 0.6, 1.0, NO_EXIT]
REQUESTS = 60
FAMILIES = 24


def random_family(chance: random.Random, directory: Path) -> Family:
    """Variants that read more or less of a text, some of them in stages, and points that lead through any of them."""
    width = chance.randint(2, 5)
    head = chance.choice([Head.SINGLE_LABEL, Head.SINGLE_LABEL, Head.MULTI_LABEL])
    task = Task(kind=TaskKind.CLASSIFY, head=head, labels=[f"label{n}" for n in range(width)], width=width)
    variants = [FakeVariant("reference")]
    for number in range(chance.randint(1, 3)):
        stages = chance.randint(1, 4)
        variants.append(
            FakeVariant(f"v{number}", stages=stages, tokens_read=chance.randint(2, 8) if stages == 1 else None)
        )
    points = []
    for place, alpha in enumerate(chance.sample(LEVELS, chance.randint(1, 4))):
        chosen = chance.sample(variants, chance.randint(1, len(variants)))
        steps = [random_step(chance, variant) for variant in chosen]
        points.append(make_point(f"p{place}", alpha, *steps, cost=chance.choice([1.0, 2.0, 0.1 / alpha])))
    return make_fake_family(directory, task=task, variants=variants, points=points)


def random_step(chance: random.Random, variant: FakeVariant) -> Step:
    gates = [
        Gate(threshold=chance.choice(THRESHOLDS), temperature=chance.choice([0.4, 1.0, 2.5]))
        for _ in range(variant.stages)
    ]
    return Step(variant=variant.id, gates=gates)


def random_text(chance: random.Random) -> Any:
    def text() -> str:
        return " ".join(chance.choices(PLAIN_WORDS, k=chance.randint(1, 40)))

    return (text(), text()) if chance.random() < 0.15 else text()


def set_gears(family: ServedFamily, chance: random.Random) -> None:
    """As if there were load: any gear for any class."""
    for level in family.menu.levels:
        for degraded in (False, True):
            count = len(family.menu.gears(level, degraded=degraded))
            family.gearbox._gears[level, degraded] = Gear(number=chance.randrange(count))
    # The gears of those that ask for `exact` and allow degraded answers.
    family.gearbox._gears[0.0, True] = Gear(number=chance.randrange(len(family.menu.gears(0.0, degraded=True))))


def assert_same(inferred: Inferred, wanted: list[Prediction], task: Task) -> None:
    """Row by row: values, variant, stage, score, and what is promised."""
    walked, way = inferred.walked, inferred.way
    shown = probabilities(walked.values, task)
    for row, prediction in enumerate(wanted):
        assert prediction.scores is not None
        assert shown[row].tolist() == list(prediction.scores.values())
        assert walked.places[row] == (prediction.variant, prediction.stage)
        last = walked.visits[row][-1]
        assert last.taken
        assert not any(visit.taken for visit in walked.visits[row][:-1])
        assert last.score == prediction.score or (np.isnan(last.score) and prediction.score is None)
        bound = prediction.bound
        assert (bound.upper_bound if isinstance(bound, Bound) else bound) == way.bound


def predicted(local: LocalFamily, inferred: Inferred, texts: list[Any]) -> list[Prediction]:
    way = inferred.way
    if way.point is None:
        return local.predict(texts, variant=way.name)
    predictions = local.predict(texts, way.alpha)
    assert {prediction.point for prediction in predictions} == {way.name}
    return predictions


async def ask(router: Router, model: str, texts: list[Any], wishes: Wishes) -> Inferred:
    asked = router.ask(model, TaskKind.CLASSIFY, wishes)
    return await router.infer(asked, await router.tokenize(asked.family, texts))


@pytest.mark.parametrize("seed", range(FAMILIES))
async def test_every_answer_is_that_of_predict_for_the_same_point(seed, tmp_path):
    """Requests of all classes, pinned variants and several rows at once, in mixed batches."""
    chance = random.Random(seed)
    family = random_family(chance, tmp_path / "family")
    router = make_router([family])
    served = router.families["fake"]
    tolerances = [None, "exact", 0.0, 0.001, 1.0, *served.menu.levels]
    todo = []
    for _ in range(REQUESTS):
        texts = [random_text(chance) for _ in range(chance.choice([1, 1, 1, 2, 3, 7]))]
        if chance.random() < 0.2:
            todo.append((f"fake:{chance.choice(list(family.variants))}", texts, Wishes()))
        else:
            degraded = chance.random() < 0.2
            todo.append(
                ("fake", texts, Wishes(chance.choice(tolerances), degraded, chance.choice(["interactive", "batch"])))
            )
    set_gears(served, chance)

    found = await asyncio.gather(*(ask(router, *each) for each in todo))

    with fettle.load(family.directory) as local:
        for (model, texts, wishes), inferred in zip(todo, found, strict=True):
            assert_same(inferred, predicted(local, inferred, texts), family.manifest.task)
            assert_in_class(served, model, wishes, inferred)
    together = [size for name in family.variants for size in slots_of(router, "fake", name).batches]
    assert max(together) > 1, "no batch was shared"
    for batcher in served.batchers.values():
        assert (batcher.depth, batcher.backlog_s) == (0, pytest.approx(0, abs=1e-9))


def assert_in_class(served: ServedFamily, model: str, wishes: Wishes, inferred: Inferred) -> None:
    """No request leaves its class unless it said that it may, and then the reply says that it did."""
    way = inferred.way
    if ":" in model:
        assert way == served.menu.pinned(model.partition(":")[2])
        assert inferred.degraded is False
        return
    wanted = {None: served.default.tolerance, "exact": 0.0}.get(wishes.max_disagreement, wishes.max_disagreement)
    assert isinstance(wanted, float)
    if way.alpha > wanted:
        assert wishes.allow_degraded
    assert inferred.degraded == (way.alpha > wanted)


async def test_the_gear_decides_among_the_points_of_the_class(tmp_path):
    points = [make_point(f"p{n}", alpha, make_step("cheap"), cost=-n + 9.0) for n, alpha in enumerate(LEVELS)]
    variants = [FakeVariant("reference"), FakeVariant("cheap", tokens_read=3)]
    router = make_router([make_fake_family(tmp_path / "family", variants=variants, points=points)])
    gearbox = router.families["fake"].gearbox
    for number in range(3):
        gearbox._gears[0.02, False] = Gear(number=number)
        inferred = await ask(router, "fake", ["the fox"], Wishes(0.03))
        assert (inferred.way.name, inferred.gear) == (f"p{number}", number)
        # Other classes have gears of their own.
        assert (await ask(router, "fake", ["the fox"], Wishes(0.05))).way.name == "p0"
        assert (await ask(router, "fake", ["the fox"], Wishes("exact"))).way.name == "reference"


# Age, deadlines and failures on the way.

CASCADE = make_point(
    "cascade", 0.01, make_step("first", NO_EXIT, NO_EXIT, 1.0), make_step("second", 1.0), make_step("last")
)
CHAIN = [FakeVariant("last"), FakeVariant("first", stages=3), FakeVariant("second", tokens_read=4)]


@pytest.fixture
def cascade(tmp_path: Path) -> Router:
    """Every row goes all the way: no score of random words reaches 1."""
    return make_router([make_fake_family(tmp_path / "family", variants=CHAIN, points=[CASCADE])])


@contextmanager
def noting(patch: pytest.MonkeyPatch) -> Iterator[list[Ticket]]:
    """Every row that enters a queue, in order."""
    pushed: list[Ticket] = []
    real = Queue.push

    def push(queue: Queue, entry: Any) -> None:
        pushed.append(entry)
        real(queue, entry)

    with patch.context() as inside:
        inside.setattr(Queue, "push", push)
        yield pushed


async def test_rows_that_go_on_keep_their_age_and_their_deadline(cascade, monkeypatch):
    with noting(monkeypatch) as pushed:
        before = time.monotonic()
        inferred = await ask(cascade, "fake", ["the fox", "word3 word9 word1"], Wishes(0.01, timeout_s=30.0))
    assert inferred.walked.variants == ["last"]
    assert [len(visits) for visits in inferred.walked.visits] == [3, 3]
    first, second, third = pushed[:2], pushed[2:4], pushed[4:]
    arrived = {ticket.arrived for ticket in pushed}
    assert len(arrived) == 1
    assert before <= arrived.pop() <= first[0].entered < second[0].entered < third[0].entered
    deadline = third[0].deadline
    assert deadline == pytest.approx(before + 30.0, abs=5.0)
    # The nearer to the end, the less is kept free for what comes after; here nothing is, as all queues are empty.
    assert {ticket.deadline for ticket in pushed} == {deadline}
    assert all(ticket.due <= min(ticket.deadline, ticket.arrived + 1.0) for ticket in pushed)


async def test_a_step_leaves_time_for_those_after_it(cascade, monkeypatch):
    last = cascade.families["fake"].batchers["last"]
    last.call_s = 4.0
    reach = [stretch.reach for stretch in cascade.families["fake"].menu.gears(0.01)[0].stretches]
    with noting(monkeypatch) as pushed:
        await ask(cascade, "fake", ["the fox"], Wishes(0.01, timeout_s=100.0))
    first, second, third = (ticket.deadline for ticket in pushed)
    assert third - first == pytest.approx(4.0 * reach[2])
    assert third - second == pytest.approx(4.0 * reach[2] / reach[1])


async def test_the_time_in_each_queue_counts_from_the_entry_into_that_queue(cascade):
    slots = slots_of(cascade, "fake", "first")
    slots.gate.clear()
    asking = asyncio.ensure_future(ask(cascade, "fake", ["the fox"], Wishes(0.01)))
    await asyncio.sleep(0.05)
    slots.gate.set()
    visits = (await asking).walked.visits[0]
    assert all(visit.answered.queue_ms < 40 for visit in visits)


async def test_a_deadline_that_passes_on_the_way_is_a_504_and_the_later_steps_cost_nothing(cascade):
    slots = slots_of(cascade, "fake", "first")
    slots.gate.clear()
    asking = asyncio.ensure_future(ask(cascade, "fake", ["the fox"], Wishes(0.01, timeout_s=0.04)))
    with pytest.raises(DeadlineError):
        await asking
    slots.gate.set()
    await asyncio.sleep(0.005)
    assert slots_of(cascade, "fake", "second").batches == slots_of(cascade, "fake", "last").batches == []
    assert_idle(cascade)


async def test_a_client_that_leaves_on_the_way_leaves_nothing_behind(cascade):
    slots = slots_of(cascade, "fake", "second")
    slots.gate.clear()
    asking = [asyncio.ensure_future(ask(cascade, "fake", ["the fox"] * 3, Wishes(0.01))) for _ in range(20)]
    async with asyncio.timeout(10):
        while not slots.batches:
            await asyncio.sleep(0)
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
    slots.gate.set()
    assert (await ask(cascade, "fake", ["the fox"], Wishes(0.01))).walked.variants == ["last"]
    assert_idle(cascade)


async def test_a_row_that_a_later_step_cannot_do_fails_its_own_request_alone(tmp_path):
    variants = [replace(CHAIN[0], fail_on_token=token_id("poison")), *CHAIN[1:]]
    router = make_router([make_fake_family(tmp_path / "family", variants=variants, points=[CASCADE])])
    asked = [ask(router, "fake", ["the fox", text], Wishes(0.01)) for text in ["word1", "the poison", "word2"]]
    good, bad, other = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(bad, EngineError)
    assert isinstance(good, Inferred)
    assert isinstance(other, Inferred)
    assert_idle(router)


async def test_later_steps_take_in_what_was_admitted_before_without_asking(cascade, monkeypatch):
    asked = []

    def once(queue: Queue, entries: Sequence[Entry], *about: object) -> bool:
        asked.extend([queue] if any(isinstance(entry, Ticket) for entry in entries) else [])
        return len(asked) <= 1

    monkeypatch.setattr(Queue, "can_promise", once)
    inferred = await ask(cascade, "fake", ["the fox"], Wishes(0.01, timeout_s=30.0))
    assert inferred.walked.variants == ["last"]
    assert asked == [cascade.families["fake"].batchers["first"].queue]


def assert_idle(router: Router) -> None:
    for batcher in router.families["fake"].batchers.values():
        assert batcher.depth == 0
        assert batcher.queue.work_ms() == pytest.approx(0, abs=1e-9)


async def test_cheaper_points_of_the_class_answer_where_the_first_has_no_room(tmp_path):
    points = [
        make_point("careful", 0.01, make_step("first", 0.5, 0.5, 1.0), make_step("last"), cost=5.0),
        make_point("cheap", 0.02, make_step("second"), cost=1.0),
    ]
    router = make_router([make_fake_family(tmp_path / "family", variants=CHAIN, points=points)])
    slots = slots_of(router, "fake", "first")
    slots.gate.clear()
    # A second of work for a queue of one second.
    flood = asyncio.ensure_future(ask(router, "fake:first", ["the fox"] * 1001, Wishes()))
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        while router.families["fake"].batchers["first"].has_room(Terms(0.0)):
            await asyncio.sleep(0)
    inferred = await ask(router, "fake", ["the fox"], Wishes(0.02))
    assert (inferred.way.name, inferred.gear, inferred.degraded) == ("cheap", 1, False)
    # `careful` needs the full one too; who allows it is answered outside of the class, and told so.
    with pytest.raises(OverloadedError):
        await ask(router, "fake", ["the fox"], Wishes(0.01))
    inferred = await ask(router, "fake", ["the fox"], Wishes(0.01, allow_degraded=True))
    assert (inferred.way.name, inferred.gear, inferred.degraded) == ("cheap", 1, True)
    assert (await ask(router, "fake", ["the fox"], Wishes("exact"))).way.name == "last"
    flood.cancel()
    slots.gate.set()
