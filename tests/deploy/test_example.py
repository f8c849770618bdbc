"""deploy/sloguard-gpu.yaml is valid and has every field, at least in a comment."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from sidecar.config.schema import Config
from sidecar.config.slo import LATENCY_STATISTICS

EXAMPLE = Path(__file__).parents[2] / "deploy" / "sloguard-gpu.yaml"


def fields(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from fields(kind)


def test_the_example_has_every_field_and_no_other() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    Config.model_validate(content)
    named = set(re.findall(r"^\s*(?:# +)?(\w+):", text, re.MULTILINE)) | set(re.findall(r"[{,] *(\w+):", text))
    # The comment names the kinds and statistics of the limits; not every combination is listed.
    missing = set(fields(Config)) - named - {statistic.name for statistic in LATENCY_STATISTICS}
    assert not missing
