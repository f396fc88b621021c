"""`report.html`: what was tried on a model, what it cost and what it kept, in one file that needs no network.

A function of the manifests alone: the same family gives the same bytes, and nothing is measured here.
"""

from __future__ import annotations

from pathlib import Path

from fettle.family import Family
from fettle.store import write_atomic
from optimize import report_about as about
from optimize import report_model as model
from optimize import report_sections as sections
from optimize import report_text as text
from optimize.report_facts import Facts, gather
from optimize.report_html import Html, paragraph, tag
from optimize.report_words import evidence, result, task_in_words

REPORT_FILE = "report.html"
STYLE_FILE, SCRIPT_FILE = "report.css", "report.js"
PARTS = (
    ("points", "Operating points", sections.points),
    ("frontier", "Cost against faithfulness", sections.frontier),
    ("levers", "What each lever bought", sections.levers),
    ("inside", "What matters inside the model", model.inside),
    ("scores", "Can the scores be trusted?", model.scores),
    ("labels", "Where answers differ", model.labels),
    ("texts", "What the variants write", text.texts),
    ("vectors", "How close the vectors stay", model.vectors),
    ("missing", "What is not here, and why", about.missing),
    ("search", "What the search decided", about.search),
    ("data", "The data", about.data),
    ("method", "How it was measured", about.method),
    ("command", "Do it again", about.command),
)


def write_report(family: Family) -> Path:
    """Write the report beside `family.json` and return its path.

    Raises:
        OSError: the directory is not writable, or the disk is full.
    """
    path = family.directory / REPORT_FILE
    write_atomic(path, render(family).encode())
    return path


def render(family: Family) -> str:
    """The whole document. Parts that the family has no data for are left out."""
    facts = gather(family)
    built = [(name, title, part(facts)) for name, title, part in PARTS]
    shown = [(name, title, content) for name, title, content in built if content is not None]
    body = tag(
        "main",
        _head(facts),
        tag("nav", *(tag("a", title, href=f"#{name}") for name, title, _ in shown), aria_label="Parts of the report"),
        *(tag("section", tag("h2", title), content, id=name) for name, title, content in shown),
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"{family.name}: Fettle report"),
        tag("style", _asset(STYLE_FILE)),
    )
    page = tag("html", head, tag("body", body, tag("script", _asset(SCRIPT_FILE))), lang="en")
    return f"<!doctype html>\n{page}\n"


def _head(facts: Facts) -> Html:
    source = facts.manifest.source
    return tag(
        "header",
        paragraph("Fettle report", class_="over"),
        tag("h1", facts.manifest.name),
        paragraph(f"{source.name}, {source.architecture}: {task_in_words(facts)}", class_="what"),
        paragraph(result(facts), class_="result"),
        paragraph(said, class_="evidence") if (said := evidence(facts)) else None,
    )


def _asset(name: str) -> Html:
    """A file of this package, as it is; the closing tag that would end it early does not occur in it."""
    return Html(Path(__file__).with_name(name).read_text(encoding="utf-8"))
