"""Classifies why an engine exited: one category and one line of evidence, from its log."""

from vllm_sloguard.crash.classify import classify, classify_file, classify_stream
from vllm_sloguard.crash.kinds import Category, Crash

__all__ = ["Category", "Crash", "classify", "classify_file", "classify_stream"]
