"""Run the attacks: all kinds or one, from the beginning or from where they were; write the result and the page."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable

from tests.attack import ROOT
from tests.attack.page import PAGE, RESULT, keep_result, kept_result, write_page
from tests.attack.runner import KINDS, Suite, examples, load_everything, source_digest

WORK = ROOT / "runs" / "attack"


def main() -> int:
    """Return 0 where all that was tried held, else 1."""
    options = _options()
    if options.page:
        write_page()
        return 0
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.example:
        print(json.dumps(examples()))
        return 0
    load_everything()
    if options.number is not None:
        return _one(options)
    failed = sum(_run(name, options) for name in options.only or KINDS)
    _write(options)
    return int(failed > 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.attack", description=__doc__)
    parser.add_argument("--only", action="append", choices=KINDS, help="this kind alone; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="seeds the attempts that are drawn")
    parser.add_argument("--number", type=int, help="repeat one attempt of one kind, and leave its folder")
    parser.add_argument("--every", type=int, default=1, help="make every n-th attempt alone, for a quick look")
    parser.add_argument("--fresh", action="store_true", help="forget the attempts that were made before")
    parser.add_argument("--example", action="store_true", help="make one attempt of each kind, and print what failed")
    parser.add_argument("--page", action="store_true", help="write docs/reliability.md from the result, and stop")
    options = parser.parse_args()
    if options.number is not None and len(options.only or ()) != 1:
        parser.error("--number needs --only KIND")
    return options


def _run(name: str, options: argparse.Namespace) -> int:
    """Make the attempts of a kind, say what failed, and return how many did."""
    suite = Suite(name, options.seed, WORK, fresh=options.fresh)
    numbers = range(len(suite.attempts))[:: options.every]
    suite.run(numbers, _bar(suite.kind.TITLE, len(numbers)))
    made = [suite.done[number] for number in numbers]
    failed = [record for record in made if record["failures"]]
    for record in failed:
        for promise, reason in record["failures"].items():
            print(f"  {record['number']:4d} {promise}: {record['name'][:120]}\n       {reason}")
    keep_result(suite, made)
    seconds = sum(record["cpu_s"] for record in made)
    print(f"{suite.kind.TITLE}: {len(made) - len(failed)} of {len(made)} held, {seconds:.0f} s of one core")
    return len(failed)


def _bar(title: str, total: int) -> Callable[[int, str], None]:
    """Return a function that shows the progress without a thread, which a forked process would not survive well."""
    shown = -1

    def advance(done: int, note: str) -> None:
        nonlocal shown
        if sys.stdout.isatty():
            filled = 30 * done // total
            sys.stdout.write(f"\r{title} [{'#' * filled}{'.' * (30 - filled)}] {done}/{total}  {note[:60]:60}")
            sys.stdout.write("\n" if done == total else "")
            sys.stdout.flush()
        elif 10 * done // total > shown:
            shown = 10 * done // total
            print(f"{title} {done}/{total}  {note}", flush=True)

    return advance


def _one(options: argparse.Namespace) -> int:
    suite = Suite(options.only[0], options.seed, WORK)
    record = suite.attempt(options.number, keep=True)
    print(json.dumps(record, indent=2))
    print(f"folder: {suite.work / f'attempt-{options.number}'}")
    return int(bool(record["failures"]))


def _write(options: argparse.Namespace) -> None:
    """Write the result and the page, if every kind is known."""
    import torch
    from _common import write_result

    seed, mark = options.seed, source_digest(options.seed)
    kinds = {name: kept for name in KINDS if (kept := kept_result(WORK, name, mark)) is not None}
    if missing := [name for name in KINDS if name not in kinds]:
        print(f"no page yet: {', '.join(missing)} has not been run")
        return
    result = {"seed": seed, "kinds": kinds}
    command = f"python -m tests.attack --seed {seed}" + (f" --every {options.every}" if options.every > 1 else "")
    write_result("attack", result, torch.device("cpu"), command=command)
    write_page()
    print(f"written: {RESULT.relative_to(ROOT)}, {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    raise SystemExit(main())
