"""Every relative link leads somewhere."""

from __future__ import annotations

import re

import pytest
from docs_pages import ROOT, Page, anchor_of, pages

LINKS = [
    (page, target)
    for page in pages()
    for target in re.findall(r"\]\(([^)\s]+)\)", page.prose)
    if not re.match(r"[a-z]+:", target)
]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=[f"{page.name}->{target}" for page, target in LINKS])
def test_a_relative_link_leads_to_a_file_and_its_heading(page: Page, target: str) -> None:
    file, _, anchor = target.partition("#")
    path = (page.path.parent / file).resolve() if file else page.path
    assert path.exists(), f"{page.name} links to {file}, which is not there"
    assert path.is_relative_to(ROOT), f"{page.name} links out of the project: {file}"
    if anchor:
        assert anchor in Page(path).anchors, f"{page.name} links to #{anchor}, which {file} does not have"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.suffix == ".md":
            reached.add(path)
            waiting += [
                (path.parent / target.split("#")[0]).resolve()
                for page, target in LINKS
                if page.path == path and target.split("#")[0]
            ]
    assert {page.path for page in pages()} <= reached


def test_paths_of_the_package_that_pages_name_exist() -> None:
    for page in pages():
        for code in page.inline_code:
            if re.fullmatch(r"(knode|tests|benchmarks|docs|simulations)/[\w./-]*", code):
                assert (ROOT / code).exists(), f"{page.name} names {code}"


def test_anchors_are_made_as_github_makes_them() -> None:
    assert anchor_of("8. Errors") == "8-errors"
    assert anchor_of("knode task submit") == "knode-task-submit"
    assert anchor_of("What is there, and `not`") == "what-is-there-and-not"
