"""Renders engine arguments as a file for ``vllm serve --config``."""

from collections.abc import Sequence

import yaml

from vllm_sloguard.agent.serve_command import Args


def config_yaml(model: str, args: Args, comments: Sequence[str]) -> str:
    """The arguments as a file for ``vllm serve --config``, headed by ``comments``."""
    head = "".join(f"# {line}".rstrip() + "\n" for comment in comments for line in comment.splitlines() or [""])
    named = {name.replace("_", "-"): value for name, value in {"model": model, **args}.items()}
    return head + yaml.safe_dump(named, sort_keys=False, width=10_000)
