"""How times, sizes and settings read, wherever they are shown."""

import os
import time
from collections.abc import Iterator

import pytest

from sidecar.format import assignments, change, setting, size, when


@pytest.fixture
def in_tokyo() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Asia/Tokyo"
    time.tzset()
    yield
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.usefixtures("in_tokyo")
def test_a_time_has_its_zone() -> None:
    assert when(1_700_000_000.9) == "2023-11-15 07:13:20 JST"


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (2**26, "64 MiB"),
        (1.5 * 2**30, "1.5 GiB"),
        (2**46, "64 TiB"),
        (2**60, "1.049e+06 TiB"),
    ],
)
def test_size(count: float, shown: str) -> None:
    assert size(count) == shown


def test_settings_have_the_unit_that_their_name_has_not() -> None:
    assert setting(67108864, "kv_cache_memory_bytes") == "64 MiB"
    assert setting(67108864, "max_num_batched_tokens") == "67108864"
    assert [setting(given) for given in (None, True, False, 0.91239, "fp8", ["a", 1])] == [
        *("not set", "on", "off", "0.9124", "fp8", "a,1")
    ]
    assert change("kv_cache_memory_bytes", None, 2**30) == "kv_cache_memory_bytes not set → 1 GiB"
    assert assignments({"b": 1, "kv_cache_memory_bytes": 2**30}) == "b=1 kv_cache_memory_bytes=1 GiB"
    assert assignments({"b": 1, "c": True}, ["c", "d"]) == "c=on"
