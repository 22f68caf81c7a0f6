"""The chart's README is what its values say, and every value is described."""

from __future__ import annotations

from tests.helm import readme


def test_the_readme_is_fresh() -> None:
    assert readme.README.read_text(encoding="utf-8") == readme.render(), "run make helm-readme"


def test_every_value_is_described() -> None:
    assert readme.undocumented() == []
