"""What of the paper and of its released code is reproduced: each claim's verdict, computed from `book/results`.

A file for each part registers its claims, in the order of the report; `claims` judges them.
"""

from . import size
from .entropy import FINETUNING
from .method import absorbed, guided_bias, lam_root, learned_exactly
from .opening import answer, label, letter, numbered
from .paper import FIELDS, TRUST, VALUE_IDS, PaperSource, PaperValue, paper_column, paper_sources, paper_values
from .rules import (
    NOT_REPRODUCED,
    PARTLY,
    PARTS,
    REPRODUCED,
    UNTESTED,
    VERDICTS,
    Claim,
    Finding,
    NoData,
    Records,
    claims,
    counts,
    outperforms,
    paired,
    shown,
    sign,
    without_seed,
)
from .runs import estimates, machines, searches, spent
from .schedule import SCHEDULES, race, released_bill
from .tables import MARKS, Board, ProseTable, href, place

__all__ = [
    "FIELDS",
    "FINETUNING",
    "MARKS",
    "NOT_REPRODUCED",
    "PARTLY",
    "PARTS",
    "REPRODUCED",
    "SCHEDULES",
    "TRUST",
    "UNTESTED",
    "VALUE_IDS",
    "VERDICTS",
    "Board",
    "Claim",
    "Finding",
    "NoData",
    "PaperSource",
    "PaperValue",
    "ProseTable",
    "Records",
    "absorbed",
    "answer",
    "claims",
    "counts",
    "estimates",
    "guided_bias",
    "href",
    "label",
    "lam_root",
    "learned_exactly",
    "letter",
    "machines",
    "numbered",
    "outperforms",
    "paired",
    "paper_column",
    "paper_sources",
    "paper_values",
    "place",
    "race",
    "released_bill",
    "searches",
    "shown",
    "sign",
    "size",
    "spent",
    "without_seed",
]
