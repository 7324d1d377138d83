"""A page of docs/ becomes a page of the site: links out of docs/, and the anchors of headings."""

from __future__ import annotations

import pytest

from tools.documentation.hooks import github_anchor, outside_links

URL = "https://host/owner/iwm-fast"


@pytest.mark.parametrize(
    ("markdown", "with_repository", "without"),
    [
        ("[raw](../../kernels/x.json).", f"[raw]({URL}/blob/HEAD/kernels/x.json).", "raw (`kernels/x.json`)."),
        ("[a](../../b.md#c-d)", f"[a]({URL}/blob/HEAD/b.md#c-d)", "a (`b.md`)"),
        ("[`kernels/`](../../kernels)", f"[`kernels/`]({URL}/blob/HEAD/kernels)", "`kernels/`"),
        ("[a](data.md#b)", None, None),
        ("[a](../concepts.md)", None, None),
        ("[a](#b)", None, None),
        ("[a](https://example.org/../../b)", None, None),
        ("![a](../demo.png)", None, None),
        ("```\n[a](../../b)\n```", None, None),
        ("x\n\n```sh\n[a](../../b)\n```\n[a](../../b)", f"x\n\n```sh\n[a](../../b)\n```\n[a]({URL}/blob/HEAD/b)", None),
    ],
)
def test_links_out_of_the_documentation_lead_to_the_repository(markdown, with_repository, without):
    expected = markdown if with_repository is None else with_repository
    assert outside_links(markdown, "guides/page.md", URL) == expected
    if without is not None or with_repository is None:
        assert outside_links(markdown, "guides/page.md", "") == (without or markdown)


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("Who checks an image", "who-checks-an-image"),
        ("What `x_y` is, if any", "what-x_y-is-if-any"),
        ("A – b", "a--b"),
    ],
)
def test_headings_have_the_anchors_of_github(heading, anchor):
    assert github_anchor(heading) == anchor
