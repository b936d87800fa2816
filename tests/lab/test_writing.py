"""Numbers, symbols and tables as a reader meets them."""

import pytest

from bilevel_core.lab import plots, report
from bilevel_core.lab.writing import markup, readable, strip, symbols


@pytest.mark.parametrize(
    "python, reader",
    [
        ("-9.74", "−9.74"),
        ("-0.00", "0.00"),
        ("-0.00 ± 0.40", "0.00 ± 0.40"),
        ("+0.35", "+0.35"),
        ("1e+04", "10⁴"),
        ("-1e-05", "−10⁻⁵"),
        ("+1e+06", "+10⁶"),
        ("9.40e-06", "9.40 × 10⁻⁶"),
        ("Algorithm 6, γ = 1e+06", "Algorithm 6, γ = 10⁶"),
        ("-(x - 1)², -E[r_up], -∞", "−(x − 1)², −E[r_up], −∞"),
        ("2026-11-27, 5-10, half-width, 8-bit", "2026-11-27, 5-10, half-width, 8-bit"),
        ("commit 12345e67, 5e412abc", "commit 12345e67, 5e412abc"),
    ],
)
def test_python_s_numbers_become_a_reader_s(python, reader):
    assert readable(python) == reader


@pytest.mark.parametrize(
    "code, symbol",
    [
        ("abar_T", "ᾱ_{T}"),
        ("rank of abar", "rank of ᾱ"),
        ("∇L_gamma and p_star", "∇L_{γ} and p_{∗}"),
        ("error of x_s per error of eps_hat", "error of x_{s} per error of ε̂"),
        ("KL_path,γ − KL_path,*", "KL_{path,γ} − KL_{path,*}"),
        ("theta_gamma absorbs f", "θ_{γ} absorbs f"),
        ("L_{γ}", "L_{γ}"),
        ("q_grad_forward of lam_grad_penalty", "q_grad_forward of lam_grad_penalty"),
    ],
)
def test_names_of_the_code_become_symbols(code, symbol):
    assert symbols(code) == symbol


def test_markup_escapes_and_strips():
    assert markup("p_{0} < x^{2}", True) == "p<sub>0</sub> &lt; x<sup>2</sup>"
    assert strip("p_{0} < x^{2}") == "p_0 < x^2"


def test_a_table_is_written_for_readers_everywhere():
    rows = [{"a": -1e-9, "b": -0.5, "c": 20000, "d": (-0.0004, -0.25, 0.2492), "e": "-0.00", "f": True}]
    table = plots.Table(
        rows,
        {"a": "abar_T", "b": "-E[r_up]", "c": "n", "d": "gap", "e": "L_gamma", "f": "p_0 < 1"},
        tier="exact",
        note="step 1e-4, γ = 1e+04",
        formats={"d": plots.interval},
    )
    assert table.body == [["−10⁻⁹", "−0.5", "20,000", "0.00 ± 0.25", "0.00", "True"]]
    page = table._repr_html_()
    for text in ("ᾱ<sub>T</sub>", "−E[r<sub>up</sub>]", "L<sub>γ</sub>", "p<sub>0</sub> &lt; 1", "step 10⁻⁴, γ = 10⁴"):
        assert f"{text}</" in page
    assert "ᾱ_T" in repr(table) and "{" not in repr(table)


def test_integers_keep_their_digits_and_floats_four():
    assert [plots.number(value) for value in (12345678, 1234.5678, 1e-16, "as it is", False)] == [
        "12,345,678",
        "1235",
        "10⁻¹⁶",
        "as it is",
        "False",
    ]
    assert plots.interval((-0.116, -0.167, -0.065)) == "−0.116 ± 0.051"


def test_a_table_of_sentences_is_written_the_same_way():
    table = report.ProseTable([{"a": "errors\n-0.1, 1.6e-03, r_up"}], {"a": "abar_T"}, tier="exact", note="γ = 1e+06")
    page = table._repr_html_()
    for text in ("−0.1, 1.6 × 10⁻³, r<sub>up</sub>", "ᾱ<sub>T</sub>", "γ = 10⁶"):
        assert text in page
