"""The live page: that it is safe, whole and needs nothing from outside, and how a browser sees it with figures."""

from __future__ import annotations

import html
import json
import random
import re
import shutil
import subprocess
import tomllib
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path

import pytest

from deployments.history import History
from deployments.telemetry import ClassGauges, FamilyGauges, PointGauges, Telemetry, VariantGauges, merged, stats_body
from fettle.drift import Drift
from fettle.quality import PointState

ROOT = Path(__file__).parents[2]
PAGE = files("deployments").joinpath("page.html").read_text(encoding="utf-8")
SCRIPT = PAGE[PAGE.index("<script>") : PAGE.index("</script>")]
STYLE = PAGE[PAGE.index("<style>") : PAGE.index("</style>")]
VOID = {"meta", "link", "input"}
HOSTILE = "<img src=x onerror=alert(1)>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ALPHAS = (0.005, 0.01, 0.02, 0.05)
POINTS = [f"within-{alpha:g}" for alpha in ALPHAS]
REFERENCE = "onnx-fp32"
SMALL = "distilled-3-exits-int8"
CHAT = "v1/chat/completions"


class Page(HTMLParser):
    """Elements with their attributes; fails on a tag that is not closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(PAGE)


# The document


def test_it_needs_nothing_from_outside():
    namespace = "http://www.w3.org/2000/svg"
    assert not re.findall(r"https?:|//\w+\.|url\(|@import|@font-face", PAGE.replace(namespace, ""))
    assert not re.findall(r"<script[^>]+src|<iframe|<object|import\(", PAGE)


def test_links_stay_in_the_service(page: Page):
    targets = [found["href"] for tag, found in page.elements if tag in ("a", "link")]
    ids = {found.get("id") for _, found in page.elements}
    for target in targets:
        assert target in ("data:,", "stats", "quality", "docs") or (target[0] == "#" and target[1:] in ids)


def test_ids_are_unique_and_those_that_the_script_uses_exist(page: Page):
    ids = [found["id"] for _, found in page.elements if "id" in found]
    used = set(re.findall(r'\$\("([^"]+)"\)', SCRIPT))
    assert len(ids) == len(set(ids))
    assert len(used) > 20
    assert used <= set(ids)
    for _, found in page.elements:
        for attribute in ("for", "aria-labelledby"):
            assert found.get(attribute) in {None, *ids}


def test_text_of_the_server_cannot_become_markup():
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|createContextualFragment|eval\(", PAGE
    )
    assert not re.findall(r"<[^>]+\son\w+=", PAGE[: PAGE.index("<script>")])
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', PAGE)
    assert policy is not None
    assert {"default-src 'none'", "connect-src 'self'"} <= {part.strip() for part in policy.group(1).split(";")}


def test_headings_and_labels(page: Page):
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    named = {found.get("for") for tag, found in page.elements if tag == "label"}
    assert {found["id"] for tag, found in page.elements if tag in ("input", "textarea")} <= named
    assert ("html", {"lang": "en"}) in page.elements


def test_it_is_in_the_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "page.html" in settings["tool"]["setuptools"]["package-data"]["deployments"]


def test_the_palette_is_the_reports():
    report = (ROOT / "optimize" / "report.css").read_text(encoding="utf-8")
    ours = {name: values for name, values in palette(STYLE).items() if name not in ("reference", "alarm")}
    assert ours.items() <= palette(report).items()
    assert len(ours) > 8


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_is_easy_to_read(theme: int):
    colours = {name: values[theme] for name, values in palette(STYLE).items()}
    for ground in ("paper", "raised"):
        for text in ("ink", "soft", "accent", "alarm"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    # What is drawn, by the lower bar for graphics (WCAG 2.1, 1.4.11), the sky blue of the report's palette left aside.
    for mark in ("pruned", "exits", "distilled", "reshaped", "quantized", "reference"):
        assert contrast(colours[mark], colours["paper"]) >= 3, mark


def palette(css: str) -> dict[str, list[str]]:
    """Each colour in light and in dark."""
    found: dict[str, list[str]] = {}
    for name, value in re.findall(r"--(\w+): (#[0-9a-f]{6})", css):
        found.setdefault(name, []).append(value)
    return found


def contrast(one: str, other: str) -> float:
    """By WCAG 2.1."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_script_reads_what_the_service_says():
    """The names that the page asks of a family are those that the history gives."""
    family = stats("sections")["live"]["families"][0]
    asked = set(re.findall(r"\bfamily\.(\w+)", SCRIPT)) - {"length"}
    assert asked <= set(family)
    assert set(re.findall(r"family\.history\.(\w+)", SCRIPT)) <= set(family["history"])
    assert set(re.findall(r"family\.now\.(\w+)", SCRIPT)) <= set(family["now"])
    state = stats("sections")["quality"][0]
    assert set(re.findall(r"\bstate\.(\w+)", SCRIPT)) <= set(state)


# In a browser


def stats(*names: str, seconds: int = 60, requests: int = 40, hostile: bool = False) -> dict:
    """A body of /stats after some traffic, a revoked point and a drift warning in it."""
    draw = random.Random(3)
    now = [1_700_000_000.0]
    router, history = Telemetry(lambda: now[0]), History()
    classes = [("exact", 0.0, [REFERENCE]), ("gold", 0.005, POINTS[:1])]
    classes += [(f"{100 * alpha:g} %", alpha, POINTS[: place + 1]) for place, alpha in enumerate(ALPHAS)]
    variant = HOSTILE if hostile else SMALL
    for second in range(seconds):
        now[0] += 1
        for name in names:
            for _ in range(requests):
                quality, _, gears = draw.choice(classes)
                ms = [draw.lognormvariate(mean, 0.8) for mean in (-1, 1, 2, 3)]
                told = dict(zip(("tokenize_ms", "queue_ms", "infer_ms", "total_ms"), ms, strict=True))
                router.answered(name, quality, draw.choice(gears), [(variant, draw.randint(0, 2))], **told)
            if requests:
                router.answered(name, "pinned", "onnx-int8", [("onnx-int8", 0)], **told)
                router.refused(name, "overloaded")
        pressure = 2.6 * second / seconds
        gauges = [
            FamilyGauges(
                name,
                "embed" if "vector" in name else "generate" if "writer" in name else "classify",
                REFERENCE,
                100.0,
                [ClassGauges(*one, min(second // 20, len(one[2]) - 1), pressure) for one in classes],
                [
                    VariantGauges(one, stages, 2, 12_345, 12.5, 50 * second, 9 * second, 400.0 * second)
                    for one, stages in ((variant, 3), ("onnx-int8", 1), (REFERENCE, 1))
                ],
                [PointGauges(point, a, 0.97 * a, [(variant, 3)]) for point, a in zip(POINTS, ALPHAS, strict=True)],
            )
            for name in names
        ]
        history.add(now[0], merged({"one": router.snapshot(gauges)}))
    warning = Drift(True, 1000, 1e-9, 0.4, None, None)
    states = [
        PointState(
            *(name, point, f"{name}{place}", alpha, 0.97 * alpha, 5011, 37, 123_456, 1234),
            *([1e-9, 0.8, 60.0, 1e300][place], 100.0, "revoked" if place == 3 else "watched"),
            *(now[0] if place == 3 else None, warning if place == 2 else None),
        )
        for name in names
        for place, (point, alpha) in enumerate(zip(POINTS, ALPHAS, strict=True))
    ]
    return stats_body(history.view(), states, "1.2.3", at=now[0], share=0.01)


STUB = """<script>
window.problems = [];
addEventListener("error", (event) => problems.push(event.message));
addEventListener("unhandledrejection", (event) => problems.push(String(event.reason)));
const replies = %s;
window.fetch = async (path) => {
  const reply = replies[path];
  if (!reply) throw new TypeError("Failed to fetch");
  return new Response(reply.text ?? JSON.stringify(reply.body), {status: reply.status});
};
</script>
<script>"""

LOOK = """<!doctype html><body style="margin:0">
<iframe style="width:%dpx;height:9000px;border:0" srcdoc="%s"></iframe><pre></pre>
<script>
const frame = document.querySelector("iframe");
const box = (one) => one.getBoundingClientRect();
const meet = (a, b) =>
  a.left + 1 < b.right && b.left + 1 < a.right && a.top + 3 < b.bottom - 1 && b.top + 3 < a.bottom - 1;
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
frame.onload = async () => {
  await wait(1500);
  const page = frame.contentDocument;
  page.getElementById("text").value = "a text";
  page.getElementById("stream").checked = %s;
  if (!page.getElementById("page").hidden) page.getElementById("try-form").requestSubmit();
  page.getElementById("traffic-chart").dispatchEvent(new KeyboardEvent("keydown", {key: "PageUp"}));
  await wait(1500);
  const found = {page: page.documentElement.scrollWidth, overflow: [], overlaps: []};
  found.problems = frame.contentWindow.problems;
  for (const one of page.querySelectorAll("main *"))
    if (box(one).width && box(one).right > frame.clientWidth + 1) found.overflow.push(one.outerHTML.slice(0, 99));
  for (const svg of page.querySelectorAll("svg")) {
    const names = [...svg.querySelectorAll("text")].filter((one) => box(one).width);
    names.forEach((name, index) => {
      if (box(name).left < box(svg).left - 1 || box(name).right > box(svg).right + 1)
        found.overflow.push(name.textContent);
      for (const other of [...names.slice(index + 1), ...svg.querySelectorAll(".diamond")])
        if (meet(box(name), box(other))) found.overlaps.push([name.textContent, other.outerHTML]);
    });
  }
  found.charts = page.querySelectorAll("svg").length;
  found.images = page.querySelectorAll("img").length;
  found.hidden = [...page.querySelectorAll("[hidden]")].map((one) => one.id);
  const text = (id) => page.getElementById(id).textContent;
  found.placeholder = page.getElementById("text").placeholder;
  found.heads = [...page.querySelectorAll("#copies-rows td")].map((one) => one.dataset.label);
  found.parts = [...page.querySelectorAll("#parts h3")].map((one) => one.textContent);
  const said = ["state", "result", "answers", "quality-what", "points", "traffic-when", "title", "about"];
  for (const id of [...said, "places-what", "try-button"])
    found[id] = text(id);
  document.querySelector("pre").textContent = JSON.stringify(found);
  frame.remove();
};
</script>"""


def look(tmp_path: Path, replies: dict, width: int = 1280, *, stream: bool = True) -> dict:
    shown = PAGE.replace("<script>", STUB % json.dumps(replies).replace("<", "\\u003c"))
    file = tmp_path / "look.html"
    file.write_text(LOOK % (width, html.escape(shown), json.dumps(stream)), encoding="utf-8")
    arguments = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    size = [f"--window-size={width + 40},2000", "--virtual-time-budget=8000", "--dump-dom", file.as_uri()]
    done = subprocess.run([str(CHROMIUM), *arguments, *size], capture_output=True, text=True, timeout=90, check=True)
    shown = re.search(r"<pre>(\{.*?\})</pre>", done.stdout, re.DOTALL)
    assert shown is not None, done.stdout[-300:]
    found = json.loads(html.unescape(shown.group(1)).replace("\u00a0", " "))
    assert found["problems"] == []
    return found


def good(body: dict) -> dict:
    return {"status": 200, "body": body}


def classified(label: str = "python") -> dict:
    """A reply of /classify with its way, as the page asks for it."""
    steps = [
        *({"variant": SMALL, "stage": 2, "score": 0.41, "threshold": 0.9, "taken": False, "infer_ms": 2.0},),
        *({"variant": REFERENCE, "stage": 0, "score": None, "threshold": 0.0, "taken": True, "infer_ms": 9.0},),
    ]
    explain = [[{**step, "temperature": 1.0, "queue_ms": 0.6, "batch_rows": 3} for step in steps]]
    told = {"point": POINTS[1], "variant": REFERENCE, "bound": 0.0097, "degraded": False, "explain": explain}
    times = {"tokenize_ms": 0.2, "queue_ms": 1.2, "infer_ms": 11.0}
    return {"data": [{"label": label, "probs": [0.1, 0.7, 0.2]}], "fettle": told | times}


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium to look at the page with")


@needs_chromium
@pytest.mark.parametrize("width", [360, 768, 1280, 1600])
def test_a_browser_sees_no_overflow_and_no_overlap(tmp_path: Path, width: int):
    replies = {
        "stats": good(stats("sections", "package-vectors")),
        "info": good({"families": [{"name": "sections", "labels": ["a", "python", "a label that is quite long"]}]}),
        "classify": good(classified()),
    }
    found = look(tmp_path, replies, width)
    assert found["page"] <= width
    assert (found["overflow"], found["overlaps"]) == ([], [])
    assert found["charts"] > 15


@needs_chromium
def test_what_it_says(tmp_path: Path):
    replies = {
        "stats": good(stats("sections")),
        "info": good({"families": [{"name": "sections", "labels": ["a", "python", "c"]}]}),
        "classify": good(classified()),
    }
    found = look(tmp_path, replies)
    assert found["title"] == "sections"
    assert "Live" in found["state"]
    assert re.match(r"8\d % of requests are answered more cheaply", found["result"])
    assert "10 seconds before" in found["traffic-when"]
    assert found["quality-what"].startswith("1 % of the texts")
    assert found["points"].count("watched") == 3
    assert "revoked" in found["points"]
    assert "evidence 10³⁰⁰" in found["points"]
    assert "Drift" in found["points"]
    answers = found["answers"]
    assert answers.count("certified to differ in at most 0.97 %") == 6
    assert (
        f"{SMALL}, at the end: not sure enoughscore 0.41 < 0.90; 2 ms after 0.6 ms in the queue, in a batch of 3"
        in answers
    )
    assert f"{REFERENCE}: has the last word" in answers
    assert "12 ms in the service" in answers
    assert "picker" in found["hidden"]


@needs_chromium
def test_text_of_the_service_stays_text(tmp_path: Path):
    replies = {
        "stats": good(stats(HOSTILE, hostile=True)),
        "info": good({"families": []}),
        "classify": good(classified(HOSTILE)),
    }
    found = look(tmp_path, replies)
    assert found["images"] == 0
    assert found["title"] == HOSTILE
    assert HOSTILE in found["answers"]


@needs_chromium
def test_no_traffic_and_the_first_moments(tmp_path: Path):
    found = look(
        tmp_path,
        {
            "stats": good(stats("sections", requests=0)),
            "classify": {"status": 429, "body": {"error": {"message": "queue full"}}},
        },
    )
    assert found["result"].startswith("No requests in the last 10 seconds")
    assert (found["overflow"], found["overlaps"]) == ([], [])
    assert found["answers"].count("No answer: queue full") == 6
    found = look(tmp_path, {"stats": good(stats("sections", seconds=1))})
    assert (found["overflow"], found["overlaps"]) == ([], [])
    found = look(tmp_path, {"stats": good(stats_body({}, [], "1.2.3", at=1.0))})
    assert "first figures" in found["state"]


@needs_chromium
def test_a_family_without_its_original(tmp_path: Path):
    body = stats("sections")
    [family] = body["live"]["families"]
    family["classes"][0]["gears"] = []
    found = look(tmp_path, {"stats": good(body), "info": good({"families": []}), "classify": good(classified())})
    assert found["answers"].count("certified to differ") == 5
    assert (found["overflow"], found["overlaps"]) == ([], [])


@needs_chromium
def test_a_service_that_is_gone_or_wants_a_key(tmp_path: Path):
    found = look(tmp_path, {})
    assert "has not answered since" in found["state"]
    assert "key-form" in found["hidden"]
    found = look(tmp_path, {"stats": {"status": 401, "body": {"error": {"message": "no key"}}}})
    assert "holders of a key" in found["state"]
    assert "key-form" not in found["hidden"]
    old = stats("sections")
    found = look(tmp_path, {"stats": good({**old, "at": old["at"] + 60})})
    assert "monitor has not been heard for 60 seconds" in found["state"]


# Text


QUESTION = "Which section?\n{text}"
WRITERS = {"families": [{"name": "writer", "labels": [], "instruction": QUESTION}]}
ATTEMPT = {"variant": SMALL, "tokens": 3, "finish": ["escalated"], "score": [0.41], "taken": False}
TIMES = {"tokenize_ms": 0.2, "queue_ms": 1.2, "infer_ms": 11.0}


def told_of(**more: object) -> dict:
    return {"point": POINTS[1], "variant": REFERENCE, "bound": 0.0097, "degraded": False, **TIMES, **more}


def chat(text: str = "python", finish: str = "stop") -> dict:
    """A whole reply, as the page asks for it, of a second attempt."""
    told = told_of(explain={"attempts": [ATTEMPT], "variant": REFERENCE})
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    choice["fettle"] = {"finish": finish}
    return {"choices": [choice], "usage": {"completion_tokens": 2}, "fettle": told}


def chunks(*pieces: str, finish: str = "early_end") -> str:
    """The events of a stream."""
    end = {"index": 0, "delta": {}, "finish_reason": "stop", "fettle": {"finish": finish}}
    choices = [{"index": 0, "delta": {"content": piece}, "finish_reason": None} for piece in pieces] + [end]
    events: list[dict] = [{"choices": [choice], "usage": None} for choice in choices]
    events.append({"choices": [], "usage": {"completion_tokens": len(pieces)}, "fettle": told_of()})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


@needs_chromium
@pytest.mark.parametrize("width", [360, 1280])
def test_a_family_that_writes(tmp_path: Path, width: int):
    streamed = {"status": 200, "text": chunks("pyt", "hon ", HOSTILE)}
    found = look(tmp_path, {"stats": good(stats("writer")), "info": good(WRITERS), CHAT: streamed}, width)
    assert (found["overflow"], found["overlaps"], found["images"]) == ([], [], 0)
    assert found["about"].startswith("Writes texts")
    assert found["parts"] == ["Queue", "Writing", "Total"]
    assert "exit" not in found["places-what"]
    assert "texts at a time" in found["heads"]
    assert "texts a batch" not in found["heads"]
    assert found["placeholder"] == QUESTION
    assert found["try-button"] == "Write in every class"
    answers = found["answers"]
    assert answers.count(f"python {HOSTILE}") == 6
    assert answers.count("The same text as the original’s.") == 5
    assert answers.count("3 tokens, ended early: the end was near") == 6
    assert answers.count("to the first piece") == 6
    assert f"{REFERENCE}: answers" in answers
    assert "certified to differ in at most 0.97 %" in answers
    assert "12 ms in the service" in answers


@needs_chromium
def test_a_text_that_is_shown_when_it_is_whole(tmp_path: Path):
    replies = {"stats": good(stats("writer")), "info": good(WRITERS), CHAT: good(chat("net", "length"))}
    answers = look(tmp_path, replies, stream=False)["answers"]
    assert answers.count("net") == 6
    assert (
        f"{SMALL}: not sure enough3 tokens, score 0.41{REFERENCE}: has the last word2 tokens, cut at the limit"
        in answers
    )
    assert "to the first piece" not in answers


@needs_chromium
def test_a_model_without_a_chat_template_gets_the_prompt_as_it_stands(tmp_path: Path):
    error = {"error": {"message": "no chat template", "param": "messages"}}
    whole = chat() | {"choices": [{"index": 0, "text": "and on", "fettle": {"finish": "length"}}]}
    replies = {"stats": good(stats("writer")), "info": good(WRITERS), CHAT: {"status": 400, "body": error}}
    found = look(tmp_path, replies | {"v1/completions": good(whole)}, stream=False)
    assert found["answers"].count("and on") == 6


@needs_chromium
def test_a_text_that_fails(tmp_path: Path):
    broken = 'data: {"choices": [{"delta": {"content": "so far"}}]}\n\ndata: {"error": {"message": "it broke off"}}\n\n'
    replies = {"stats": good(stats("writer")), "info": good({"families": []})}
    found = look(tmp_path, replies | {CHAT: {"status": 200, "text": broken}})
    assert found["answers"].count("No answer: it broke off") == 6
    refused = {"status": 429, "body": {"error": {"message": "queue full", "param": None}}}
    assert look(tmp_path, replies | {CHAT: refused})["answers"].count("No answer: queue full") == 6
