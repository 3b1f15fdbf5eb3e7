"""Links of the documentation lead somewhere, in the repository and on the built site."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/benchmarks/*.md")])
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)]*)?\)")
LEFT_OUT = [ROOT / "docs" / "benchmarks", ROOT / "docs" / "examples"]  # see exclude_patterns of docs/conf.py


def links(page: Path) -> list[str]:
    """Targets of the page's links, outside code."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return [target for target in LINK.findall(text) if "://" not in target]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    missing = [target for target in links(page) if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == ROOT / "docs"], ids=lambda page: page.name)
def test_pages_of_the_site_link_to_pages_of_the_site(page: Path) -> None:
    targets = [(page.parent / target).resolve() for target in links(page)]
    outside = [target for target in targets if target.suffix == ".md" and (target.parent in LEFT_OUT or target.parent == ROOT)]
    assert not outside


def test_the_search_for_links_finds_some() -> None:
    assert "docs/tutorial.md" in links(ROOT / "README.md")
