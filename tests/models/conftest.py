"""`pytest tests/models/test_parity.py --families=docs/families.md` writes what passed there as a table."""

from pathlib import Path

import pytest

OUTCOMES: dict[str, dict[str, str]] = {}


def pytest_addoption(parser):
    parser.addoption("--families", metavar="FILE", help="write the table family x capability between the marks of FILE")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark, arch = item.get_closest_marker("capability"), getattr(item, "callspec", None) and item.callspec.params.get("arch")
    if mark and arch and (report.when == "call" or report.outcome != "passed"):
        OUTCOMES.setdefault(arch, {})[mark.args[0]] = {"passed": "yes", "skipped": "–"}.get(report.outcome, "NO")


def pytest_sessionfinish(session):
    path = session.config.getoption("--families", None)
    if not path:
        return
    columns = list(dict.fromkeys(c for row in OUTCOMES.values() for c in row))
    lines = ["| family | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    lines += [f"| {arch} | " + " | ".join(row.get(c, "not run") for c in columns) + " |" for arch, row in OUTCOMES.items()]
    text = Path(path).read_text()
    start, end = "<!-- families -->\n", "<!-- /families -->"
    before, after = text.split(start)[0], text.split(end)[1]
    Path(path).write_text(before + start + "\n".join(lines) + "\n" + end + after)
