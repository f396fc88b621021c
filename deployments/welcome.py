"""What `fettle serve` says when the service is up: the address, and for each family a request to try."""

from __future__ import annotations

import json

from fettle.chat import ChatTemplate
from fettle.config import ServeConfig
from fettle.family import Family
from fettle.manifest import TaskKind


def welcome(url: str, config: ServeConfig) -> list[str]:
    """Lines; the requests are commands for a shell, as they stand but for the key."""
    # Ray reads its environment when it is imported, and that is not set yet when this module is.
    from deployments.app import named_families

    key = " -H 'Authorization: Bearer KEY'" if config.api_keys or config.keys_file else ""
    lines = [f"serving at {url}  (live page at {url}/, documentation at {url}/docs, Ctrl-C stops)"]
    for name, family in named_families(config).items():
        path, body = example(name, family)
        lines.append(f"  curl {url}{path}{key} -H 'content-type: application/json' -d '{json.dumps(body)}'")
    return lines


def example(name: str, family: Family) -> tuple[str, dict[str, object]]:
    """A path and a body that the family can answer. Raises ModelError: its chat template cannot be read."""
    match family.manifest.task.kind:
        case TaskKind.CLASSIFY:
            return "/classify", {"model": name, "input": "a text"}
        case TaskKind.EMBED:
            return "/v1/embeddings", {"model": name, "input": "a text"}
        case TaskKind.GENERATE if ChatTemplate.read(family.tokenizer_path.parent) is None:
            return "/v1/completions", {"model": name, "prompt": "A text"}
    return "/v1/chat/completions", {"model": name, "messages": [{"role": "user", "content": "A question"}]}
