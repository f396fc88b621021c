"""The table of `fettle show` and its JSON: operating points, processor time, what was dropped; within 80 columns."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fettle.cli import app
from fettle.display import as_json, path_in_brief, print_table
from fettle.family import Family
from fettle.manifest import Dropped, Level
from tests.fakes import FakeVariant, make_fake_family
from tests.report_family import DROPPED, POINTS, make_report_family
from tests.texts import make_text_family


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_report_family(tmp_path_factory.mktemp("full") / "family")


def printed(family: Family, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_table(family, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def lines_of(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]


def test_processor_time_takes_the_place_of_rows_per_second(family: Family):
    text = printed(family)
    assert "CPU ms" in text
    assert "rows/s" not in text
    (line,) = lines_of(text, "distilled-3x256")
    assert line.split()[-5:] == ["3.6", "3.40", "91.56%", "yes", "0.7902"]


def test_rows_per_second_where_no_processor_time_was_measured(tmp_path: Path):
    text = printed(make_fake_family(tmp_path / "f"))
    assert "rows/s" in text
    assert "CPU ms" not in text
    assert "operating points" not in text


def test_a_family_that_writes(tmp_path: Path):
    text = printed(make_text_family(tmp_path / "lm"))
    assert text.splitlines()[0].strip() == "lm: texts"
    assert "ms at batch 1: a token of one text alone" in text
    assert "a token of one text" not in printed(make_fake_family(tmp_path / "f"))


def test_operating_points_with_bound_cost_and_path(family: Family):
    text = printed(family)
    for alpha, _, cost, _, shares in POINTS:
        (line,) = lines_of(text, f"{100 * alpha:g}% ")
        assert line.split()[2:4] == [f"{cost:.2f}", f"{100 * cost / 12.9:.0f}%"]
        assert f"minilm-exits-int8 {100 * shares[0]:.1f}% + {100 * shares[1]:.1f}%" in line
    assert "then onnx-fp32 2.5%" in " ".join(text.split())


def test_a_refused_level_says_why_and_what_it_takes(family: Family):
    (line,) = lines_of(printed(family), "0.5%")
    assert line.split()[1:4] == ["none", "no", "operating"]
    assert "at least 7,200 calibration rows are needed" in " ".join(printed(family).split())


def test_dropped_variants_are_one_line_each(family: Family):
    text = printed(family)
    assert [line.split(": ")[1] for line in lines_of(text, "dropped: ")] == list(DROPPED)
    assert all(len(line) <= 80 for line in lines_of(text, "dropped: "))


def test_tables_fit_into_eighty_columns(family: Family):
    tables = printed(family).partition("* answers")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert "…" not in tables


def test_the_longest_name_is_folded_and_not_cut(tmp_path: Path):
    name = "x" * 64
    tables = printed(make_fake_family(tmp_path / "f", variants=[FakeVariant(name)])).partition("* answers")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert tables.count("x") == len(name)


def test_text_in_brackets_is_no_markup(tmp_path: Path):
    family = make_report_family(
        tmp_path / "f",
        levels=[Level(alpha=0.01, reason="needs a [bold]GPU[/bold]")],
        dropped=[Dropped(id="x", reason="a [red]reason[/red]", manifest_sha256="0" * 64)],
        points=[],
    )
    assert "[bold]GPU[/bold]" in printed(family)
    assert "a [red]reason[/red]" in printed(family)


def test_json_has_all_of_it(family: Family):
    found = json.loads(json.dumps(as_json(family)))
    assert [level["alpha"] for level in found["levels"]] == [0.005, 0.01, 0.02, 0.05]
    assert found["levels"][0]["rows_needed"] == 7200
    assert [point["id"] for point in found["points"]] == [level["point"] for level in found["levels"][1:]]
    point = found["points"][0]
    assert point["relative_cost"] == pytest.approx(2.97 / 12.9)
    assert point["path"] == "minilm-exits-int8 61.0% + 20.0% + 16.5%, then onnx-fp32 2.5%"
    assert point["certificate"]["errors"] == 38
    assert {item["id"]: item["reason"] for item in found["dropped"]} == DROPPED
    variants = {variant["id"]: variant for variant in found["variants"]}
    assert variants["minilm-exits-int8"]["stage_cpu_ms"] == [2.7, 1.8, 0.9]
    assert variants["onnx-fp32"]["row_cpu_ms"] == 12.9


def test_a_path_that_was_not_tried_on_test_names_its_variants(family: Family):
    point = family.manifest.points[0].model_copy(update={"test": None})
    assert path_in_brief(point) == "minilm-exits-int8, then onnx-fp32"


def test_report_writes_the_file_again(tmp_path: Path):
    family = make_fake_family(tmp_path / "f")
    done = CliRunner().invoke(app, ["report", str(family.directory)])
    assert done.exit_code == 0
    path = family.directory / "report.html"
    assert done.stdout.strip() == str(path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    shown = CliRunner().invoke(app, ["report", str(family.directory), "--json"])
    assert json.loads(shown.stdout) == {"report": str(path)}


def test_report_has_help_with_an_example():
    shown = CliRunner().invoke(app, ["report", "--help"])
    assert shown.exit_code == 0
    assert "fettle report" in shown.stdout.partition("Example")[2]


def test_report_of_no_family_is_one_clear_line(tmp_path: Path):
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 1
    assert done.stderr.startswith(f"error: {tmp_path} is not a family")
