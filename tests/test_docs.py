"""References in the documents must exist."""

import re

import pytest

import diffit
from benchmarks import scaling
from helpers import ROOT


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", (ROOT / "docs/reliability.md").read_text()))))
def test_tests_named_in_the_table_of_faults_exist(name):
    sources = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert f"def {name}(" in sources


def test_scaling_document_matches_its_script():
    assert scaling.document() == scaling.DOCUMENT.read_text()


def test_package_lists_all_of_its_modules():
    names = {file.stem for file in (ROOT / "diffit").glob("*.py")} - {"__init__"}
    listed = set(re.findall(r"\w+", re.search(r"\n    config .*?\n\n", diffit.__doc__, re.DOTALL)[0]))
    assert names <= listed, names - listed
