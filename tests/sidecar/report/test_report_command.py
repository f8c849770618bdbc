"""`sloguard report` and the HTML that it writes."""

import os
import re
import resource
from pathlib import Path

import pytest
from fake_service import sloguard
from report_cases import INCUMBENT, Made, whole

from sidecar.record.atomic_write import write_whole
from sidecar.record.journal import Journal
from vllm_sloguard.crash import Category

EVIL = "<script>document.title = 'owned'</script><img src=x onerror=alert(1)>"
# Half of it is plotly.js.
MAX_BYTES_OF_500 = 2_200_000


def written(state: Path, folder: Path) -> str:
    done = sloguard("report", state, "-o", folder / "report.html")
    assert done.returncode == 0, done.stderr
    return (folder / "report.html").read_text(encoding="utf-8")


def own(page: str) -> str:
    """The page without plotly's source."""
    longest = max(re.findall(r"<script>.*?</script>", page, re.DOTALL), key=len)
    return page.replace(longest, "")


def test_the_decision_comes_first(tmp_path: Path) -> None:
    page = own(written(whole(tmp_path / "run"), tmp_path))
    order = ("decision", "evidence", "trials", "objective", "latencies", "limits", "knobs", "importance", "crashes",
             "time", "repairs", "versions", "commands", "words")  # fmt: skip

    places = [page.index(f'id="{name}"') for name in order]
    assert places == sorted(places)


def test_recorded_text_is_escaped(tmp_path: Path) -> None:
    made = Made(tmp_path / "run", model=f"some/{EVIL}")
    made.search(3, crashes=False)
    for seqs in (5, 6):
        made.crash({**INCUMBENT, "max_num_seqs": seqs}, Category.STARTUP_FAILURE, f"ValueError: {EVIL}")
    made.add(made.plan(refusal=f"no room for {EVIL}"), None)
    page = own(written(made.close(), tmp_path))

    assert "<img" not in page
    assert page.count("<script>") == 1  # the page's own
    assert "&lt;script&gt;document.title" in page


def test_no_secret_is_in_it(tmp_path: Path) -> None:
    page = written(whole(tmp_path / "run", 5), tmp_path)

    for secret in ("hf_thisIsASecret", "topsecret", "Authorization: Bearer"):
        assert secret not in page


def test_the_report_has_no_external_references(tmp_path: Path) -> None:
    page = own(written(whole(tmp_path / "run", 5), tmp_path))

    assert not re.findall(r"""src\s*=|href\s*=(?!"#)|url\(|@import|https?://""", page)


def test_500_trials_take_seconds_and_stay_small(tmp_path: Path) -> None:
    state = whole(tmp_path / "run", 500)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    page = written(state, tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)

    # CPU time, which does not depend on other load.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30
    assert len(page) < MAX_BYTES_OF_500
    assert len(re.findall(r'<td class="number" data-label="trial">', page)) >= 500


def test_an_empty_journal_is_one_clear_line(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    done = sloguard("report", tmp_path, "-o", tmp_path / "report.html")

    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "no tuning run was recorded yet" in done.stderr
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["state", "sloguard.yaml", "state/journal.sqlite"])
def test_the_state_may_be_named_in_three_ways(tmp_path: Path, name: str) -> None:
    whole(tmp_path, 3)
    done = sloguard("report", tmp_path / name, "-o", tmp_path / "report.html")

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()


def test_the_commands_of_the_report_exist(tmp_path: Path) -> None:
    page = own(written(whole(tmp_path / "run"), tmp_path))
    lines = re.findall(r"<pre[^>]*>(sloguard [^<]*)</pre>", page)

    assert {line.split()[1] for line in lines} == {"tune", "rollback", "history", "trials"}
    for line in lines:
        words = line.split()
        shown = sloguard(words[1], "--help").stdout
        assert all(word in shown for word in words if word.startswith("--"))


def test_a_link_of_another_user_is_not_followed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a link to another user")
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    link.symlink_to(target)
    write_whole(link, "ours")
    assert target.read_text() == "ours"
    os.lchown(link, 12345, 12345)
    with pytest.raises(OSError, match="it is a symlink owned by another user"):
        write_whole(link, "theirs")
    assert (target.read_text(), link.is_symlink()) == ("ours", True)
