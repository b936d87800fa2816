"""`python3 -m bilevel_core.lab.gpu`: runs the plan, or one of `merge`, `wheels` and, from within, `worker`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from .. import places
from . import merge, pieces, plan, wheels

LANES = 5  # more do not help: a card serves one process at a time, and a few keep it busy


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bilevel_core.lab.gpu", description=plan.__doc__)
    parser.add_argument("what", nargs="?", default="run", choices=("run", "merge", "wheels", "worker"))
    parser.add_argument("folder", nargs="?", help="of wheels: where they go")
    parser.add_argument("--minutes", type=float, default=8.0, help="of time; pieces that do not fit are not started")
    parser.add_argument("--out", help="folder for the pack of results; default the variable OUT, else _runs/gpu/pack")
    parser.add_argument("--work", help="folder for what is kept between calls; default _runs/gpu")
    parser.add_argument("--from", dest="sources", nargs="+", default=[], metavar="PACK", help="of earlier calls")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these pieces alone; * stands for anything")
    parser.add_argument("--data", help="folder with MNIST/raw; default the variable BILEVEL_DATA")
    parser.add_argument("--lanes", type=int, default=0, help="pieces at a time of those that may share the card")
    parser.add_argument("--dry", action="store_true", help="prints the plan and ends")
    parser.add_argument("--keep", action="store_true", help="counts pieces of other code as finished")
    parser.add_argument("--smoke", action="store_true", help="every piece at a tiny size, on the CPU")
    parser.add_argument("--results", help="of merge: a folder other than book/results")
    args = parser.parse_args(arguments)
    if args.data:
        os.environ["BILEVEL_DATA"] = str(Path(args.data).resolve())
    work = Path(args.work) if args.work else places.work_dir() / ("gpu_smoke" if args.smoke else "gpu")
    work = work.resolve()
    try:
        return _do(args, work)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2


def _do(args: argparse.Namespace, work: Path) -> int:
    if args.what == "wheels":
        if not args.folder:
            raise ValueError("wheels wants the folder that they go to: wheels DIR")
        return wheels.main(Path(args.folder))
    if args.what == "merge":
        for path in merge.merge(work, [Path(source) for source in args.sources], args.results, args.only):
            print(f"wrote {places.relative(path)}")
        return 0
    chosen = pieces.all_pieces(args.smoke)
    if args.only:
        chosen = pieces.only(chosen, args.only)
    if args.what == "worker":
        where = torch.device("cpu" if args.smoke else "cuda")
        card = None if args.smoke else plan.device()
        ran = {"driver": card and card["driver"], "switches": plan.switches()}
        plan.serve(chosen, plan.Context(work / "kept", where, args.smoke), work, ran)
        return 0
    for source in args.sources:
        print(f"{plan.unpack(Path(source), work)} files taken from {source}")
    lanes = args.lanes or (1 if args.smoke else LANES if args.dry else max(1, min(LANES, (os.cpu_count() or 2) // 2)))
    if args.dry:
        there = plan.finished(chosen, work, args.smoke, args.keep)
        print(plan.table(chosen, there, lanes, args.minutes))
        end = pieces.race_ends(plan.forecast(chosen, there, lanes), there)
        if end < float("inf"):
            print(f"three repetitions of the race are whole in minute {end:.1f}")
        return 0
    wheels.demand()
    out = Path(args.out or os.environ.get("OUT") or work / "pack").resolve()
    state = plan.run(chosen, minutes=args.minutes, work=work, out=out, smoke=args.smoke, lanes=lanes, keep=args.keep)
    return 1 if "failed" in state.values() else 0


if __name__ == "__main__":
    sys.exit(main())
