# @title Set-up for Colab (does nothing anywhere else)
REPOSITORY, REF = "", ""  # filled in by the build
USE_DRIVE = False  # @param {type:"boolean"}

import os
import sys

if "google.colab" in sys.modules or "BILEVEL_COLAB" in os.environ:
    import subprocess
    from importlib.metadata import distributions
    from pathlib import Path

    def run(*command):
        subprocess.run(command, check=True)

    if not REPOSITORY:
        raise RuntimeError("REPOSITORY is empty: open this notebook by the badge")
    home = Path(os.environ.get("BILEVEL_COLAB", "/content"))
    clone = home / REPOSITORY.rstrip("/").split("/")[-1].removesuffix(".git")
    done = clone / ".git" / f"installed-{REF}"
    if not done.exists():
        print(f"Installing {REPOSITORY} at {REF[:12]}: about a minute ...")
        if not clone.exists():
            run("git", "clone", "--quiet", REPOSITORY, str(clone))
        run("git", "-C", str(clone), "fetch", "--quiet", "origin")
        run("git", "-C", str(clone), "checkout", "--quiet", "--detach", REF)
        # Keep the torch that Colab brings, and what was built against it.
        keep = {"torch", "torchvision", "torchaudio", "numpy"}
        pins = {f"{d.name}=={d.version}" for d in distributions() if d.name in keep}
        limits = home / "constraints-colab.txt"
        limits.write_text("\n".join(sorted(pins)))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(limits)]
        run(*pip, f"{clone}[lab]")
        done.touch()
    if USE_DRIVE:  # checkpoints survive the end of the session
        from google.colab import drive

        drive.mount(str(home / "drive"))
        os.environ["BILEVEL_WORK_DIR"] = str(home / "drive" / "MyDrive" / clone.name)
    os.chdir(clone / "notebooks")
    import torch

    if not torch.cuda.is_available():
        print("No GPU is attached. PROFILE = 'quick' needs none; for 'full' choose")
        print("Runtime > Change runtime type > T4 GPU, then run this cell again.")
