"""The live figures in headless Chromium: seconds of a sweep and of a drawing, and how long the page stands still."""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import common

from bilevel_core.lab import results
from bilevel_core.lab.explorers import worker
from bilevel_core.lab.studies import live_figures

sys.path.append(str(Path(__file__).resolve().parents[1] / "book"))

# answers to a question asked so many times, and the longest time between two frames meanwhile, in ms
ASK = """async (root, [question, repeats]) => {
  let last = performance.now(), longest = 0, on = true;
  const frame = (now) => { longest = Math.max(longest, now - last); last = now; if (on) requestAnimationFrame(frame); };
  requestAnimationFrame((now) => { last = now; requestAnimationFrame(frame); });
  const times = [];
  for (let k = 0; k < repeats + 1; k += 1) times.push((await root.explorer.ask({ ...question, k: 9 })).ms);
  on = false;
  return [times.slice(1), longest];
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="times that everything is measured, after one run")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    from browser import chromium

    machine = results.hardware()
    print("live figures, in a worker of one thread")
    print(f"hardware:  {machine['cpu']}, {machine['cores']} cores ({machine['platform']}); {args.repeats} repeats")
    common.print_row("figure", "what", "aim (s)", "seconds", "still (ms)", "MB")
    pull, grid = live_figures.pull(), live_figures.grid()
    ten = [0.15 * (k + 1) for k in range(10)]
    stretch = grid.data["stretch"]
    questions = [
        (pull, "8 chains x 10 steps, guided: a sweep", 2.0, {"ask": "sweep", "lam": 1.0, "warmup": 0}),
        (grid, "64 images x 10 steps", 1.0, {"ask": "draw", "levels": ten, "stretch": stretch}),
    ]
    widths = (6, 38, 9, 19, 12, 6)
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        live = Path(folder) / "_static" / "live"
        live.mkdir(parents=True)
        (Path(folder) / "pages").mkdir()
        (live / "runtime.js").write_text(worker.runtime()[0], encoding="utf-8")
        for figure, what, aim, question in questions:
            (live / f"{figure.pack.name}.js").write_text(worker.pack_script(figure.pack), encoding="utf-8")
            place = Path(folder) / "pages" / f"{figure.name}.html"
            place.write_text(f"<!doctype html><meta charset='utf-8'><body>{figure.html()}", encoding="utf-8")
            page = browser.new_page()
            page.goto(place.as_uri())
            page.locator(".blx-load").click()
            page.locator(".blx-readout", has_text="second").wait_for(timeout=120_000)
            times, still = page.locator(".blx").evaluate(ASK, [question, args.repeats])
            seconds = [t / 1000 for t in times]
            shown = f"{statistics.median(seconds):.2f} [{min(seconds):.2f}, {max(seconds):.2f}]"
            size = figure.data["live"]["megabytes"]
            common.print_row(figure.name, what, f"{aim:g}", shown, f"{still:.0f}", size, widths=widths)
            page.close()


if __name__ == "__main__":
    main()
