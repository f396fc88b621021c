"""The report: what it says against an independent computation, that it is safe and whole, and how a browser sees it."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fettle.family import MANIFEST_FILE, Family, variant_directory
from fettle.manifest import Analysis, LabelDisagreement, Level, NotBuilt, PassRecord, SelfDisagreement, Source
from fettle.store import sha256_bytes
from optimize.report import REPORT_FILE, render, write_report
from optimize.report_facts import Lever, gather, lever_of
from optimize.report_html import fixed, percent_of, tag
from optimize.report_labels import Box, Canvas
from optimize.report_plots import Frontier, Scale, marks_of
from optimize.report_remarks import remarks
from optimize.report_words import pass_in_words, path_in_words, recipe_in_brief, result
from tests.fakes import FakeVariant, classify_task, make_fake_family
from tests.report_family import DROPPED, MADE, analysis, make_embedding_family, make_report_family

VOID = {"meta"}
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style></title><svg onload=x>", "a & b"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Elements in order with their attributes, and the text below each id; fails on a tag that is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str | None]] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_endtag(self, tag):
        name, _ = self.open.pop()
        assert name == tag

    def handle_data(self, data):
        for element, name in self.open:
            key = name or element
            self.texts[key] = self.texts.get(key, "") + data

    @property
    def parts(self) -> list[str | None]:
        return [attributes.get("id") for tag, attributes in self.elements if tag == "section"]

    def named(self, *classes: str) -> list[dict[str, str | None]]:
        return [found for _, found in self.elements if set(classes) <= set((found.get("class") or "").split())]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_report_family(tmp_path_factory.mktemp("full") / "family")


@pytest.fixture(scope="module")
def page(family: Family) -> Page:
    return Page(render(family))


# The document


def test_every_part_is_there_in_reading_order(page: Page):
    parts = "points frontier levers inside scores labels missing search data method command"
    assert page.parts == parts.split()


def test_it_needs_nothing_from_outside(family: Family):
    page = render(family)
    assert not re.findall(r'(?:src|href)="(?!#)|url\(|@import|https?:', page)


def test_the_same_family_gives_the_same_bytes(family: Family):
    assert render(family) == render(Family.open(family.directory))


def test_it_is_written_into_the_family_which_stays_intact(tmp_path: Path):
    family = make_fake_family(tmp_path / "f")
    path = write_report(family)
    assert path == family.directory / REPORT_FILE
    assert path.read_text(encoding="utf-8") == render(family)
    assert Family.open(family.directory).verify() == []


def test_a_family_with_little_to_say_leaves_parts_out(tmp_path: Path):
    page = Page(render(make_fake_family(tmp_path / "f", variants=[FakeVariant("only")])))
    assert page.parts == ["levers", "data", "method"]
    assert "Nothing is certified" in page.texts["header"]


def test_nothing_measured_is_no_error(tmp_path: Path):
    family = make_fake_family(tmp_path / "f", variants=[FakeVariant("a"), FakeVariant("b")])
    for name, variant in family.variants.items():
        family.variants[name] = variant.model_copy(update={"measured": None})
    assert Page(render(family)).parts == ["levers", "data", "method"]


def test_text_of_users_stays_text(tmp_path: Path):
    family = make_report_family(
        tmp_path / "f",
        classify_task(HOSTILE),
        source=Source(name=HOSTILE[0], architecture=HOSTILE[1], sha256=sha256_bytes(b"m")),
        not_built=[NotBuilt(id="x", reason=HOSTILE[2])],
        analysis=analysis(HOSTILE).model_copy(update={"notes": HOSTILE}),
        levels=[Level(alpha=0.01, reason=HOSTILE[0])],
        command=HOSTILE[2],
    )
    page = Page(render(family))
    names = [name for name, _ in page.elements]
    assert (names.count("script"), names.count("style"), names.count("img")) == (1, 1, 0)
    assert not [found for _, found in page.elements if any(key.startswith("on") for key in found)]
    for text in HOSTILE:
        assert text in page.texts["labels"]
        assert text in page.texts["search"]


def test_tags_escape_children_and_attributes_but_not_markup():
    inner = tag("b", "<&>")
    assert tag("p", inner, 'x"', title='a"b<') == '<p title="a&quot;b&lt;"><b>&lt;&amp;&gt;</b>x&quot;</p>'


# What it says


def test_the_result_in_one_sentence(family: Family, page: Page):
    said = result(gather(family)).replace("\u00a0", " ")
    share, factor = 2.97 / 12.9, 12.9 / 2.97
    assert said == (
        f"Answers within 1 % of the original cost {100 * share:.0f} % of its processor time ({factor:.1f}× less), "
        "certified with 95 % confidence."
    )
    assert "38 of 5,011" in page.texts["header"]


def test_without_a_certificate_the_head_says_why(tmp_path: Path):
    reason = "4 calibration rows are too few"
    levels = [Level(alpha=alpha, reason=reason, rows_needed=needed) for alpha, needed in ((0.005, 598), (0.01, 299))]
    family = make_report_family(tmp_path / "f", points=[], levels=levels)
    head = Page(render(family)).texts["header"].replace("\u00a0", " ")
    assert "Nothing is certified" in head
    assert f"At 0.5 %: {reason}; at least 598 calibration rows are needed." in head
    assert f"At 1 %: {reason}; at least 299 calibration rows are needed." in head


def test_levels_refused_for_one_reason_share_a_sentence(tmp_path: Path):
    levels = [Level(alpha=alpha, reason="the data have no calibration split") for alpha in (0.01, 0.02)]
    head = Page(render(make_report_family(tmp_path / "f", points=[], levels=levels))).texts["header"]
    assert "At 1 %, 2 %: the data have no calibration split." in head.replace("\u00a0", " ")


def test_nothing_saved_is_said_so(tmp_path: Path, family: Family):
    point = family.manifest.points[0]
    assert point.test is not None
    dear = point.model_copy(update={"test": point.test.model_copy(update={"cpu_ms_per_row": 12.8})})
    said = result(gather(make_report_family(tmp_path / "f", points=[dear])))
    assert "nothing is saved" in said


def test_operating_points_and_their_tests(page: Page):
    text = page.texts["points"].replace("\u00a0", " ")
    assert "minilm-exits-int8 stage 1 answers 61 %, stage 2 answers 20 %, stage 3 answers 16 %" in text
    assert "then onnx-fp32 answers 2.5 %" in text
    assert "At 0.5 %: no operating point passed the test" in text
    assert text.count("✗ no") == 4
    assert text.count("✓ yes") == 9


def test_a_path_without_test_rows_is_told_by_its_thresholds(family: Family):
    point = family.manifest.points[0].model_copy(update={"test": None})
    said = path_in_words(point)
    assert said == (
        "minilm-exits-int8 stage 1 from a score of 0.72, stage 2 from a score of 0.63, stage 3 from a score of 0.18; "
        "then onnx-fp32 answers the rest"
    )


def test_figures_of_a_variant(page: Page):
    row = re.search(r"onnx-int8-dynamicfrom onnx-fp32: .*?(?=onnx-int8-static)", page.texts["levers"])
    assert row is not None
    # 23.1 of 90.9 MB; 5.3 of 12.9 ms.
    assert "23.1255.302.4×2.4×97.96no, 2.410.80351273.0" in row.group()


def test_dropped_variants_are_shown_with_the_reason(family: Family, page: Page):
    assert all(page.texts["missing"].count(reason) == 1 for reason in DROPPED.values())
    assert all(f"Dropped: {reason}" in page.texts["levers"] for reason in DROPPED.values())
    # Each is in the wide and in the narrow drawing.
    assert len(page.named("mark", "faint")) == 2 * len(DROPPED)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("{}")], ids=["gone", "changed"])
def test_a_dropped_variant_without_its_manifest_is_still_named(tmp_path: Path, spoil):
    family = make_report_family(tmp_path / "f")
    spoil(variant_directory(family.directory, "albert-shared") / MANIFEST_FILE)
    page = Page(render(family))
    assert DROPPED["albert-shared"] in page.texts["missing"]
    assert "albert-shared" not in page.texts["levers"]


def test_hundreds_of_labels_are_folded_away_but_the_worst(tmp_path: Path):
    rows = [
        LabelDisagreement(label=f"label-{n:03}", rows=50, changed={"within-1-percent": n / 1000}) for n in range(300)
    ]
    family = make_report_family(tmp_path / "f", analysis=Analysis(labels=rows))
    text = Page(render(family)).texts["labels"]
    first, rest = text.split("The other 270 labels")
    assert first.index("label-299") < first.index("label-298") < first.index("label-270")
    assert "label-269" in rest
    assert "label-269" not in first


def test_embeddings_get_vectors_and_no_labels(tmp_path: Path):
    page = Page(render(make_embedding_family(tmp_path / "f")))
    assert "vectors" in page.parts
    assert "labels" not in page.parts
    int8 = next(made for made in MADE if made.id == "onnx-int8-dynamic")
    row = f"{int8.id}{1 - int8.disagreement / 5:.4f}{100 * int8.disagreement:.2f}{100 - 300 * int8.disagreement:.1f}"
    assert row in page.texts["vectors"]


@pytest.mark.parametrize(
    ("lever", "says"),
    [
        (Lever.RESHAPED, "albert-shared has 61 % of onnx-fp32’s size and takes 98 % of its time: sharing saves memory"),
        (Lever.PRUNED, "sparse-2of4 is as large as onnx-fp32 and takes 99 % of its time: weights were set to zero"),
        (
            Lever.PRUNED,
            "pruned-layers-4 is physically smaller: 84 % of onnx-fp32’s size, and it takes 68 %",
        ),
        (Lever.QUANTIZED, "share the batch: torch-bf16 (0.31 %), onnx-int8-dynamic (2.4 %)"),
        (Lever.QUANTIZED, "The original has 0.804; onnx-int8-dynamic 0.803, 2 % differ"),
    ],
)
def test_remarks_follow_from_the_figures(family: Family, lever: Lever, says: str):
    assert says in " ".join(remarks(gather(family), lever)).replace("\u00a0", " ")


def test_a_pruned_int8_variant_is_not_given_the_credit_for_int8(tmp_path: Path, family: Family):
    """Its size is compared with the original's in int8."""
    int8 = family.variants["onnx-int8-static"]
    family = make_report_family(tmp_path / "f")
    pruned = family.variants["pruned-layers-4"]
    changes = {
        "precision": int8.precision,
        "parent": "torch-fp32",
        "recipe": [*pruned.recipe, *int8.recipe],
        "files": [pruned.files[0].model_copy(update={"bytes": 20_000_000})],
        "measured": int8.measured,
    }
    family.variants["pruned-layers-4"] = pruned.model_copy(update=changes)
    said = " ".join(remarks(gather(family), Lever.PRUNED)).replace("\u00a0", " ")
    # 20.0 of 23.4 MB.
    assert "pruned-layers-4 is physically smaller: 85 % of onnx-int8-static’s size, and it takes 100 %" in said


@pytest.mark.parametrize(
    ("names", "lever"),
    [
        (["export", "fuse"], Lever.HARDWARE),
        (["first-token"], Lever.HARDWARE),
        (["drop-layers", "distill", "export", "quantize"], Lever.PRUNED),
        (["prune", "distill", "export", "quantize"], Lever.PRUNED),
        (["share", "distill", "export", "quantize"], Lever.RESHAPED),
        (["alternate-layers", "distill", "quantize"], Lever.DISTILLED),
        (["distill", "exits", "quantize"], Lever.EXITS),
        (["export", "quantize"], Lever.QUANTIZED),
    ],
)
def test_the_lever_is_read_from_the_passes(family: Family, names: list[str], lever: Lever):
    recipe = [PassRecord(name=name, seconds=1) for name in names]
    variant = family.variants["onnx-fp32"].model_copy(update={"recipe": recipe})
    assert lever_of(variant, "torch-fp32") is lever


def test_a_pass_in_words():
    record = PassRecord(
        name="quantize",
        parameters={"scheme": "static", "per_channel": True, "symmetric": False, "share": 0.25, "left": ["a", "b"]},
        seconds=1,
    )
    assert pass_in_words(record) == "quantized (scheme static, per channel, not symmetric, share 0.25, left a, b)"


def test_a_recipe_in_brief_names_each_kind_of_pass_once_and_the_folded_list_all_of_them(tmp_path: Path):
    family = make_report_family(tmp_path / "f")
    passes = [PassRecord(name=name, seconds=2, notes={"steps": 7}) for name in ("prune", "distill") * 2]
    family.variants["pruned-layers-4"] = family.variants["pruned-layers-4"].model_copy(update={"recipe": passes})
    assert recipe_in_brief(gather(family).tried["pruned-layers-4"]) == "pruned; distilled"
    assert render(family).count("distilled, 2.0 s. Found: steps 7") == 2


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (0.005, "0.5 %"), (0.0204, "2 %"), (0.23, "23 %"), (1.0, "100 %"), (None, "–")]
)
def test_shares_in_prose(share: float | None, text: str):
    assert percent_of(share).replace("\u00a0", " ") == text


def test_figures_that_are_none_or_not_finite_are_dashes():
    assert fixed(None) == fixed(float("nan")) == "–"


def test_the_reference_that_contradicts_itself_limits_the_promise(tmp_path: Path):
    itself = SelfDisagreement(rows=1000, changed=0.012, max_difference=0.3)
    text = Page(render(make_report_family(tmp_path / "f", self_disagreement=itself))).texts["data"]
    assert "1.2 % of 1,000 rows change their answer" in text.replace("\u00a0", " ")
    assert "No level below that can be promised" in text


def test_engine_time_stands_in_where_processor_time_is_missing(tmp_path: Path):
    family = make_fake_family(tmp_path / "f", variants=[FakeVariant("a", ms_per_token=0.1), FakeVariant("b", 2.0)])
    facts = gather(family)
    # At 16 tokens a row costs 1.6 ms; calls of 32 rows cost 2 ms.
    assert (facts.tried["a"].cost, facts.tried["b"].cost) == pytest.approx((1.6, 2 / 32))
    page = Page(render(family))
    assert "engine time in the best batch" in page.texts["frontier"]
    assert "CPU ms" not in page.texts["main"]


# The drawings


def test_no_name_covers_a_dot_or_another_name():
    draw = random.Random(0)
    for _ in range(20):
        canvas = Canvas(Box(0, 0, 700, 400))
        dots = [(draw.uniform(20, 680), draw.uniform(20, 380)) for _ in range(30)]
        taken = [Box(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
        for box in taken:
            canvas.block(box)
        for x, y in dots:
            found = canvas.place(x, y, "a-variant-name")
            if found is None:
                continue
            assert found.inside(canvas.bounds)
            assert not any(found.overlaps(other) for other in taken)
            taken.append(found)
        assert len(taken) > 45


def test_a_name_without_room_becomes_a_number_in_the_legend(family: Family):
    facts = gather(family)
    marks = marks_of(facts)
    wide, narrow = Frontier(facts, marks, 1040, 560), Frontier(facts, marks, 344, 460)
    wide.svg()
    narrow.svg()
    assert wide.numbered == []
    assert 0 < len(narrow.numbered) < len(marks)


def test_no_disagreement_is_drawn_below_the_break(family: Family):
    facts = gather(family)
    plot = Frontier(facts, marks_of(facts), 1040, 560)
    assert plot._height(0) == plot.zero > plot.bottom > plot._height(0.0093)


def test_a_scale_is_logarithmic_with_round_ticks():
    scale = Scale(0.5, 50, 0, 100)
    assert [scale(0.5), scale(5), scale(50)] == pytest.approx([0, 50, 100])
    assert scale.ticks() == pytest.approx([0.5, 1, 2, 5, 10, 20, 50])


def test_the_frontier_line_goes_through_the_best_variants(family: Family):
    facts = gather(family)
    plot = Frontier(facts, marks_of(facts), 1040, 560)
    kept = [made for made in MADE if made.id not in DROPPED]
    best = [
        made
        for made in kept
        if not any(o.cost <= made.cost and o.disagreement <= made.disagreement and o is not made for o in kept)
    ]
    corners = plot._steps()
    assert len(corners) == 2 * len(best) - 1
    assert {(plot.x(made.cost), plot._height(made.disagreement)) for made in best} <= set(corners)


# In a browser

LOOK = """<!doctype html><body style="margin:0">
<iframe style="width:%dpx;height:9000px;border:0" srcdoc="%s"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
const box = (one) => one.getBoundingClientRect();
const meet = (a, b) =>
  a.left + 1 < b.right && b.left + 1 < a.right && a.top + 3 < b.bottom - 1 && b.top + 3 < a.bottom - 1;
frame.onload = () => {
  const page = frame.contentDocument;
  for (const part of page.querySelectorAll("details")) part.open = true;
  const found = {page: page.documentElement.scrollWidth, overflow: [], scrolls: [], overlaps: []};
  for (const one of page.querySelectorAll("main *"))
    if (box(one).right > frame.clientWidth + 1 && !one.closest(".wide"))
      found.overflow.push(one.outerHTML.slice(0, 99));
  for (const one of page.querySelectorAll(".wide"))
    if (one.scrollWidth > one.clientWidth + 1) found.scrolls.push(one.textContent.slice(0, 99));
  for (const svg of page.querySelectorAll("svg")) {
    const names = [...svg.querySelectorAll(".label, .tick")].filter((one) => box(one).width);
    const dots = [...svg.querySelectorAll(".dot, .diamond")];
    names.forEach((name, index) => {
      for (const other of [...names.slice(index + 1), ...dots])
        if (meet(box(name), box(other))) found.overlaps.push([name.textContent, other.outerHTML]);
    });
  }
  document.querySelector("pre").textContent = JSON.stringify(found);
  frame.remove();
};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_a_browser_sees_no_overflow_and_no_overlap(tmp_path: Path, family: Family, width: int):
    look = tmp_path / "look.html"
    look.write_text(LOOK % (width, html.escape(render(family))), encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = [f"--window-size={width + 40},2000", "--virtual-time-budget=4000", "--dump-dom", look.as_uri()]
    done = subprocess.run([str(CHROMIUM), *arguments, *size], capture_output=True, text=True, timeout=60, check=True)
    shown = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert shown is not None, done.stdout[-300:]
    found = json.loads(html.unescape(shown.group(1)))
    assert found["page"] <= width
    assert (found["overflow"], found["overlaps"], found["scrolls"]) == ([], [], [])
