"""A relative link in a document leads to a file of the repository."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("[a-z]*/**/*.md")]
CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)
OUTSIDE = re.compile(r"https?:|mailto:")
LINK = re.compile(r"\]\(<?([^)\s>]+)")


def broken_links(document: Path) -> list[str]:
    """Targets of relative links that are not there; links in code and to the outside are not read."""
    targets = LINK.findall(CODE.sub("", document.read_text(encoding="utf-8")))
    inside = [target.partition("#")[0] for target in targets if not OUTSIDE.match(target)]
    return [file for file in inside if file and not (document.parent / file).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_somewhere(document: Path) -> None:
    assert not broken_links(document)


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# There")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#part) [c](#here) [d](https://example.org/x) ![e](gone.png)\n"
        "`hooks[i](module)`\n```python\ntable[phase](unit)\n```\n[f](gone/too.md#part 'title')\n"
    )
    assert broken_links(page) == ["gone.png", "gone/too.md"]


def literals() -> list[str]:
    """Every piece of text in the sources, as Python joins it."""
    found = []
    for path in (REPOSITORY / "src").rglob("*.py"):
        tree = ast.parse(path.read_text())
        found += [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
    return found


def test_the_errors_of_the_faq_are_those_of_the_sources() -> None:
    messages = re.findall(r"^\*\*`(.+?)`\*\*", (REPOSITORY / "docs/faq.md").read_text(), flags=re.MULTILINE)
    assert len(messages) > 10
    known = literals()
    for message in messages:
        for part in filter(None, (part.strip() for part in message.split("..."))):
            assert any(part in literal for literal in known), part
