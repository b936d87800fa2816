"""An explorer in a page of its own, for tests: the document, what it shows, and its values against Python's."""

from __future__ import annotations

import torch

from bilevel_core.lab.explorers import Explorer


def document(*parts: Explorer) -> str:
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return head + "<title>explorers</title><body>" + "".join(part.html() for part in parts)


def settle(page) -> None:
    """Wait until the next frame is drawn."""
    page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def shown(page, name: str) -> list[str]:
    return page.locator(f"#blx-{name} .blx-readout span:last-child").all_inner_texts()


def curve(page, name: str) -> str:
    return page.locator(f"#blx-{name} svg path").evaluate_all("(all) => all.map((p) => p.getAttribute('d')).join()")


def assert_same(ours: dict, theirs: dict, where: str) -> None:
    """The page's result equals Python's: texts exactly, numbers to 1e-6 of the size of their series."""

    def close(a, b) -> None:
        a, b = (torch.tensor(v, dtype=torch.float64).flatten() for v in (a, b))
        assert a.shape == b.shape, where
        if len(a):
            error = (a - b).abs()
            bound = 1e-6 * b.abs() + 1e-12 * b.abs().max()
            assert (error <= bound).all(), f"{where}: off by {(error / b.abs()).max():.2g}"

    assert ours.keys() == theirs.keys(), where
    for key, value in theirs.items():
        if key in ("message", "warn"):
            assert ours[key] == value, where
        elif key == "readout":
            assert [(row[0], row[2:]) for row in ours[key]] == [(row[0], row[2:]) for row in value], where
            for mine, row in zip(ours[key], value, strict=True):
                assert isinstance(mine[1], str) == isinstance(row[1], str), where
                if isinstance(row[1], str):
                    assert mine[1] == row[1], where
                else:
                    close([mine[1]], [row[1]])
        else:
            assert len(ours[key]) == len(value), where
            for mine, series in zip(ours[key], value, strict=True):
                assert mine.keys() == series.keys(), where
                for field, content in series.items():
                    if isinstance(content, str):
                        assert mine[field] == content, where
                    else:
                        close(mine[field], content)
