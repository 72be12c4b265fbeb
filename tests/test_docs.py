"""What the documents say is there."""

import re

import pytest
from conftest import ROOT


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", (ROOT / "docs/reliability.md").read_text()))))
def test_test_that_the_table_of_faults_names_exists(name):
    sources = "".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    assert f"def {name}(" in sources
