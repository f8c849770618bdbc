"""Reads how vLLM is started from Compose files, Kubernetes manifests and systemd units. Pure but for one read each."""

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from sidecar.adopt.launch import NotReadable, Started, container_note
from sidecar.adopt.shell_words import starts_vllm
from sidecar.adopt.variables import substituted

_MOST_BYTES = 2**20
_Content = Mapping[str, Any]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8")
    except OSError as error:
        raise NotReadable(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise NotReadable(f"{path}: not text") from None


def _documents(path: Path) -> list[_Content]:
    try:
        loaded = list(yaml.safe_load_all(_read(path)))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise NotReadable(f"{path}: not YAML: {' '.join(str(error).split())[:200]}") from None
    return [cast("_Content", document) for document in loaded if isinstance(document, dict)]


def is_compose(path: Path) -> bool:
    """Whether the YAML file is Compose's, rather than Kubernetes'. Raises NotReadable."""
    return any("services" in document for document in _documents(path))


# Compose.


def from_compose(path: Path, service: str = "") -> Started:
    """The command of a service; without ``service``, of the only one that runs vLLM. Raises NotReadable."""
    services = {
        name: cast("_Content", content)
        for document in _documents(path)
        for name, content in _fields(document.get("services")).items()
        if isinstance(content, dict)
    }
    name = _chosen(path, "service", service, list(services), [n for n, s in services.items() if _runs_vllm(s)])
    content = services[name]
    outer = {**_environment_file(path.parent / ".env"), **os.environ}
    values = _compose_environment(content, path.parent)
    environment = {n: v if v is None else _interpolated(v, outer) for n, v in values.items()}
    words = [_interpolated(word, outer) for part in ("entrypoint", "command") for word in _words(content.get(part))]
    port = _compose_port(content.get("ports"), outer)
    notes = [container_note(content.get("image", "its own image"))]
    if port is not None:
        notes.append(f"the service publishes port {port} on the host; set engine.port to what clients use")
    return Started(tuple(words), environment, implied=True, notes=tuple(notes))


def _interpolated(text: str, outer: Mapping[str, str]) -> str:
    """Compose's own variables; ``$$`` stays a variable of the container."""
    parts = text.split("$$")
    return "$".join(substituted(part, outer)[0] for part in parts)


def _compose_environment(content: _Content, folder: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    files = content.get("env_file")
    for entry in cast("list[object]", files if isinstance(files, list) else [files] if files else []):
        named = _fields(cast("object", entry)).get("path", "") if isinstance(entry, dict) else entry
        found |= _environment_file(folder / str(named))
    given = content.get("environment")
    if isinstance(given, dict):
        found |= {
            str(name): None if value is None else _text(value) for name, value in _fields(cast("object", given)).items()
        }
    elif isinstance(given, list):
        for line in cast("list[object]", given):
            name, equals, value = str(line).partition("=")
            found[name] = value if equals else None
    return found


def _environment_file(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = (line.strip().removeprefix("export ").partition("=") for line in lines if not line.lstrip().startswith("#"))
    return {name.strip(): value.strip().strip("\"'") for name, equals, value in pairs if equals}


def _compose_port(ports: object, outer: Mapping[str, str]) -> int | None:
    if not isinstance(ports, list) or not ports:
        return None
    first = cast("list[object]", ports)[0]
    text = (
        str(_fields(cast("object", first)).get("published", ""))
        if isinstance(first, dict)
        else _interpolated(str(first), outer)
    )
    parts = text.split("/")[0].split(":")
    host = parts[-2] if len(parts) > 1 else parts[0] if isinstance(first, dict) else ""
    return int(host) if host.isdigit() else None


def _runs_vllm(content: _Content) -> bool:
    words = [*_words(content.get("entrypoint")), *_words(content.get("command"))]
    return "vllm" in str(content.get("image", "")).lower() or starts_vllm(words)


# Kubernetes.


def from_deployment(path: Path, container: str = "") -> Started:
    """The command of a container; without a name, of the manifest's only one that runs vLLM. Raises NotReadable."""
    found = {f"{c.get('name', '')}": c for document in _documents(path) for c in _containers(document)}
    name = _chosen(path, "container", container, list(found), [n for n, c in found.items() if _pod_runs_vllm(c)])
    content = found[name]
    environment: dict[str, str | None] = {}
    notes = [container_note(content.get("image", "its own image"))]
    for variable in cast("list[_Content]", content.get("env") or []):
        value = variable.get("value")
        environment[str(variable.get("name"))] = None if value is None else _text(value)
    if content.get("envFrom"):
        notes.append("the variables of envFrom are not in the manifest; add those that vLLM needs to engine.env")
    if others := sorted(other for other in found if other != name):
        notes.append(f"the other containers are left alone: {', '.join(others)}")
    words = [*_words(content.get("command"), split=False), *_words(content.get("args"), split=False)]
    return Started(tuple(words), environment, implied=True, notes=tuple(notes))


def _containers(document: _Content) -> Iterator[_Content]:
    """The containers of a pod template, wherever the kind of the document has it."""
    for key, value in document.items():
        if key == "containers" and isinstance(value, list):
            yield from (cast("_Content", one) for one in cast("list[object]", value) if isinstance(one, dict))
        elif isinstance(value, dict):
            yield from _containers(cast("_Content", value))
        elif isinstance(value, list):
            for item in cast("list[object]", value):
                if isinstance(item, dict):
                    yield from _containers(cast("_Content", item))


def _pod_runs_vllm(content: _Content) -> bool:
    words = [*_words(content.get("command"), split=False), *_words(content.get("args"), split=False)]
    return "vllm" in str(content.get("image", "")).lower() or starts_vllm(words)


# systemd.


def from_systemd_unit(path: Path) -> Started:
    """The command of a systemd unit. Raises NotReadable."""
    text = _read(path).replace("\\\n", " ")
    command = ""
    environment: dict[str, str | None] = {}
    notes: list[str] = []
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if not equals or key.startswith(("#", ";")):
            continue
        match key.strip():
            case "ExecStart":
                command = value.strip().lstrip("@-:+!") or ""
            case "Environment":
                for word in shlex.split(value):
                    name, _, content = word.partition("=")
                    environment[name] = content
            case "EnvironmentFile":
                environment |= _environment_file(Path(value.strip().removeprefix("-")))
            case "WorkingDirectory":
                notes.append(f"relative paths are relative to {value.strip()}")
            case _:
                pass
    if not command:
        raise NotReadable(f"{path}: no ExecStart in it")
    try:
        words = shlex.split(command.replace("%%", "%"))
    except ValueError as error:
        raise NotReadable(f"{path}: ExecStart: its quotes are not balanced ({error})") from None
    return Started(tuple(words), environment, notes=tuple(notes))


# Both kinds of YAML.


def _fields(value: object) -> _Content:
    return cast("_Content", value) if isinstance(value, dict) else {}


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _words(value: object, *, split: bool = True) -> list[str]:
    if isinstance(value, list):
        return [_text(word) for word in cast("list[object]", value)]
    if isinstance(value, str) and split:
        try:
            return shlex.split(value)
        except ValueError as error:
            raise NotReadable(f"the quotes of its command are not balanced ({error})") from None
    return [str(value)] if value is not None else []


def _chosen(path: Path, what: str, wanted: str, names: list[str], candidates: list[str]) -> str:
    if wanted:
        if wanted not in names:
            raise NotReadable(f"{path}: no {what} {wanted!r}; there are {', '.join(names) or 'none'}")
        return wanted
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise NotReadable(f"{path}: no {what} runs vLLM; there are {', '.join(names) or 'none'}; name one: {path}:NAME")
    raise NotReadable(f"{path}: several {what}s run vLLM: {', '.join(candidates)}; name one: {path}:{candidates[0]}")
