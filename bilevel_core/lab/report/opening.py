"""The head of the report in words: the answer in three sentences, claims by number, a letter to the authors."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..writing import strip, written
from .rules import CODE, METHOD, NOT_REPRODUCED, PARTLY, PARTS, REPRODUCED, SIZE, UNTESTED, VERDICTS, Claim

SEARCHES = ("grid", "random", "bayesian")


def numbered(found: Iterable[Claim]) -> dict[str, int]:
    """Number of each claim, by its id: from 1, part by part as the tables stand."""
    by_part = sorted(found, key=lambda claim: PARTS.index(claim.part))
    return {claim.id: i for i, claim in enumerate(by_part, 1)}


def label(id: str) -> str:
    """What a claim is called where there is room for a few words: "lambda-vs-grid" -> "λ vs grid"."""
    names = {"-vs-": " vs ", "mnist-28": "MNIST 28×28", "stable-diffusion": "Stable Diffusion", "bayesian": "Bayesian"}
    for text, said in names.items():
        id = id.replace(text, said)
    id = re.sub(r"\b(lambda|gamma|algorithm|schedule|released|penalty|bilevel|fixed|weighted)-", r"\1 ", id)
    return id.replace("lambda", "λ").replace("gamma", "γ").replace("algorithm", "Algorithm")


def answer(found: Sequence[Claim]) -> str:
    """Three sentences of Markdown: how many claims came out how, whether learning beats searching, what the code is."""
    verdict = {claim.id: claim.verdict for claim in found}
    counted = Counter(verdict.values())
    said = ", ".join(f"**{counted[name]} {name}**" for name in VERDICTS if counted[name])
    method, code = ([claim.verdict for claim in found if claim.part == part] for part in (METHOD, CODE))
    of_method, of_code = method.count(REPRODUCED), code.count(REPRODUCED)
    hand = next(claim for claim in found if claim.id == "schedule-vs-hand")
    by_hand = {REPRODUCED: "and it beats", UNTESTED: "and nothing is known here of"}.get(hand.verdict, "but not")
    name = "things" if len(code) > 1 else "thing"
    released = f"Of {len(code)} {name} that the *released code* takes for granted, {of_code or 'none'} hold"
    released += "s" * (of_code < 2) + (": it is another method." if not of_code else ".")
    numbers = f"({hand.ours})"
    return (
        f"**The answer.** Of {len(found)} claims: {said}; of the {len(method)} about the method itself {of_method} "
        f"hold as they stand. At equal cost, learning the strength λ {_beats(verdict, 'lambda')}; learning a noise "
        f"schedule {_beats(verdict, 'schedule')}, {by_hand} one number changed by hand where all of the cost goes into "
        f"training {numbers}. {released}"
    )


def _beats(verdict: dict[str, str], application: str) -> str:
    """ "beats all 3 searches", by the verdicts on "outperforms"."""
    against = [verdict[f"{application}-vs-{rival}"] for rival in SEARCHES]
    if set(against) == {UNTESTED}:
        return "could not be tested against search"
    wins, some = against.count(REPRODUCED), against.count(PARTLY)
    if wins == len(against):
        return f"beats all {wins} searches"
    said = f"beats {wins or 'none'} of {len(against)} searches throughout"
    return said + (f" and {some} in part" if some else "")


def letter(found: Sequence[Claim]) -> str:
    """A letter to the paper's authors with what was found, in Markdown, for whoever can send it."""

    def lines(part: str, *verdicts: str) -> str:
        chosen = [claim for claim in found if claim.part == part and claim.verdict in verdicts]
        return "\n".join(f"- {claim.claim} *{claim.verdict}*: {strip(written(claim.ours))}." for claim in chosen)

    return f"""Dear authors of *A First-order Generative Bilevel Optimization Framework for Diffusion Models*,

we have written a book of notebooks that derives your algorithms, runs them on problems with known answers and on MNIST,
and compares each claim with a stated rule. We had your abstract and your released code, not the text of the paper. All
numbers of the book can be rerun. We would like to know where we are wrong.

**What held:**

{lines(METHOD, REPRODUCED)}

**What did not, or not fully:**

{lines(METHOD, PARTLY, NOT_REPRODUCED)}

**What the code of the repository does, as released:**

{lines(CODE, *VERDICTS)}

The two that matter most: the optimiser of the second network holds the parameters of a network that was replaced, so
that the bilevel term is zero; and the estimator called est1 has the arguments of both divergences swapped.

**What we could not test:**

{lines(SIZE, UNTESTED)}

**Our questions:**

1. Is the repository the code behind the tables? If not, can that code be released, with its configuration files?
2. Which way round do the divergences stand in equation (13), and is the penalised reward r₂ + r₁/γ?
3. Which γ, δ and step sizes made the tables, and how were they chosen?
4. From how many images is the FID, against which split, and were candidates chosen by the split that is reported?
5. In which range do images reach CLIP, and does its score guide or only judge?
6. How many seeds and prompts stand behind Table 1, and how was execution time measured?

We shall correct what you show us to be wrong, and say so.
"""
