"""Finds the command that starts vLLM in a line or a script of a shell. Pure; nothing is executed."""

import re
import shlex
from collections.abc import Iterator, Mapping

from sidecar.adopt.launch import NotReadable, Started
from sidecar.adopt.variables import substituted

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_ENDS = frozenset({";", "&&", "||", "|", "&", "\n"})
_REDIRECTION = re.compile(r"(\d|&)?(>>?|<)(&?\d|.*)")
_SHELLS = frozenset({"sh", "bash", "dash", "zsh", "ash"})
_MARK = "\x01"
# Inside of $(command), these do not end a word.
_PROTECTED = str.maketrans(" \t\n;&|", "\x02\x03\x04\x05\x06\x07")
_UNPROTECTED = str.maketrans("\x02\x03\x04\x05\x06\x07", " \t ;&|")


def started_in(script: str, environment: Mapping[str, str | None] | None = None) -> Started:
    """The vLLM command in ``script``, with what it exports before. Raises NotReadable."""
    known: dict[str, str | None] = dict(environment or {})
    given: dict[str, str | None] = {}
    for command in _commands(script):
        words = list(command)
        prefix = _assignments(words)
        if not words:  # known to the shell alone
            known |= {name: substituted(text, known)[0] for name, text in prefix.items()}
            continue
        if words[0] in {"export", "env", "exec", "nohup", "sudo", "time", "set"}:
            prefix |= _assignments(words, after=words[0])
        prefix = {name: substituted(text, {**known, **given})[0] for name, text in prefix.items()}
        given |= prefix
        if starts_vllm(words):
            values = {**known, **given}
            return Started(tuple(substituted(word, values)[0] for word in words), {**(environment or {}), **given})
    raise NotReadable("no `vllm serve` in it, nor a start of vllm.entrypoints.openai.api_server")


def _assignments(words: list[str], after: str = "") -> dict[str, str]:
    """Takes the assignments from the front of ``words``, behind ``after``."""
    at = 1 if after else 0
    found: dict[str, str] = {}
    while at < len(words) and (match := _ASSIGNMENT.fullmatch(words[at])):
        found[match[1]] = match[2]
        del words[at]
    return found


def _commands(script: str) -> Iterator[list[str]]:
    """The simple commands of ``script``, each as its words; scripts of an inner ``bash -c`` are unfolded."""
    for words in _split(script):
        inner = inner_script(words)
        if inner is None:
            yield words
        else:
            yield from _commands(inner)


def inner_script(words: list[str]) -> str | None:
    """The script of ``bash -c SCRIPT``, also with options such as -lc; None for another command."""
    for at, word in enumerate(words[:-2]):
        if word.rpartition("/")[2] in _SHELLS:
            option = next((n for n in range(at + 1, len(words) - 1) if re.fullmatch(r"-[a-z]*c", words[n])), None)
            return None if option is None else words[option + 1]
    return None


def _split(script: str) -> Iterator[list[str]]:
    text = script.replace("\\\r\n", " ").replace("\\\n", " ")
    lexer = shlex.shlex(_newlines_marked(text), posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    lexer.commenters = ""
    words: list[str] = []
    try:
        for word in lexer:
            if word in _ENDS or word == _MARK or set(word) <= set(";&|"):
                if words:
                    yield words
                words = []
            else:
                words.append(word.translate(_UNPROTECTED))
    except ValueError as error:
        raise NotReadable(f"its quotes are not balanced ({error})") from None
    if words:
        yield words


def _newlines_marked(text: str) -> str:
    """``text`` without comments, and with a word for each line's end outside of quotes: shlex takes it for a space."""
    found: list[str] = []
    quote, comment, before, depth = "", False, " ", 0
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and not comment:
            quote = character
        elif character == "#" and before.isspace():
            comment = True
        elif character == "(" and (before == "$" or depth):
            depth += 1
        elif character == ")" and depth:
            depth -= 1
        elif character == "`":
            depth = 0 if depth else 1
        comment = comment and character != "\n"
        if not comment:
            marked = f" {_MARK} " if character == "\n" and not quote and not depth else character
            found.append(marked.translate(_PROTECTED) if depth and not quote else marked)
        before = character
    return "".join(found)


def without_redirections(words: tuple[str, ...]) -> tuple[str, ...]:
    """``words`` without ``> file`` and ``2>&1``."""
    kept: list[str] = []
    skip = False
    for word in words:
        match = _REDIRECTION.fullmatch(word)
        if skip or match is not None:
            skip = match is not None and not match[3]
        else:
            kept.append(word)
    return tuple(kept)


def starts_vllm(words: list[str] | tuple[str, ...]) -> bool:
    """Whether a command starts vLLM's server, by itself or in a container."""
    names = [word.rpartition("/")[2] for word in words]
    in_container = "run" in words and any(name in {"docker", "podman", "nerdctl"} for name in names[:2])
    return any(
        (name == "vllm" and list(words[at + 1 : at + 2]) == ["serve"])
        or "vllm.entrypoints" in word
        or "vllm/entrypoints" in word
        or (in_container and "vllm" in word.lower())
        for at, (word, name) in enumerate(zip(words, names, strict=True))
    )
