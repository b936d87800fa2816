"""Claims about full size."""

from __future__ import annotations

import math

from .rules import (
    NOT_REPRODUCED,
    PARTLY,
    REPRODUCED,
    SIZE,
    UNTESTED,
    Finding,
    NoData,
    Records,
    claim,
    outperforms,
    shown,
)
from .schedule import SCHEDULES, race, race_verdict


@claim(
    "stable-diffusion",
    SIZE,
    "08_stable_diffusion#the-full-run",
    "On Stable Diffusion, with CLIP or HPSv2 as the reward, learning λ outperforms existing fine-tuning and search.",
    "All five stages on a tiny pipeline with random weights and on digits; the full run wants a GPU and Stable "
    "Diffusion's weights.",
    "08_digits.json",
)
def _stable_diffusion(records: Records) -> Finding:
    name = "08_stable_diffusion"
    if name not in records:
        rows = records["08_digits"]["data"]["rows"]
        ran = f"the same code ran on digits: {len(rows)} rows"
        return Finding(
            ran, "–", UNTESTED, "the full run has left no result yet: Stable Diffusion's weights were not at hand"
        )
    record, verdicts, said = records[name], {}, []
    rows = record["data"]["rows"]
    for rival in dict.fromkeys(row["method"] for row in rows if row["method"] not in ("none", "Algorithm 2")):
        texts = [row["prompt"] for row in rows if row["method"] == rival]
        cells = {(row["method"], row["prompt"]): row for row in rows}
        gaps = []
        for text in texts:
            a, b = cells[rival, text], cells["Algorithm 2", text]
            gap, error = a["up"] - b["up"], 1.96 * math.hypot(a["up_se"], b["up_se"])
            gaps.append("worse" if gap < -error else "better" if gap > error else "tie")
        verdicts |= {f"{rival}, {text}": v for text, v in zip(texts, gaps, strict=True)}
        said.append(f"{rival}: {gaps.count('worse')} of {len(gaps)} prompts worse")
    return Finding("; ".join(said), record["tier"], *outperforms(verdicts))


@claim(
    "memory",
    SIZE,
    "08_stable_diffusion#does-it-fit",
    "The method is practical at full size: a guided step of Stable Diffusion fits on one GPU.",
    "Stable Diffusion 1.5 at 512×512 with random weights, float16: bytes alive, counted on fake tensors, and a step "
    "measured on a GPU where there was one.",
    "08_memory.json",
    "08_memory_full.json",
)
def _memory(records: Records) -> Finding:
    record = records["08_memory_full" if "08_memory_full" in records else "08_memory"]
    rows = [row for row in record["data"]["rows"] if (row["side"], row["dtype"]) == (512, "float16")]
    measured = [row["measured"]["peak"] for row in rows if row["measured"]] if record["data"]["device"] != "cpu" else []
    counted = [row["counted"]["peak"] for row in rows if row["counted"]]
    if not measured and not counted:
        raise NoData("no data: no row at 512, float16")
    peak, small = min(measured or counted), 15.0  # GiB of a T4 that torch can use
    verdict = NOT_REPRODUCED if peak > small else REPRODUCED if measured else PARTLY
    why = f"reproduced where it fits {small:g} GiB by a measurement on a GPU, partly where only a count says so"
    how = f"measured on {record['provenance']['hardware']['gpu']}" if measured else "counted"
    how += f" ({min(counted):.1f} counted)" if measured and counted else ""
    return Finding(f"{peak:.1f} GiB with every block recomputed, {how}", record["tier"], verdict, why)


@claim(
    "mnist-28",
    SIZE,
    "07_noise_schedule_mnist#at-2828",
    "The schedule experiment on MNIST at 28×28.",
    "The race of chapter 7 on a GPU, where there was one; else at 8×8 only.",
    "07_noise_schedule_mnist.json",
)
def _mnist_28(records: Records) -> Finding:
    name = "07_noise_schedule_mnist_full"
    small = records["07_noise_schedule_mnist"]
    if name not in records:
        ran = f"at 8×8: {len(small['data']['rows'])} marks"
        return Finding(ran, "–", UNTESTED, "the full run has left no result yet")
    record = records[name]
    steps = record["protocol"]["plan"]["val_steps"]
    ran = {row["method"] for row in record["data"]["rows"]}
    gaps = {rival: race(record, rival, steps) for rival in SCHEDULES if rival in ran}
    said = "Fréchet distance, rival minus ours: " + "; ".join(f"{n} {shown(g)}" for n, g in gaps.items())
    verdicts = {n: race_verdict(g) for n, g in gaps.items()}
    before = small["protocol"]["plan"]["val_steps"]
    same = sum(race_verdict(race(small, n, before)) == verdict for n, verdict in verdicts.items())
    said += f"; {same} of {len(verdicts)} rivals are judged as at 8×8"
    return Finding(said, record["tier"], *outperforms(verdicts))
