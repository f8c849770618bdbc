"""The JSON schema of the configuration file, with which editors complete and check it."""

from collections.abc import Mapping
from typing import Any

from sidecar.config.engine_arguments import OWN_ARGS
from sidecar.config.schema import Config
from sidecar.config.vllm_arguments import VLLM_ARGUMENTS, VLLM_VERSION, ValueKind, dashed
from vllm_sloguard.knobs import KNOBS, Knob, KnobKind

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TYPES: Mapping[ValueKind, dict[str, Any]] = {
    ValueKind.SWITCH: {"type": ["boolean", "null"]},
    ValueKind.FLAG: {"const": True},
    ValueKind.INTEGER: {"type": ["integer", "string"]},
    ValueKind.SIZE: {"type": ["integer", "string"]},
    ValueKind.NUMBER: {"type": ["number", "string"]},
    ValueKind.TEXT: {"type": ["string", "number"]},
    ValueKind.LIST: {"type": ["array", "string", "number"]},
    ValueKind.REPEATED: {"type": "string"},
    ValueKind.JSON: {"type": ["object", "array", "string", "number"]},
}


def config_schema() -> dict[str, Any]:
    """The schema; what it can't say, such as that one argument has several names, `sloguard plan` checks."""
    schema = Config.model_json_schema(mode="validation")
    parts = schema["$defs"]
    parts["EngineConfig"]["properties"]["args"] = _arguments()
    # Of the machine that prints it.
    del parts["EngineConfig"]["properties"]["python"]["default"], schema["properties"]["engine"]["default"]
    parts["SearchConfig"]["properties"]["knobs"] = _knobs()
    parts["SearchConfig"]["properties"]["unguarded"]["items"] = {
        "type": "object",
        "properties": {knob.name: _knob_value(knob) for knob in KNOBS.values()},
        "additionalProperties": False,
    }
    return {
        "$schema": DIALECT,
        **schema,
        "title": "vllm-sloguard",
        "description": "The configuration of vllm-sloguard.",
    }


def _arguments() -> dict[str, Any]:
    known = {
        dashed(name): {**_TYPES[kind], "description": f"vLLM {VLLM_VERSION} takes {kind}"}
        for name, kind in sorted(VLLM_ARGUMENTS.items())
        if name not in OWN_ARGS
    }
    refused: dict[str, Any] = {spelling: {"not": {}} for name in OWN_ARGS for spelling in (name, dashed(name))}
    return {
        "type": ["object", "null"],
        "description": "The arguments of `vllm serve` without their dashes; other versions may have more.",
        "properties": {**known, **refused},
        "propertyNames": {"pattern": "^[A-Za-z0-9_.-]+$"},
    }


def _knobs() -> dict[str, Any]:
    return {
        "type": "object",
        "description": "What the search may change, each with its range, or null for the default range.",
        "properties": {
            knob.name: {"description": knob.about, "anyOf": [_range(knob), {"type": "null"}]} for knob in KNOBS.values()
        },
        "additionalProperties": False,
        "minProperties": 1,
    }


def _range(knob: Knob) -> dict[str, Any]:
    if knob.kind is KnobKind.CATEGORICAL:
        fields = {"choices": {"type": "array", "minItems": 1, "items": _knob_value(knob)}}
    else:
        fields = {"low": _knob_value(knob), "high": _knob_value(knob)}
    return {"type": "object", "properties": fields, "additionalProperties": False}


def _knob_value(knob: Knob) -> dict[str, Any]:
    match knob.kind:
        case KnobKind.INT:
            return {"type": "integer"}
        case KnobKind.FLOAT:
            return {"type": "number"}
        case KnobKind.CATEGORICAL:
            kinds = {bool: "boolean", int: "integer", float: "number", str: "string"}
            return {"type": sorted({kinds[type(choice)] for choice in knob.choices})}
