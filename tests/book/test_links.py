"""book/links.py: what becomes a link in a page, and what stays text."""

from __future__ import annotations

import re

import pytest

import links

PAGE = '<nav>(1.2) of chapter 2</nav><article class="bd-article">{}</article><p>(1.2)</p>'
EQUATION = '<div class="math notranslate nohighlight">\n\\[ x {} \\]</div>'
GLOSSARY = """<dl><dt id="term-KID">KID<a class="headerlink" href="#term-KID">#</a></dt><dd><p>A denoiser.</p></dd>
<dt id="term-Low">Lower level, upper level<a class="headerlink"></a></dt>
<dt id="term-Eff">Effective size (ESS)<a class="headerlink"></a></dt>
<dt id="term-lam">Strength <span class="math">\\(\\lambda\\)</span><a class="headerlink"></a></dt></dl>"""
SITE = {
    "notebooks/01_one.html": PAGE.format(EQUATION.format("\\tag{1.2}") + EQUATION.format("\\tag{A}")),
    "notebooks/02_two.html": PAGE.format("<p>{}</p>"),
    "book/numbering.html": '<tr><td><p>6</p></td><td><a href="../notebooks/02_two.html">two</a></td></tr>',
    "book/api.html": '<dt id="bilevel_core.samplers.sample_ddim">',
    "book/glossary.html": PAGE.format(GLOSSARY),
}
PLACES = links.find(SITE)


def shown(text: str, page: str = "notebooks/03_three.html") -> str:
    """What a page makes of its article, with each link as [text](address)."""
    whole = links.linked(page, PAGE.format(text), PLACES)
    assert whole.startswith("<nav>(1.2) of chapter 2</nav>") and whole.endswith("<p>(1.2)</p>")
    inside = whole.partition('<article class="bd-article">')[2].partition("</article>")[0]
    return re.sub(r'<a class="reference internal" href="([^"]*)">(.*?)</a>', r"[\2](\1)", inside, flags=re.DOTALL)


@pytest.mark.parametrize(
    "text, linked",
    [
        ("by (1.2), not (1.3)", "by [(1.2)](01_one.html#eq-1.2), not (1.3)"),
        ("see\nchapter\n2.", "see\n[chapter\n2](02_two.html)."),
        ("Chapters 1, 2 and 9", "Chapters [1](01_one.html), [2](02_two.html) and 9"),
        ("Algorithm 6 and algorithm 7", "[Algorithm 6](02_two.html) and algorithm 7"),
        ("chapter 1, chapter 1", "[chapter 1](01_one.html), chapter 1"),
        ("KIDs, then a KID", "[KIDs](../book/glossary.html#term-KID), then a KID"),
        ("Its upper\nlevel", "Its [upper\nlevel](../book/glossary.html#term-Low)"),
        ("an ESS", "an [ESS](../book/glossary.html#term-Eff)"),
        ("strengths", "[strengths](../book/glossary.html#term-lam)"),
        ("kid, KIDNEY, chapter 1.5, (A)", "kid, KIDNEY, chapter 1.5, (A)"),
        ("<em>chapter 2</em> <b>(1.2)</b>", "<em>[chapter 2](02_two.html)</em> <b>[(1.2)](01_one.html#eq-1.2)</b>"),
    ],
)
def test_what_is_named_becomes_a_link(text, linked):
    assert shown(f"<p>{text}</p>") == f"<p>{linked}</p>"


@pytest.mark.parametrize(
    "text",
    [
        "<h2>Chapter 2 and (1.2)</h2>",
        "<p><a href='x'>chapter 2</a> <code>chapter 2</code> <span class=\"math x\">(1.2)</span></p>",
        "<pre>(1.2)</pre><div>KID</div><p class='caption'>chapter 2</p>",
        "<script>let p = '<p>chapter 2';</script><style>p > a {}</style><!-- <p>(1.2) -->",
        "<figcaption><p>KID in chapter 2</p></figcaption><button><p>KID</p></button>",
    ],
)
def test_what_stays_as_it_is(text):
    assert shown(text) == text


def test_chapters_and_algorithms_once_a_section_and_words_once_a_page():
    text = "<p>KID, chapter 2</p><h3>x</h3><p>chapter 2</p><h2>y</h2><p>KID, chapter 2, (1.2), (1.2)</p>"
    found = shown(text)
    assert found.count("[chapter 2]") == 2 and found.count("[KID]") == 1 and found.count("[(1.2)]") == 2


def test_no_page_leads_to_itself_but_to_its_equations():
    text = "<p>chapter 1, (1.2), (A)</p>"
    assert shown(text, "notebooks/01_one.html") == "<p>chapter 1, [(1.2)](#eq-1.2), [(A)](#eq-A)</p>"
    assert shown("<p>KID</p>", "book/glossary.html") == "<p>KID</p>"


def test_names_of_the_package_lead_to_the_reference():
    code = '<code class="docutils literal notranslate"><span class="pre">{}</span></code>'
    name = code.format("samplers.sample_ddim")
    linked = f"[{name}](../book/api.html#bilevel_core.samplers.sample_ddim)"
    other = code.format("samplers.other")
    assert shown(f"<p>{name}, {name}, {other}</p>") == f"<p>{linked}, {name}, {other}</p>"


def test_two_equations_of_one_tag_are_an_error():
    with pytest.raises(ValueError, match=r"tag 1\.2: in notebooks/01_one.html#eq-1\.2 and in notebooks/04"):
        links.find(SITE | {"notebooks/04_four.html": SITE["notebooks/01_one.html"]})


def test_a_site_is_linked_in_place(tmp_path):
    for page, text in SITE.items():
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(text.replace("{}", "as (1.2) says"))
    links.link(tmp_path)
    one, two = ((tmp_path / "notebooks" / name).read_text() for name in ("01_one.html", "02_two.html"))
    assert '<span id="eq-1.2"></span><div class="math' in one and '<span id="eq-A"></span>' in one
    assert '<p>as <a class="reference internal" href="01_one.html#eq-1.2">(1.2)</a> says</p>' in two
