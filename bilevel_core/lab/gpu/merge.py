"""Turns finished pieces into results of the tier "full", with the provenance of where they ran."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import parameters, results
from ..studies import memory, schedule_race, tilted_truth
from . import pieces, plan


def merge(
    work: Path,
    sources: Sequence[Path] = (),
    directory: str | Path | None = None,
    only: Sequence[str] | None = None,
) -> list[Path]:
    """Writes what the pieces suffice for and returns the paths; says of the rest what is missing.

    sources  packs to unpack first: of a piece that several hold, the first counts, and what `work` holds before all
    only     names of the pieces that are merged (* stands for anything), None: all
    Raises ValueError where there are smoke pieces, pieces of other parameters, or nothing to write.
    """
    for source in sources:
        plan.unpack(source, work)
    found = {path.stem: json.loads(path.read_text()) for path in sorted((work / "pieces").glob("*.json"))}
    if only is not None:
        found = {name: piece for name, piece in found.items() if any(fnmatch.fnmatch(name, own) for own in only)}
    if not found:
        named = f" called {' or '.join(only)}" if only else ""
        raise ValueError(f"no pieces{named} in {work}: run `make gpu` first, or name a pack by --from")
    smoke = [name for name, piece in found.items() if piece["config"]["smoke"]]
    if smoke:
        raise ValueError(
            f"{', '.join(smoke)} in {work} are smoke pieces, whose numbers mean nothing: they are no result"
        )
    wanted = {piece.name: piece for piece in pieces.all_pieces()}
    for name, piece in found.items():
        if name not in wanted or piece["config"]["settings"] != plan.identity(wanted[name], False)["settings"]:
            commit = str(piece["provenance"]["commit"])[:12]
            raise ValueError(
                f"piece {name} in {work} is not of this plan's parameters: check out the commit that made it, "
                f"{commit}, or merge others by --only"
            )
    made = {"checks": _checks, "sd15": _memory, "throughput": _speed, "tilts": _tilts, "race28": _race}
    for name in found:
        if name.split("-")[0] not in made:
            print(f"{name}: left aside, no result is made of it")
    paths = [write(found, directory) for write in made.values()]
    return [path for path in paths if path]


def ran(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The provenance of pieces together: that of the last, altered if any was, with every commit and card, and seconds
    of each piece."""
    each = sorted((part["provenance"] for part in parts), key=lambda one: one["date"])
    last = dict(each[-1])
    commits = sorted({str(one["commit"]) for one in each})
    cards = sorted({f"{one['hardware']['gpu']}, driver {one['driver']}" for one in each})
    dirty = [one["dirty"] for one in each]
    last["dirty"] = True if any(dirty) else None if None in dirty else False
    seconds = {part["config"]["name"]: part["wall_s"] for part in parts}
    return last | {"commits": commits, "cards": cards, "first": each[0]["date"], "pieces": seconds}


def _say(name: str, why: str) -> None:
    print(f"{name}: not written, {why}")


def _race(found: Mapping[str, Any], directory: str | Path | None) -> Path | None:
    """Chapter 7 at 28x28, in the form of its notebook, of the seeds that have every method that is compared."""
    name = "07_noise_schedule_mnist_full"
    parts = {key: part for key, part in found.items() if key.startswith("race28-")}
    rows = [row for part in parts.values() for row in part["result"].get("rows", ())]
    have: dict[int, set[str]] = {}
    for row in rows:
        if row["budget"] == "final":
            have.setdefault(row["seed"], set()).add(row["method"])
    seeds = sorted(seed for seed, methods in have.items() if methods >= set(pieces.NEEDED))
    if len(seeds) < 3:
        missing = {
            seed: sorted(set(pieces.NEEDED) - have.get(seed, set())) for seed in pieces.SEEDS if seed not in seeds
        }
        return _say(name, f"three seeds need every method; missing are {missing}")
    # In the order of chapter 7's own run: a method for which a seed is missing is left out, that pairs stay pairs.
    kinds = {(row["method"], row["budget"]) for row in rows}
    whole = {
        kind for kind in kinds if {row["seed"] for row in rows if (row["method"], row["budget"]) == kind} >= set(seeds)
    }
    rows = [row for row in rows if row["seed"] in seeds and (row["method"], row["budget"]) in whole]
    order = {method: i for i, method in enumerate((*schedule_race.METHODS, "Algorithm 6, own weights"))}
    rows.sort(key=lambda row: (row["budget"], row["seed"], order[row["method"]], row["split"], row["steps"]))
    methods = {row["method"] for row in rows}
    searches = [one for part in parts.values() for one in part["result"].get("searches", ())]
    searches = [one for one in searches if one["seed"] in seeds and one["method"] in methods]
    searches.sort(key=lambda one: (order[one["method"]], one["seed"]))
    used = [part for part in parts.values() if _seeds(part) <= set(seeds)]
    trained = {(row["method"], row["budget"], row["seed"]): row["train_cost"] for row in rows}
    cost = sum(trained.values()) + sum(row["cost"] for row in rows) + sum(one["cost"] for one in searches)
    race = schedule_race.Race(pieces.RACE, Path())
    switches = [part["provenance"]["switches"] for part in used]
    if any(other != switches[0] for other in switches):
        raise ValueError(f"pieces of the race ran with several switches of torch, {switches}: leave some out by --only")
    protocol = race.protocol() | {"switches": switches[0]}
    P = parameters.read_profile("07_noise_schedule_mnist", "full")
    own = pieces.RACE
    P |= {"study_seeds": len(seeds), "ablation_seeds": 0, "study_name": own.name, "T": own.T, "trials": own.trials}
    P |= {"batch_size": own.batch_size, "warm_steps": own.warm_steps, "trial_steps": own.trial_steps}
    P |= {"val_samples": own.n_val, "val_steps": own.val_steps, "final_steps": own.final_steps}
    P |= {"study_samples": own.n, "study_grids": list(own.grids)}
    return results.write_result(
        name,
        "full",
        {"searches": searches, "rows": rows, "ablation": []},
        P,
        seeds=seeds,
        wall_s=sum(part["wall_s"] for part in used),
        cost=cost,
        protocol=protocol,
        ran=ran(used),
        directory=directory,
    )


def _tilts(found: Mapping[str, Any], directory: str | Path | None) -> Path | None:
    """The exact tilts of every test prompt, each with its certificate."""
    name, parts = "05_curves_full", {key: part for key, part in found.items() if key.startswith("tilts-")}
    rows = {part["result"]["prompt"]: part["result"] for part in parts.values()}
    missing = [prompt for prompt in tilted_truth.TEST if prompt not in rows]
    if missing:
        return _say(name, f"missing are {', '.join(missing)}")
    keys = ("prompt", "down_to", "levels", "curve")
    return results.write_result(
        name,
        "full",
        {"prompts": [{key: rows[prompt][key] for key in keys} for prompt in tilted_truth.TEST]},
        {},
        seeds=[0],
        wall_s=sum(part["wall_s"] for part in parts.values()),
        cost=sum(row["cost"] for row in rows.values()),
        protocol=pieces.TRUTH | {"ladder": list(tilted_truth.LADDER[1:]), "saturation": tilted_truth.SATURATION},
        ran=ran(list(parts.values())),
        directory=directory,
    )


def _seeds(part: Mapping[str, Any]) -> set[int]:
    found = part["result"]
    return {row["seed"] for row in (*found.get("rows", ()), *found.get("searches", ()), found) if "seed" in row}


def _checks(found: Mapping[str, Any], directory: str | Path | None) -> Path | None:
    """How many tests passed on the device, and what the others said."""
    name = "08_checks_full"
    if "checks" not in found:
        return _say(name, "the piece checks is missing")
    part = found["checks"]
    data = {key: part["result"][key] for key in ("passed", "skipped")}
    data["failed"] = {
        test: [line[1:].strip() for line in text.splitlines() if line.startswith("E  ")]
        for test, text in part["result"]["failures"].items()
    }
    return results.write_result(
        name,
        "full",
        data,
        {},
        seeds=[0],
        wall_s=part["wall_s"],
        cost=0,
        protocol="the tests of tests/gpu marked cuda, each against the CPU's numbers, without TF32",
        ran=ran([part]),
        directory=directory,
    )


def _memory(found: Mapping[str, Any], directory: str | Path | None) -> Path | None:
    """Chapter 8's table of memory, measured on the GPU at full size, with a capped sample, particles and stages."""
    name, parts = "08_memory_full", {key: part for key, part in found.items() if key.startswith("sd15-")}
    recorded = results.read_result("08_memory")["data"]["rows"]
    counts = [({k: v for k, v in row.items() if k not in ("counted", "measured")}, row["counted"]) for row in recorded]
    measured = [part["result"] for part in parts.values() if "measured" in part["result"]]
    order = [options for options, _ in memory.SETTINGS]
    rows = []
    for one in sorted(measured, key=lambda one: order.index(one["options"])):
        counted = next((count for its, count in counts if its == one["options"]), None)
        rows.append(one["options"] | {"counted": counted, "measured": one["measured"]})
    if not rows:
        return _say(name, "no setting of Stable Diffusion is measured")
    data: dict[str, Any] = {"rows": rows, "device": "cuda"}
    for key in ("sample", "particles"):
        if f"sd15-{key}" in parts:
            data[key] = parts[f"sd15-{key}"]["result"]
    data["stages"] = [parts[key]["result"] for key in sorted(parts) if key.startswith("sd15-stages")]
    protocol = {
        "model": "Stable Diffusion 1.5, random weights; ViT-B/16 reward",
        "counted": "of 08_memory: bytes alive, one guided step on fake tensors, CPU kernels",
        "measured": "median of three steps; peak is what torch's allocator held at most",
        "cap": f"torch may take {pieces.CAP:g} GB in the sample's process",
    }
    return results.write_result(
        name,
        "full",
        data,
        {"prompts": list(pieces.PROMPTS)},
        seeds=[0],
        wall_s=sum(part["wall_s"] for part in parts.values()),
        cost=0,
        protocol=protocol,
        ran=ran(list(parts.values())),
        directory=directory,
    )


def _speed(found: Mapping[str, Any], directory: str | Path | None) -> Path | None:
    """Training throughput of the 28x28 network."""
    name = "07_throughput_full"
    if "throughput" not in found:
        return _say(name, "the piece throughput is missing")
    parts = {key: part for key, part in found.items() if key.startswith("throughput")}
    data = {key: value for key, value in parts["throughput"]["result"].items() if key != "said"}
    data |= {key.removeprefix("throughput-"): part["result"] for key, part in parts.items() if "-" in key}
    protocol = {
        "step": "forward, backward, AdamW on random data; ours: train_score with its moving average, batch by batch",
        "flops": "torch.utils.flop_counter, forward and backward",
        "roofline": "of the network in float32, and in bfloat16 where it is said: the larger of FLOP over the rate of "
        "a bfloat16 product of 8192 and bytes of all operations over the rate of a copy, as a share of the time taken",
    }
    return results.write_result(
        name,
        "full",
        data,
        {"size": data["size"]},
        seeds=[0],
        wall_s=sum(part["wall_s"] for part in parts.values()),
        cost=0,
        protocol=protocol,
        ran=ran(list(parts.values())),
        directory=directory,
    )
