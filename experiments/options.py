"""The options of every command, with their help texts. Imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

import ast
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.envs.decision import Preference
from trainpilot.experiments.carbon import DEFAULT_GRID_INTENSITY_G_PER_KWH
from trainpilot.llm_runtime.budget import Budget
from trainpilot.llm_runtime.config import Precision, Pruning, PruningImportance, RunConfig
from trainpilot.llm_runtime.ranges import Range, Whole, check_ranges, range_in, ranges_of
from trainpilot.llm_runtime.schedules import ScheduleName

Effort = Literal["quick", "standard", "long"]


def tokens_in(text: str) -> int:
    """Return the tokens that a text such as `500000` or `1M` names. Raises `ValueError` for any other."""
    budget = Budget.parse(text)
    if budget.currency != "tokens":
        raise ValueError(
            f"tokens must be a number such as 500000 or 1M, got {text!r}; --budget takes seconds and joules"
        )
    return int(budget.amount)


def _path(arguments: list[str]) -> Path:
    if not arguments[0].strip():
        raise ValueError("it must name a file or a folder, got an empty text; `.` is the current folder")
    return Path(arguments[0])


GivenPath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
GivenPathOrNone = Annotated[
    Path | None,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_path,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]
GivenPaths = Annotated[
    tuple[Path, ...],
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="PATH [PATH ...]",
        instance_from_str=lambda arguments: tuple(_path([each]) for each in arguments),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [str(each) for each in value],
    ),
]
Model = Annotated[
    str,
    tyro.conf.arg(
        help="Preset (llama-nano, llama-micro, llama-mini, gpt2-nano, gpt2-micro, phi-nano), config JSON, model folder "
        "or Hub id. A folder without weights is trained from scratch, with the tokenizer that lies in it."
    ),
]
Text = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        help="Text: `stdlib`, `stdlib:asyncio,json`, `python-docs`, UTF-8 files, folders, globs, or `hub:OWNER/NAME`."
    ),
]
Tokens = Annotated[
    int | None,
    ranges_of(RunConfig)["tokens"],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar=f"TOKENS {ranges_of(RunConfig)['tokens']}",
        instance_from_str=lambda args: tokens_in(args[0]),
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
Vocabulary = Annotated[
    int,
    tyro.conf.arg(
        help="256 for bytes; more, such as 2048, for a byte-level BPE tokenizer of that size, trained on the text's "
        "training split. Only for models trained from scratch."
    ),
]
SequenceLength = Annotated[int, tyro.conf.arg(help="Tokens per sequence.")]
Device = Annotated[str, tyro.conf.arg(help="auto (cuda if there is such a GPU, otherwise cpu), cpu, cuda or mps.")]

if TYPE_CHECKING:
    from trainpilot.agents.bundle import BaseSchedule

LearningRate = Annotated[float, Range(0, 1000, above=True)]
Jobs = Annotated[int, Whole(0, 1024)]
On = Annotated[
    Literal["local", "ray", "slurm"],
    tyro.conf.arg(
        help="Where the runs are executed: in processes of this machine, as tasks of a Ray cluster, or as jobs of "
        "Slurm. Other machines need the same versions and, under the same paths, the files that runs read."
    ),
]
RayAddress = Annotated[
    str | None,
    tyro.conf.arg(
        help="Address of the Ray cluster, `auto` for the one that this machine belongs to; by default RAY_ADDRESS, "
        "else one of this machine alone."
    ),
]
GpusPerRun = Annotated[
    float | None,
    Range(0, 1024),
    tyro.conf.arg(
        help="GPUs of each run on Ray (also a fraction) and Slurm; by default one where the device is cuda, else none. "
        "A run occupies as many cores as it has threads."
    ),
]
SlurmPartition = Annotated[str | None, tyro.conf.arg(help="Partition of Slurm; by default Slurm's own choice.")]
SlurmMinutes = Annotated[
    int | None, Whole(1, 100_000), tyro.conf.arg(help="Time limit of each run on Slurm in minutes; 60 by default.")
]
Threads = Annotated[int, Whole(0, 1024)]


class Options:
    """Base of the options of a command: every number is checked as it is given."""

    def __post_init__(self) -> None:
        check_ranges(self)


C = TypeVar("C", bound=type[Options])


def _help_texts() -> dict[tuple[str, str], str]:
    """Return the text below each option, on one line, by class and name. Tyro would keep its line breaks."""
    classes = [
        node for node in ast.parse(Path(__file__).read_text(encoding="utf-8")).body if type(node) is ast.ClassDef
    ]
    return {
        (each.name, ast.unparse(option.target)): " ".join(str(text.value.value).split())
        for each in classes
        for option, text in pairwise(each.body)
        if isinstance(option, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


HELP_TEXTS = _help_texts()
METAVARS: dict[Any, str] = {str | None: "STR", tuple[str, ...] | None: "STR [STR ...]"}
"""How the help shows types that may be `None`, which nobody has to write."""


def _default_shown(default: str) -> str:
    """Return how the help names a default. Where it is nothing, the text of the option says what happens."""
    return "" if default in ("None", "") else f"(default: {default})"


def with_ranges(options: C) -> C:
    """Give a command's numbers the ranges of the run's settings of that name, if they have none, and show them."""
    of_run = ranges_of(RunConfig)
    for name, hint in get_type_hints(options, include_extras=True).items():
        allowed = range_in(hint) or of_run.get(name)
        shown: dict[str, Any] = {"help_behavior_hint": _default_shown}
        if text := HELP_TEXTS.get((options.__name__, name)):
            shown["help"] = text
        named = any(getattr(each, "metavar", None) for each in getattr(hint, "__metadata__", ()))
        if not named and (bare := getattr(hint, "__origin__", hint)) in METAVARS:
            shown["metavar"] = METAVARS[bare]
        extras: list[Any] = []
        if allowed is not None and hint is not Tokens:
            words = "|auto" if "auto" in str(hint) else ""
            shown["metavar"] = f"{'INT' if isinstance(allowed, Whole) else 'FLOAT'} {allowed}{words}"
            extras = [allowed]
        options.__annotations__[name] = Annotated[hint, *extras, tyro.conf.arg(**shown)]
    return options


@with_ranges
@dataclass(frozen=True, kw_only=True)
class ReplayOptions(Options):
    """Train a model, steered by a policy, or under its base schedule with `--policy none`.

    Killed at any moment, the same command goes on where it was. On a CPU and under a budget in tokens it ends with the
    same result, to the last bit, without a policy or with --preference quality=1; else a policy also sees seconds and
    watts.

    Try for instance:
      trainpilot replay --policy none --model llama-micro --out runs/base
      trainpilot replay --policy default --mode advise --model llama-micro --out runs/advised
      trainpilot replay --policy default --model gpt2-micro --text docs/*.md --out runs/steered
      trainpilot replay --policy default --model llama-micro --budget 10min --out runs/ten-minutes
      trainpilot replay --policy runs/agent/policy.safetensors --model gpt2-micro --out runs/mine
    """

    out: GivenPath
    """Folder for summary.json, telemetry.jsonl, tb/ and model/. An interrupted run in it is resumed."""
    policy: str = "none"
    """`none` for the plain base schedule, `default` for the policy that comes with trainpilot, or a bundle's file."""
    mode: Literal["steer", "advise"] = "steer"
    """`advise` records what the policy would do and why, and changes nothing: to the last bit the run of the base
    schedule. The first step with a run that is dear."""
    model: Model = RunConfig.model
    text: Text = RunConfig.text
    vocabulary: Vocabulary = RunConfig.vocabulary
    tokens: Tokens = None
    """Budget in tokens, such as 500000 or 1M; a million without --budget."""
    budget: str | None = None
    """Budget in seconds (600s, 10min, 2h), joules (50kJ, 1.5MJ) or tokens (1M). The run ends when it is used up, and
    its schedule with it."""
    batch_size: int | Literal["auto"] = RunConfig.batch_size
    """Starting batch, in sequences, or `auto` for the power of two nearest to what Step Law advises for this budget."""
    sequence_length: SequenceLength = RunConfig.sequence_length
    base_learning_rate: LearningRate | Literal["auto"] = RunConfig.base_learning_rate
    """Peak learning rate of the base schedule, or `auto` for what Step Law advises for this model and budget: a start
    without a sweep, for models trained from scratch. Below 100 M parameters the law is extrapolated: at 0.2 M its rate
    is 2 to 10 times too high, which the policy is there to correct, and its batch of the right order."""
    schedule: ScheduleName | None = None
    """Base schedule: linear (to zero), cosine (to 10 %), wsd (last 20 % to zero), constant; by default the one that
    the policy was trained on, linear without a policy."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up; by default the policy's share of the budget, 2 % without a policy."""
    warmup_share: float | None = None
    """The same as a share of the budget, whatever that is counted in."""
    precision: Precision = RunConfig.precision
    """Starting precision of the matrix products."""
    pruning: Pruning = RunConfig.pruning
    """What the policy may prune: nothing, weight masks (magnitude or evolution), or feed-forward channels (width)."""
    pruning_importance: PruningImportance = RunConfig.pruning_importance
    """Which channels `width` keeps: those of largest weights, or of largest activations on the validation text, which
    costs less loss."""
    teacher: str | None = RunConfig.teacher
    """Folder of a larger model, or of a run that left one, whose predictions the run learns from too (distillation),
    for example the model that --model was cut from. It must have the same vocabulary."""
    distillation_weight: float = RunConfig.distillation_weight
    """Share w of the teacher: (1 - w) x cross-entropy + w x T^2 x KL(teacher || model)."""
    distillation_temperature: float = RunConfig.distillation_temperature
    """T, by which both models' logits are divided before they are compared."""
    decisions: int | None = None
    """Decisions per run; by default as many as the policy was trained with, 50 without a policy."""
    preference: str = str(Preference())
    """Weights on quality, energy and time, such as quality=0.5,energy=0.4,time=0.1."""
    throughput_floor: Annotated[float, Range(0, 1)] = GuardrailSettings.throughput_floor
    """The policy may choose no batch below the starting one that gives less than this share of the best tokens/s seen
    on this device; 0 lifts it. Without effect for quality alone under a budget in tokens, where clocks are hidden."""
    seed: int = RunConfig.seed
    """Seeds the initial weights and the data order."""
    device: Device = RunConfig.device
    threads: Threads = 0
    """Torch threads; 0 takes all cores."""
    reference: bool = False
    """Also run the base schedule (once, cached, about 1.75 runs) and report loss, time and energy against it."""
    probe: bool = True
    """Probe the curvature once per decision."""
    grid_intensity: Annotated[float, Range(0, 1e5)] = DEFAULT_GRID_INTENSITY_G_PER_KWH
    """Grams of CO2e per kWh of your electricity."""

    def run_config(self, decisions: int, base: BaseSchedule | None = None) -> RunConfig:
        """Return the run, with `decisions` and the base schedule of the policy where the options leave them open.

        Raises:
            ValueError: a bad setting.
        """
        schedule, warmup_tokens, warmup_share = self.schedule, self.warmup_tokens, self.warmup_share
        tokens, budget = self._budget()
        if base is not None:
            schedule = base.schedule if schedule is None else schedule
            if warmup_tokens is None and warmup_share is None:
                in_tokens = budget is None
                warmup_tokens = base.warmup_tokens(tokens) if in_tokens else None
                warmup_share = None if in_tokens else base.warmup_share
        decisions = decisions if self.decisions is None else self.decisions
        return _run_config(
            self,
            tokens=tokens,
            budget=budget,
            schedule=RunConfig.schedule if schedule is None else schedule,
            warmup_tokens=warmup_tokens,
            warmup_share=warmup_share,
            decisions=decisions,
            **self._start(decisions),
        )

    def _start(self, decisions: int) -> dict[str, Any]:
        """Return batch size and learning rate, those of a scaling law where an option is `auto`."""
        batch_size, learning_rate = self.batch_size, self.base_learning_rate
        if "auto" in (batch_size, learning_rate):
            from trainpilot.llm_runtime.models import body_parameters_of
            from trainpilot.llm_runtime.scaling_laws import step_law

            tokens, budget = self._budget()
            if budget is not None:
                raise ValueError(
                    f"base_learning_rate and batch_size must be numbers under budget {budget}, got 'auto', as the law "
                    "needs a budget in tokens; give --tokens"
                )
            n_parameters = body_parameters_of(self.model)
            if n_parameters is None:
                raise ValueError(
                    "base_learning_rate and batch_size must be numbers for a pretrained model, got 'auto', as the law "
                    "is of training from scratch; try --base-learning-rate 1e-4"
                )
            advice, length = step_law(n_parameters, tokens), max(self.sequence_length, 1)
            if batch_size == "auto":
                n_sequences = tokens // length
                batch_size = advice.batch_size(
                    sequence_length=length, n_sequences=n_sequences, decisions=max(decisions, 1)
                )
            if learning_rate == "auto":
                learning_rate = advice.learning_rate_at(float(batch_size * length))
        return {"batch_size": batch_size, "base_learning_rate": learning_rate}

    def _budget(self) -> tuple[int, str | None]:
        """Return the budget in tokens, and the one in seconds or joules, if it is in these."""
        if self.budget is None:
            return RunConfig.tokens if self.tokens is None else self.tokens, None
        if self.tokens is not None:
            raise ValueError(f"tokens cannot be combined with budget, got {self.tokens} and {self.budget}; give one")
        budget = Budget.parse(self.budget)
        return (int(budget.amount), None) if budget.currency == "tokens" else (RunConfig.tokens, str(budget))


@with_ranges
@dataclass(frozen=True, kw_only=True)
class TrainAgentOptions(Options):
    """Train a policy with PPO, in the simulator and on live training runs, and write it as a bundle.

    The recipe `default` trains two agents on thousands of simulated runs at once, which takes about an hour on
    two cores, and keeps the one that is better on simulated runs it has not met. With `ppo.total_decisions`
    it goes on training it on live runs; `tiny` and `demo` have live runs only.

    Killed at any moment, the same command goes on from the last update; in the simulator, on a CPU, with the same
    result to the last bit. Watch it: tensorboard --logdir OUT

    Try for instance:
      trainpilot train-agent --recipe default --out runs/agent
      trainpilot train-agent --recipe default --out runs/one --set simulator.seeds=1
      trainpilot train-agent --recipe tiny --out runs/live --set ppo.total_decisions=2000 ppo.learning_rate=1e-3
    """

    recipe: str
    """Name of a recipe that comes with trainpilot (default, demo, tiny), or a YAML file of your own."""
    out: GivenPath
    """Folder for policy.safetensors, recipe.json, checkpoint.pt, tb/ and simulator/."""
    set: tuple[str, ...] = ()
    """Changes to the recipe, as key=value with dots for levels: ppo.seed=1 simulator.hide=[curvature]."""
    on: On = "local"
    """Where the live runs are executed: in processes of this machine, or on a Ray cluster; Slurm is refused. Simulated
    runs stay on this machine."""
    ray_address: RayAddress = None
    gpus_per_run: GpusPerRun = None


@with_ranges
@dataclass(frozen=True, kw_only=True)
class CompareOptions(Options):
    """Compare methods over cases and seeds, against baselines that are tuned as hard as they can be, in one report.

    Every finished run is a file of its own: killed at any moment, the same command goes on; with another method or one
    more seed only what is missing is run. The number of processes changes no loss.

    Methods: constant, cosine (the untuned default), linear, wsd, schedule-free, prodigy, plateau, noise-batch, seesaw,
    gradual-pruning, random; not by default: law (Step Law and WSD), greedy (transformers' GreedyLR); tuned (the best
    static setting a search finds), tuned-linear, tuned-cosine, tuned-wsd, tuned-constant, check-self, check-budget,
    check-rate; tuned-tpe, tuned-halving, nsga2; small, small-ffn, small-heads, small-depth, prune-ffn, prune-heads,
    prune-depth, minitron, distil, distil-2x, early-stop, quantise-int8, quantise-int4, shift-add, shift-add-pot, and
    several of these as in minitron+quantise-int4 (smaller models); policy:FILE for a bundle (or policy:default, which
    comes with trainpilot), policy:FILE@quality=0.5+energy=0.5 under that preference, policy:FILE@start=0.1 from a tenth
    of the tuned learning rate, policy:FILE@unguarded without the guardrails of `replay`, open-loop:FILE for its average
    schedule, without feedback; with --on ray also pbt, Ray Tune's Population Based Training of four runs (pbt@8 of
    eight).

    Try for instance:
      trainpilot compare --cases quick
      trainpilot compare --cases test --methods cosine,tuned,policy:runs/agent/policy.safetensors --out runs/mine
      trainpilot compare --cases my-cases.yaml --methods default --seeds 5 --out runs/mine
    """

    cases: str = "quick"
    """`quick`, `test`, `large` or `train`, which come with trainpilot, or a YAML or JSON file of your own."""
    out: GivenPathOrNone = None
    """Folder for report.html, three CSV files, JSON, runs/, costs/ and tensorboard/; runs/compare-CASES by default."""
    methods: str = "default"
    """Names with commas between them; `default` is everything but tuned-tpe, tuned-halving, nsga2, smaller models, pbt
    and policies."""
    seeds: Annotated[int, Whole(1, 1000)] = 3
    """Paired seeds per case and method: 3 for a look, 5 for a claim."""
    jobs: Jobs = 0
    """Runs side by side; 0 takes as many as there are cores for. Slurm needs a number."""
    threads: Annotated[int, Whole(1, 1024)] = 1
    """Torch threads of each run. Unlike jobs it changes the last digits of a loss: keep it within one folder."""
    plan: bool = False
    """Say how many runs and how long, measure the cost tables, and stop."""
    report_only: bool = False
    """Run nothing; write the report from the runs that are there, while others may still be running."""
    on: On = "local"
    ray_address: RayAddress = None
    gpus_per_run: GpusPerRun = None
    slurm_partition: SlurmPartition = None
    slurm_minutes: SlurmMinutes = None
    tensorboard: bool = True
    """Write the runs for TensorBoard too."""
    optuna_storage: str | None = None
    """Keep the studies of tuned-tpe, tuned-halving and nsga2 here too, such as sqlite:///optuna.db, which
    optuna-dashboard opens."""

    @property
    def folder(self) -> Path:
        """Folder for everything."""
        return self.out if self.out is not None else Path("runs") / f"compare-{Path(self.cases).stem}"


@with_ranges
@dataclass(frozen=True, kw_only=True)
class DemoOptions(Options):
    """Do the main job once, in at most ten minutes on two cores.

    A small GPT-2 at a learning rate that nobody tuned; the same run steered by the policy that comes with trainpilot,
    which has never seen this model; and what a sweep over learning rates finds and costs. What is printed was measured,
    also where the steered run is worse.
    """

    out: GivenPath = Path("runs/demo")
    """Folder for everything; an interrupted demo in it is resumed."""
    seed: int = 0
    """Seeds the runs."""
    policy: str = "default"
    """The policy that steers: `default`, or a bundle's file."""
    budget: str | None = None
    """Budget of each of the seven runs, such as 30s or 200k; 600k tokens by default."""


@with_ranges
@dataclass(frozen=True)
class DoctorOptions(Options):
    """Say what can be measured and controlled on this machine, and what pays."""

    json: bool = False
    """Print JSON instead of a table."""


@with_ranges
@dataclass(frozen=True)
class InspectOptions(Options):
    """Show where a policy comes from and what it looks at, or how a run went and why it was steered so.

    Of several runs it prints one line each.
    """

    path: Annotated[GivenPaths, tyro.conf.Positional]
    """A bundle (policy.safetensors), `default` for the one that comes with trainpilot, the folder of an agent, or the
    folders of one or several runs."""
    all: bool = False
    """Print the whole provenance of a bundle, not only what fits one screen."""


@with_ranges
@dataclass(frozen=True)
class ReportOptions(Options):
    """Write a page about one run or several: losses, what steering did and why, what it cost, what was refused.

    The page is one HTML file that needs no network and reads on a phone, too.

    Try for instance:
      trainpilot report runs/steered --out steered.html
      trainpilot report runs/steered runs/mine --reference runs/base --out comparison.html
    """

    path: Annotated[GivenPaths, tyro.conf.Positional]
    """Folders of runs: of `replay`, or of `FolderTracker` in a training loop of your own."""
    out: GivenPath
    """The page to write, an .html file; an earlier one is replaced."""
    reference: GivenPathOrNone = None
    """Folder of a run that the others are drawn against; by default the reference that `replay --reference` made."""


Share = Annotated[float, Range(0, 1, above=True, below=True)]


@with_ranges
@dataclass(frozen=True, kw_only=True)
class CutOptions(Options):
    """Cut a trained model down to a smaller one of the same architecture, by what does least on a held text.

    Feed-forward channels go by their mean absolute activation, heads in whole groups by that of their outputs, and
    blocks by how little they turn the hidden state (Minitron). Every block keeps the same sizes, so plain transformers
    loads the result. Where several cuts are open, each is tried, and the one that adds least loss per parameter comes
    first. Let the result learn from the model that it was cut from: replay --model OUT --teacher FOLDER.

    Try for instance:
      trainpilot cut runs/base --ffn 0.5 --out runs/narrow
      trainpilot cut runs/base --ffn 0.5 --depth 0.67 --out runs/small
      trainpilot cut my-llama --parameters 0.5 --text docs/*.md --out my-half-llama
    """

    path: Annotated[GivenPath, tyro.conf.Positional]
    """Folder of a finished run, or a model folder that save_pretrained wrote."""
    out: GivenPath
    """Folder for the smaller model and cut.json. It must be new or an earlier cut, which is replaced."""
    ffn: Share | None = None
    """Share of the feed-forward channels that is kept."""
    heads: Share | None = None
    """Share of the groups of heads (key-value heads with their query heads) that is kept. GPT-2, GPT-NeoX and OPT
    cannot lose heads."""
    depth: Share | None = None
    """Share of the blocks that is kept."""
    parameters: Annotated[float, Range(0, 1e13, above=True)] | None = None
    """Cut whatever costs least until so many parameters are left, or below 1 such a share of them. The three shares
    above then say how far each part may be cut at most."""
    text: tuple[str, ...] | None = None
    """Text: its validation split says what does least, its test split what that costs; by default the run's, `stdlib`
    for a model folder."""
    sequence_length: int | None = None
    """Tokens per sequence of that text; by default the run's, 128 for a model folder."""
    device: Device = RunConfig.device
    threads: Threads = 0
    """Torch threads; 0 takes all cores."""


@with_ranges
@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Write a trained model in smaller formats, and weigh each against the unquantised model.

    Formats: bf16; int8 and int4 (compressed-tensors), int8-torchao; gguf-q8 and gguf-q4, for llama.cpp; pot, pot2 and
    bcq, weights of powers of two and of binary codes, for their loss alone. One table: loss on the test split, bytes,
    tokens/s of prefill and of decoding, joules per token with their source, and the score P^1.5 (aT + bE).

    Try for instance:
      trainpilot export runs/base --out exports/base
      trainpilot export runs/base --format int4,gguf-q4 --out exports/base
      trainpilot export my-llama --text docs/*.md --format gguf-q8 --out exports/my-llama
    """

    path: Annotated[GivenPath, tyro.conf.Positional]
    """Folder of a finished run, or a model folder that save_pretrained wrote."""
    out: GivenPath
    """Folder for a folder per format, export.json, export.md and export.png. It must be new or an earlier export, which
    is replaced."""
    format: str = "all"
    """Names with commas between them, or `all` for those that this model and this installation can have."""
    text: tuple[str, ...] | None = None
    """Text whose test split the loss is measured on; by default the run's, `stdlib` for a model folder."""
    sequence_length: int | None = None
    """Tokens per sequence of that text; by default the run's, 128 for a model folder."""
    group_size: Literal[32, 64, 128] = 32
    """Weights that share a scale in int4 and bcq, where that divides all rows; else fewer, or a whole row."""
    prompt_tokens: Annotated[int, Whole(1, 10**6)] = 128
    """Tokens of the prompt of the request that is timed."""
    new_tokens: Annotated[int, Whole(1, 10**6)] = 64
    """Tokens that it generates."""
    speed: bool = True
    """Measure tokens/s and joules too, a few seconds per format or as long as eight requests take."""
    device: Device = RunConfig.device
    threads: Threads = 0
    """Threads of torch and llama.cpp; 0 takes all cores."""


@with_ranges
@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """Measure how a model of yours trains on this machine, and fit the simulator's physics to it.

    A designed set of short live runs: learning rates from 1/30 to 10 times yours, three batches, four schedules, random
    walks of the controls, batches that rise or fall, starts far too hot that are cooled, one pruning step, and every
    precision that pays here. About a quarter of them are never fitted: the error that is printed was measured on those.
    Every finished run is a file of its own: killed at any moment, the same command goes on where it was.

    Try for instance:
      trainpilot calibrate --effort quick --out runs/calibration
      trainpilot calibrate --model gpt2-nano --text docs/*.md --tokens 200000 --out runs/my-calibration
    """

    out: GivenPath
    """Folder for calibration.json, cost_table.json and runs/."""
    model: Model = RunConfig.model
    text: Text = RunConfig.text
    vocabulary: Vocabulary = RunConfig.vocabulary
    tokens: int = 131_072
    """Budget of each run in tokens; one run takes twice as many."""
    batch_size: int = 8
    """Starting batch, in sequences; 1/8, 1/2 and 2 times as many are tried."""
    sequence_length: SequenceLength = 64
    base_learning_rate: LearningRate = 3e-3
    """Peak learning rate that the tried ones are multiples of."""
    effort: Effort = "standard"
    """How many runs: quick (about 14), standard (about 39), or long (about 47, nine with 8 x the budget)."""
    decisions: int = RunConfig.decisions
    """Intervals per run."""
    jobs: Jobs = 0
    """Runs side by side, each in a process of one thread; 0 takes as many as there are cores. Slurm needs a number."""
    on: On = "local"
    ray_address: RayAddress = None
    gpus_per_run: GpusPerRun = None
    slurm_partition: SlurmPartition = None
    slurm_minutes: SlurmMinutes = None
    seed: int = 0
    """Seeds the initial weights and the data order of every run."""
    device: Device = RunConfig.device

    def run_config(self) -> RunConfig:
        """Return the run that all others are variations of. Raises `ValueError` for a bad setting."""
        return _run_config(self, schedule="wsd")


@with_ranges
@dataclass(frozen=True, kw_only=True)
class FitSweepOptions(Options):
    """Fit the simulator's physics to a sweep that you ran in the past, and predict the losses of other settings.

    FILE is a CSV file with one run per row and the columns parameters, learning_rate (the peak), batch_sequences,
    sequence_length, steps (or tokens) and final_loss (in nats/token; empty for runs that were lost), optionally also
    schedule, warmup_steps and end_learning_rate. Several sizes, budgets and schedules in one file are fitted together.
    Final losses of one schedule say little about noise and nothing about other schedules: there the fit stays close to
    published curves, and it never promises a loss outside of your sweep that is lower than your best. About a minute
    for 400 runs.

    Try for instance:
      trainpilot fit-sweep sweep.csv --out runs/sweep
      trainpilot fit-sweep sweep.csv --out runs/sweep --predict larger.csv
    """

    file: Annotated[GivenPath, tyro.conf.Positional]
    """The sweep."""
    out: GivenPath
    """Folder for physics.json and predictions.csv."""
    predict: GivenPathOrNone = None
    """CSV file of settings to predict: the same columns without final_loss; other budgets, schedules and sizes are
    allowed. OUT/predictions.csv repeats its rows with a column predicted_loss."""
    schedule: ScheduleName = "cosine"
    """Schedule of runs for which the file does not say it."""
    warmup_steps: Annotated[int, Whole(0, 10**9)] = 2000
    """Steps of linear warm-up, likewise; of a run shorter than twice that, half of its steps."""
    end_learning_rate: Annotated[float, Range(0, 1000)] = 1e-5
    """Learning rate at the end of the schedule, likewise."""
    weight_decay: Annotated[float, Range(0)] = RunConfig.weight_decay
    """Weight decay of all runs."""
    initial_loss: Annotated[float, Range(0, 100, above=True)] = 11.0
    """Loss before training, about the logarithm of the vocabulary; final losses hardly depend on it."""


def _run_config(options: ReplayOptions | CalibrateOptions, **settings: Any) -> RunConfig:
    """Return the run with `settings`, and for the rest with the options that have the name of a setting."""
    given = {each.name: getattr(options, each.name) for each in fields(RunConfig) if hasattr(options, each.name)}
    return RunConfig(**given | settings)
