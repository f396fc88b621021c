"""What a user may set: the short form of `serve`, defaults, and that nothing unknown or contradictory passes."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from fettle.config import (
    BatchConfig,
    DataFiles,
    FamilyConfig,
    GearConfig,
    KeyConfig,
    LimitConfig,
    MonitorConfig,
    OptimizeConfig,
    ReplicaConfig,
    ServeConfig,
)

KEY = "a-key-of-some-length"


def test_the_short_form_names_one_family_or_several():
    assert ServeConfig.model_validate({"family": "a"}).families == [FamilyConfig(path="a")]
    assert [family.path for family in ServeConfig.model_validate({"family": "a,b/c"}).families] == ["a", "b/c"]


def test_the_short_form_keeps_the_other_settings():
    config = ServeConfig.model_validate({"family": "a", "routers": 2, "replicas": {"max_replicas": 5}})
    assert (config.routers, config.replicas.max_replicas) == (2, 5)


def test_the_short_and_the_long_form_exclude_each_other():
    with pytest.raises(ValidationError):
        ServeConfig.model_validate({"family": "a", "families": [{"path": "b"}]})


def test_the_configuration_survives_json():
    config = ServeConfig(families=[FamilyConfig(path="a", variants=["int8"], default="int8")], api_keys=[KEY])
    assert ServeConfig.model_validate_json(config.model_dump_json()) == config


def test_keys_are_not_printed():
    config = ServeConfig(families=[FamilyConfig(path="a")], api_keys=[KEY])
    assert KEY not in repr(config)
    assert KEY not in repr(config.api_keys)


def test_a_bare_key_has_no_limits_and_is_called_by_its_place():
    given = [KEY, {"key": "another-key", "name": "ann", "weight": 2, "max_concurrent": 8, "tokens_per_second": 1e4}]
    config = ServeConfig.model_validate({"family": "a", "api_keys": given})
    assert config.api_keys == [
        KeyConfig(key=KEY, name="key-1"),
        KeyConfig(key="another-key", name="ann", weight=2.0, max_concurrent=8, tokens_per_second=1e4),
    ]
    assert ServeConfig.model_validate_json(config.model_dump_json()) == config


def test_classes_have_names():
    config = ServeConfig.model_validate({"family": "a", "classes": {"gold": 0.005, "bulk": 0.05}})
    assert config.classes == {"gold": 0.005, "bulk": 0.05}


@pytest.mark.parametrize("default", [0.02, "exact", 0, 1])
def test_a_family_has_a_default_class(default):
    assert FamilyConfig.model_validate({"path": "a", "max_disagreement": default}).max_disagreement == default


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"families": []},
        {"family": "a", "unknown": 1},
        {"family": "a", "routers": 0},
        {"family": "a", "api_keys": ["short"]},
        {"family": "a", "replicas": {"min_replicas": 3, "max_replicas": 2}},
        {"family": "a", "replicas": {"max_replicas": 0}},
        {"family": "a", "replicas": {"min_replicas": -1}},
        {"family": "a", "replicas": {"device": "tpu"}},
        {"family": "a", "batch": {"max_rows": 0}},
        {"family": "a", "batch": {"max_queue_s": 0}},
        {"family": "a", "batch": {"max_age_ms": -1}},
        {"family": "a", "limits": {"max_inputs": 0}},
        {"families": [{"path": "a", "name": "with space"}]},
        {"families": [{"path": "a", "variants": ["../x"]}]},
        {"families": [{"path": "a", "variant": "x"}]},
        {"families": [{"path": "a", "max_disagreement": 1.5}]},
        {"families": [{"path": "a", "max_disagreement": "gold"}]},
        {"family": "a", "api_keys": [KEY, KEY]},
        {"family": "a", "api_keys": [{"key": KEY, "name": "x"}, {"key": "another-key", "name": "x"}]},
        {"family": "a", "api_keys": [{"key": KEY, "name": "x", "weight": 0}]},
        {"family": "a", "api_keys": [{"key": KEY, "name": "x", "max_concurrent": 0}]},
        {"family": "a", "api_keys": [{"key": KEY}]},
        {"family": "a", "api_keys": KEY},
        {"family": "a", "classes": {"gold": 2}},
        {"family": "a", "classes": {"with space": 0.1}},
        {"family": "a", "gears": {"up": 0.3, "down": 0.3}},
        {"family": "a", "gears": {"dwell_s": 0}},
        {"family": "a", "monitor": {"share": 1.1}},
        {"family": "a", "monitor": {"delta": 0}},
    ],
    ids=repr,
)
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValidationError):
        ServeConfig.model_validate(wrong)


def test_scaling_to_zero_is_allowed():
    assert ReplicaConfig(min_replicas=0, max_replicas=1).min_replicas == 0


@pytest.mark.parametrize("model", [BatchConfig, GearConfig, LimitConfig, MonitorConfig, ReplicaConfig])
def test_everything_has_a_default_and_nothing_changes_afterwards(model):
    settings = model()
    with pytest.raises(ValidationError):
        setattr(settings, next(iter(model.model_fields)), 1)


def test_data_come_as_one_file_or_as_splits():
    assert DataFiles(data=Path("a.jsonl")).test is None
    assert DataFiles(test=Path("t.jsonl"), train=Path("a.jsonl")).data is None
    for wrong in (
        {},
        {"data": "a.jsonl", "test": "t.jsonl"},
        {"train": "a.jsonl"},
        {"calibration": "a.jsonl", "validation": "b.jsonl"},
        {"data": "a.jsonl", "column": "x"},
    ):
        with pytest.raises(ValidationError):
            DataFiles.model_validate(wrong)


def test_an_optimize_run_needs_a_model_data_and_a_place():
    files = {"data": "a.jsonl"}
    config = OptimizeConfig.model_validate({"model": "m", "out": "o", "files": files})
    assert (config.seed, config.task, config.recipes) == (0, None, None)
    for wrong in (
        {"model": "m", "files": files},
        {"model": "m", "out": "o"},
        {"model": "m", "out": "o", "files": files, "task": "translate"},
        {"model": "m", "out": "o", "files": files, "max_rows": 1},
        {"model": "m", "out": "o", "files": files, "recipes": ["a b"]},
    ):
        with pytest.raises(ValidationError):
            OptimizeConfig.model_validate(wrong)
