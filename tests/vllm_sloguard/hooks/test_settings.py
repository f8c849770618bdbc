"""The plugin's environment variables: what they mean, and one clear line for each that is wrong."""

import pytest

from vllm_sloguard.hooks.settings import SETTING_NAMES, Settings, SettingsError, unknown


def test_nothing_set_is_the_default() -> None:
    assert Settings.from_environ({}) == Settings()
    assert Settings.from_environ(dict.fromkeys(SETTING_NAMES, " ")) == Settings()
    assert Settings().repair


def test_everything_set() -> None:
    environ = {
        "SLOGUARD_SOCKET": " /run/a b/s ",
        "SLOGUARD_ENGINE_ID": "one",
        "SLOGUARD_REPAIR": "off",
        "SLOGUARD_PINNED": "max-num-seqs, block_size",
        "SLOGUARD_WORKLOAD_MAX_LEN": "0",
        "SLOGUARD_LEARNED": "/var/lib/learned.json",
        "SLOGUARD_IMPORTS": "/var/lib",
        "SLOGUARD_QUEUE_EVENTS": "1",
        "PATH": "/bin",
    }

    assert Settings.from_environ(environ) == Settings(
        "/run/a b/s", "one", False, frozenset({"max_num_seqs", "block_size"}), 0, "/var/lib/learned.json", "/var/lib", 1
    )
    assert set(environ) - {"PATH"} == set(SETTING_NAMES)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("SLOGUARD_REPAIR", "true", "on or off"),
        ("SLOGUARD_REPAIR", "ON", "on or off"),
        ("SLOGUARD_REPAIR", "1", "on or off"),
        ("SLOGUARD_PINNED", "a,,b", "a list of arguments with commas between"),
        ("SLOGUARD_PINNED", "a,", "a list of arguments with commas between"),
        ("SLOGUARD_PINNED", "a b", "a list of arguments with commas between"),
        ("SLOGUARD_PINNED", "a=1", "a list of arguments with commas between"),
        ("SLOGUARD_WORKLOAD_MAX_LEN", "-1", "a whole number from 0 up"),
        ("SLOGUARD_WORKLOAD_MAX_LEN", "1.5", "a whole number from 0 up"),
        ("SLOGUARD_WORKLOAD_MAX_LEN", "1k", "a whole number from 0 up"),
        ("SLOGUARD_QUEUE_EVENTS", "0", "a whole number from 1 up"),
        ("SLOGUARD_QUEUE_EVENTS", "many\nmore", "a whole number from 1 up"),
        ("SLOGUARD_QUEUE_EVENTS", "9" * 5000, "a whole number from 1 up"),
    ],
)
def test_a_bad_value_is_one_line_with_name_given_and_allowed(name: str, text: str, allowed: str) -> None:
    with pytest.raises(SettingsError) as raised:
        Settings.from_environ({name: text})

    assert str(raised.value) == f"{name}: {text!r} is not {allowed}"
    assert len(str(raised.value).splitlines()) == 1


def test_unknown_names_are_listed() -> None:
    environ = dict.fromkeys(
        ["SLOGUARD_SOKET", "SLOGUARD_PORT", "sloguard_socket", "MY_SLOGUARD_X", *SETTING_NAMES], "x"
    )

    assert unknown(environ) == ["SLOGUARD_PORT", "SLOGUARD_SOKET"]
    assert unknown(dict.fromkeys(SETTING_NAMES, "x")) == []
