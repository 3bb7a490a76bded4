"""What the front page promises: its length, its links, its line counts and the loop that it quotes."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_a_front_page():
    assert README.count("\n") <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    local = [link for link in links if "://" not in link]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_every_page_is_reached_from_the_readme():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")}
    assert pages - set(re.findall(r"\(docs/([\w.]+)\)", README)) == set()


def test_line_counts_are_true():
    table = re.findall(r"^\| `(dit_jax/[\w/.]+\.py)` \| ([\d,]+) \|", README, re.M)
    assert len(table) >= 10
    for name, count in table:
        lines = (ROOT / name).read_text().count("\n")
        assert int(count.replace(",", "")) == pytest.approx(lines, rel=0.05, abs=5), name


def test_the_loop_is_quoted_from_the_source():
    quoted = README.split("```python\n")[1].split("```")[0]
    source = (ROOT / "dit_jax/train.py").read_text().splitlines()
    code = [line.strip() for line in source]
    place = 0
    for line in filter(None, (line.strip() for line in quoted.splitlines())):
        assert line in code[place:], line
        place = code.index(line, place) + 1
