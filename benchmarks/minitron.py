"""Is it worth to cut a trained model down and let it learn from its origin, or to train the small one at once?

One model is trained, cut to half of its parameters, and trained on with and without its origin as a teacher, for a
short and for a longer while, and without it also on as many more tokens as the teacher's passes would have paid for.
The same final shape is trained from scratch: on the tokens that follow the cut ("small"), and on all tokens that the
cut model saw, those of its origin included ("small, all tokens"). Each arm has the best, by validation loss, of
several peak learning rates; what is compared is the test loss. The cut is chosen on the validation text.

    python benchmarks/minitron.py

About five minutes of one core.
"""

from __future__ import annotations

import argparse
import io
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _common import write_result
from rich.console import Console

from trainpilot.experiments.cut import CutResult, cut
from trainpilot.experiments.options import CutOptions, ReplayOptions
from trainpilot.experiments.replay import replay

BASE_RATE = 3e-3
AFTER_RATES, SMALL_RATES = (1e-3, 3e-3, 1e-2), (3e-3, 1e-2)
"""Peak learning rates that are tried: after a cut, and from scratch."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to a small model."""

    model: str
    tokens: int
    rates: tuple[float, ...]
    teacher: str | None = None


def trained(arm: Arm, rate: float, out: Path, seed: int) -> dict[str, Any]:
    """Train an arm at a peak learning rate, and return what is reported of it."""
    options = ReplayOptions(
        out=out,
        model=arm.model,
        teacher=arm.teacher,
        tokens=arm.tokens,
        base_learning_rate=rate,
        batch_size=8,
        decisions=20,
        probe=False,
        seed=seed,
        device="cpu",
        threads=1,
    )
    begin = time.process_time()
    summary = replay(options, Console(file=io.StringIO()))
    return {
        "learning_rate": rate,
        "tokens": summary["tokens"],
        "n_parameters": summary["n_parameters"],
        "validation_loss": summary["final_validation_loss"],
        "test_loss": summary["final_test_loss"],
        "cpu_s": round(time.process_time() - begin, 1),
    }


def best(arm: Arm, place: Path, seed: int) -> dict[str, Any]:
    """Return the run of an arm with the lowest validation loss, and the CPU seconds of all of them."""
    runs = [trained(arm, rate, place / f"{rate:g}", seed) for rate in arm.rates]
    found = min(runs, key=lambda run: float(run["validation_loss"]))
    print(f"{place.name}: {found}", flush=True)
    return {**found, "tried": [{name: run[name] for name in ("learning_rate", "test_loss", "cpu_s")} for run in runs]}


def one_seed(place: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of all arms with one seed."""
    base = Arm(model=options.model, tokens=options.tokens, rates=(BASE_RATE,))
    arms = {"base": best(base, place / "base", seed)}
    origin = place / "base" / f"{BASE_RATE:g}"
    made: CutResult = cut(
        CutOptions(path=origin, out=place / "cut", parameters=options.share, device="cpu", threads=1),
        Console(file=io.StringIO()),
    )
    smaller = str(place / "cut")
    shutil.copytree(place / "cut", place / "shape", ignore=shutil.ignore_patterns("*.safetensors", "cut.json"))
    shape, ways = str(place / "shape"), dict[str, Arm]()
    longer = 1 + made.before.n_parameters / (3 * made.after.n_parameters)
    for after in options.after:
        ways |= {
            f"{after} tokens, cut, distilled": Arm(model=smaller, tokens=after, rates=AFTER_RATES, teacher=str(origin)),
            f"{after} tokens, cut, not distilled": Arm(model=smaller, tokens=after, rates=AFTER_RATES),
            f"{int(longer * after)} tokens, cut, not distilled, at equal cost": Arm(
                model=smaller, tokens=int(longer * after), rates=AFTER_RATES
            ),
            f"{after} tokens, small": Arm(model=shape, tokens=after, rates=SMALL_RATES),
        }
    every = options.tokens + max(options.after)
    ways[f"{every} tokens, small, all tokens"] = Arm(model=shape, tokens=every, rates=SMALL_RATES)
    arms |= {name: best(arm, place / name, seed) for name, arm in ways.items()}
    cuts = [{"part": each.part, "size": each.size, "loss": round(each.loss, 4)} for each in made.cuts]
    return {"seed": seed, "arms": arms, "test_loss_after_cut": made.after.test_loss, "cuts": cuts}


def main() -> None:
    """Run all seeds and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-nano")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="of the model that is cut")
    parser.add_argument("--after", type=int, nargs="+", default=[50_000, 200_000], help="tokens after the cut")
    parser.add_argument("--share", type=float, default=0.5, help="of the parameters that is kept")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--name", default="minitron", help="of the file in results/")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as scratch:
        seeds = [one_seed(Path(scratch) / str(seed), seed, options) for seed in range(options.seeds)]
    settings = {name: value for name, value in vars(options).items() if name not in ("seeds", "name")}
    write_result(options.name, {"settings": settings, "seeds": seeds}, torch.device("cpu"))


if __name__ == "__main__":
    main()
