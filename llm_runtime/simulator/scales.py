"""Draw instances of 10 M to 10 B weights: training from scratch around published runs, and fine-tuning.

Weights and tokens are drawn, and most else follows from them: physics from the published models, taken to that size;
batch and learning rate at the start from Step Law; seconds and watts from the machines that such a model is trained on.
What does not follow is drawn around it. When `references.find_references` has tuned the static setting of each,
`place_edges` puts the best learning rate of fine-tuning where people find it, and the edge at its distance from the
best rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainpilot.llm_runtime.config import PRECISIONS, STEPS_PER_INTERVAL
from trainpilot.llm_runtime.scaling_laws import step_law
from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import (
    FINE_TUNING,
    SCRATCH,
    Hardware,
    Instances,
    Widening,
    between,
    rescale,
)
from trainpilot.llm_runtime.simulator.physics import (
    EDGE,
    LATE,
    NAMES,
    NOT_FITTED,
    PARAMETERS,
    RATE_UNIT,
    RELATIVE_RATES,
    Physics,
)
from trainpilot.llm_runtime.simulator.records import Bools, Floats, Ints
from trainpilot.llm_runtime.simulator.references import References
from trainpilot.llm_runtime.simulator.sensors import Sensors

MOST_TOKENS = 1e12
SEQUENCE_LENGTHS = (512, 1024, 2048, 4096)
PUBLISHED_SEQUENCE = 2048
"""Tokens of a sequence in the units of the published physics."""
LARGEST_BATCH = 16_384
"""Sequences."""
DECISIONS = 50
RATE_OF_SIZE = 0.713
"""The best learning rate falls with this power of the weights (Step Law)."""
RATE_OF_TOKENS, BATCH_OF_TOKENS = 0.307, 0.571
"""Powers of the budget with which best learning rate and batch rise (Step Law)."""
PUBLISHED_TOKENS = (8e9, 5e10)
"""Budgets that all published models were trained with."""
FLOOR_OF_SIZE, FLOOR_OF_TOKENS = -0.1, -0.04
"""Exponents of the loss: of weights, and of budgets beyond the published ones."""
PARAMETER_SPREAD = 0.06
"""Standard deviation, per unit of spread, of the perturbation of each parameter's logarithm."""
RATE_SPREAD = 0.3
"""Spread of the logarithm of best learning rates around the law's."""
WARMUP_STEPS = (100.0, 3_000.0)
"""Range of the steps until the edge has risen; published runs needed 500 to 1,000."""
FAR = 8.0
"""Factor between a best setting and Step Law's that no published model of these sizes has."""
FRESH_LOSS = 10.9
"""Loss of a model without training, in nats/token: the logarithm of a vocabulary of 54 k."""
FINE_TUNED_RATES, LORA_RATES = (1e-5, 2e-4), (5e-5, 2e-3)
"""Ranges of best learning rates of fine-tuning, of all weights and of low-rank adapters."""
LORA_SHARE = 0.3
"""Share of fine-tuning that trains low-rank adapters."""
FINE_TUNING_SEQUENCES, SHARP_SEQUENCES = (1e3, 1e5), (1e2, 3e4)
"""Ranges of the sequences of a fine-tuning text; the second one is that of `Widening.sharp_fine_tuning`."""
SHIFT = (0.01, 0.15)
"""Range of the share of the used-up signal that the text of a fine-tuning brings back."""
SLOWNESS = (0.5, 2.5)
"""Range, with `sharp_fine_tuning`, of how much more of it comes back in slow modes than in fast ones: a factor on the
spectrum's exponent. At 1 every decade of modes gets as much, so that each tenfold rise of the learning rate gains about
as much as the one before."""
FORGETTING = (100.0, 3_000.0)
"""Range, with `sharp_fine_tuning`, of the factor on the slow noise: too large steps undo what a trained model knows,
which comes back slowly. With both, a tenth of the best learning rate loses about a third of what fine-tuning gains and
ten times that rate a quarter, against 0.5 and 0.5 to 0.8 in a sweep of a model of 135 M weights (docs/results.md)."""
LEAST_GAIN = 0.01
"""Least gain of the best setting of fine-tuning, as a share of the given model's loss."""
EARLIER_STEPS = 20_000
"""Steps of the training that fine-tuning begins after."""
EARLIER_MOMENTUM_POWER = 0.1
"""Typical power of Adam's first moment in it, over that of a gradient."""


def draw_scales(
    kinds: Ints, random: np.random.Generator, published: Sequence[FittedPhysics], widening: Widening
) -> Instances:
    """Draw instances of these kinds, `SCRATCH` or `FINE_TUNING`, still without edge.

    Args:
        kinds: Kind of each instance.
        random: Random numbers.
        published: Physics of models whose learning rate and batch were varied; at least one, with its weights.
        widening: Ranges of weights and budgets, and the spread of what follows from them.
    """
    n, tuned, spread = len(kinds), kinds == FINE_TUNING, widening.spread
    weights = between(random, n, *widening.weights)
    length = random.choice(SEQUENCE_LENGTHS, n).astype(np.float64)
    tokens = np.minimum(weights * between(random, n, *widening.tokens_per_weight), MOST_TOKENS)
    epochs = np.where(tuned, between(random, n, 1.0, 6.0), 1.0)
    epochs = np.where(~tuned & (random.random(n) < 0.15), between(random, n, 1.0, 6.0), epochs)
    texts, least_steps = FINE_TUNING_SEQUENCES, np.full(n, STEPS_PER_INTERVAL)
    if widening.sharp_fine_tuning:
        texts, least_steps = SHARP_SEQUENCES, np.where(tuned, 1, STEPS_PER_INTERVAL)
    sequences = np.where(tuned, between(random, n, *texts) * epochs, tokens / length).round()
    data = np.where(epochs > 1, sequences / epochs, 100 * sequences)
    advised = [step_law(*pair) for pair in zip(weights, sequences * length, strict=True)]
    rate = np.array([each.learning_rate for each in advised])
    batch = np.array([each.batch_tokens for each in advised]) / length
    batch = np.where(tuned, between(random, n, 8.0, 128.0), batch)
    start, limits, devices = _batches(random, sequences, batch, weights, least_steps)
    physics = _physics(random, weights, sequences * length, length, published, spread=spread)
    known = np.where(tuned[:, None], np.nan, np.stack([rate, batch], axis=1))
    return Instances(
        physics=_pretrained(random, physics, tuned, rate, sharp=widening.sharp_fine_tuning),
        sensors=_sensors(random, physics, spread),
        hardware=_hardware(random, weights, length, start, devices),
        sequences=sequences,
        data=data,
        overfitting=np.where(tuned, between(random, n, 0.003, 0.06), between(random, n, 0.002, 0.05)),
        start_batch=start,
        prunes=np.zeros(n, dtype=np.bool_),
        pruning_cost=between(random, n, 0.003, 0.05),
        kind=kinds,
        n_parameters=weights,
        sequence_length=length,
        machine_batches=limits,
        advice=known,
        searched_rate=np.where(tuned, 10.0 * rate, rate),  # little signal and few steps ask for more
    )


def place_edges(
    instances: Instances, references: References, random: np.random.Generator, widening: Widening
) -> Instances:
    """Return instances with the best learning rates of fine-tuning in their ranges, and with an edge in some.

    Where physics were perturbed to a best setting that is far from all that was published, another instance takes their
    place: about a tenth of them have a spurious optimum at small batches and low rates. The same goes for sharp
    fine-tuning that no setting gains anything by.

    Args:
        instances: Instances without edge, of any kind.
        references: Their tuned statics.
        random: Random numbers.
        widening: Share of instances that get an edge, and its distance from the best learning rate.
    """
    instances, references = instances.copy(), references.copy()
    replaced = [_odd(instances, references)]
    if widening.sharp_fine_tuning:
        replaced.append(_useless(instances, references))
    for odd, others in replaced:
        if others.size:
            chosen = random.choice(others, odd.size)
            instances.put(odd, instances.take(chosen))
            references.put(odd, references.take(chosen))
    physics, n = instances.physics, len(instances)
    batch, start = references.batch.astype(np.float64), instances.start_batch
    best = references.rate * neutral_factor(batch, start)
    tuned = instances.kind == FINE_TUNING
    adapters = random.random(n) < LORA_SHARE
    wanted = np.where(adapters, between(random, n, *LORA_RATES), between(random, n, *FINE_TUNED_RATES))
    factor = np.where(tuned, best / wanted, 1.0)
    rescale(physics.values, factor)
    instances.searched_rate = instances.searched_rate / factor
    steps = instances.sequences / start
    exponent, over = between(random, n, 0.01, 0.4), between(random, n, *widening.edge_over_best)
    unlearnt = (FRESH_LOSS - physics.values["floor"]) / physics.amplitude  # a trained model loses more than it gained
    drawn = {
        "edge_rate": best / factor * over / RATE_UNIT / batch**exponent,
        "edge_batch": exponent,
        "edge_warmup": np.clip(between(random, n, *WARMUP_STEPS), 1.0, 0.15 * steps + 1.0),
        "edge_patience": np.maximum(steps * between(random, n, 0.002, 0.05), 1.0),
        "edge_damage": between(random, n, 0.3, 1.5) * np.where(tuned, unlearnt, 1.0),
    }
    with_edge = random.random(n) < widening.edges
    for name in EDGE:
        physics.values[name] = np.where(with_edge, drawn[name], physics.values[name])
    return instances


def _odd(instances: Instances, references: References) -> tuple[Ints, Ints]:
    """Return the rows trained from scratch whose best setting is far from Step Law's, and the other such rows."""
    advised_rate, advised_batch = instances.advice.T
    batch = references.batch.astype(np.float64)
    rate = references.rate * neutral_factor(batch, instances.start_batch)
    at_batch = advised_rate * np.minimum(neutral_factor(batch, advised_batch), 1.0)
    far = np.maximum(np.abs(np.log(rate / at_batch)), np.log(advised_batch / batch)) > np.log(FAR)
    scratch = instances.kind == SCRATCH
    return np.flatnonzero(scratch & far), np.flatnonzero(scratch & ~far)


def _useless(instances: Instances, references: References) -> tuple[Ints, Ints]:
    """Return the rows of fine-tuning that hardly lower the loss under the best setting, and the other such rows."""
    tuned = instances.kind == FINE_TUNING
    gained = references.losses[:, -1] < (1.0 - LEAST_GAIN) * instances.physics.initial_loss
    return np.flatnonzero(tuned & ~gained), np.flatnonzero(tuned & gained)


def _physics(
    random: np.random.Generator,
    weights: Floats,
    tokens: Floats,
    length: Floats,
    published: Sequence[FittedPhysics],
    *,
    spread: float,
) -> Physics:
    """Interpolate between pairs of published models, take them to each size, and perturb each parameter.

    With the size go the floor and the unit of learning rates. A budget beyond the published ones becomes the nearest of
    them in other units: its batches, steps and learning rates correspond to those of Step Law. So nothing else is
    extrapolated; the physics themselves, at budgets far from the published ones, have spurious optima at small batches.
    """
    n = len(weights)
    sizes = np.log([each.n_parameters or np.nan for each in published])
    one, other = random.integers(len(published), size=(2, n))
    share = random.random(n)

    def drawn(numbers: Floats) -> Floats:
        mixed: Floats = share * numbers[one] + (1 - share) * numbers[other]
        return mixed

    values: dict[str, Floats] = {}
    for name in NAMES:
        known = np.log([each.values[name] for each in published])
        width = 0.0 if name in NOT_FITTED else spread * PARAMETER_SPREAD
        moved = 0.0 if name in LATE else width * random.normal(size=n)
        values[name] = np.exp(drawn(known) + moved)
        if name != "floor":
            values[name] = np.clip(values[name], PARAMETERS[name].low, PARAMETERS[name].high)
    grown = np.log(weights) - drawn(sizes)
    initial = np.exp(drawn(np.log([each.initial_loss for each in published])) + 0.03 * random.normal(size=n))
    values["floor"] = np.clip(values["floor"] * np.exp(FLOOR_OF_SIZE * grown), 0.8, 0.6 * initial)
    beyond = np.clip(tokens, *PUBLISHED_TOKENS) / tokens
    values["floor"] *= beyond**-FLOOR_OF_TOKENS
    _stretch(values, beyond**BATCH_OF_TOKENS * length / PUBLISHED_SEQUENCE, beyond ** (1.0 - BATCH_OF_TOKENS))
    unit = RATE_OF_SIZE * grown + RATE_OF_TOKENS * np.log(beyond) + spread * RATE_SPREAD * random.normal(size=n)
    rescale(values, np.exp(unit))
    return Physics(values=values, initial_loss=initial, weight_decay=np.full(n, published[0].weight_decay))


def _stretch(values: dict[str, Floats], batch: Floats, steps: Floats) -> None:
    """Change the units of batches and steps: a batch and a step become what `batch` and `steps` of them were."""
    values["gradient_noise"] /= batch
    values["stall_rate"] *= batch ** (values["stall_batch"] / values["stall_power"])
    for name in ("rate", "growth", "shrinking"):
        values[name] *= steps
    values["youth"] /= steps


def _pretrained(random: np.random.Generator, physics: Physics, tuned: Bools, rate: Floats, *, sharp: bool) -> Physics:
    """Give a head start to some: their modes are used up as far as an earlier training went, but for a new text.

    Their weights have grown in it, at the learning rate `rate`, and are the unit of those to come. Their noise is
    proportional to the learning rate: the power of published runs, fitted within a factor of ten of their best rates,
    would let the loss rise above that of the given model at rates too low to change it.
    """
    n = len(tuned)
    _grow(physics, tuned, rate / RATE_UNIT)
    v, unit = physics.values, rate / RATE_UNIT
    v["noise"] = np.where(tuned, v["noise"] * unit ** (v["noise_power"] - 1.0), v["noise"])
    v["noise_power"] = np.where(tuned, 1.0, v["noise_power"])
    path, shift = between(random, n, 1e3, 1e6), between(random, n, *SHIFT)
    used = np.exp(-path[:, None] * RELATIVE_RATES)
    again = shift[:, None]
    if sharp:
        v["slow_noise"] = np.where(tuned, v["slow_noise"] * between(random, n, *FORGETTING), v["slow_noise"])
        back = physics.shares * (1.0 - used)
        slower = RELATIVE_RATES ** -(random.uniform(*SLOWNESS, n) * v["spectrum"])[:, None]
        again = slower * (shift * back.sum(axis=1) / (back * slower).sum(axis=1))[:, None]
    left = np.where(tuned[:, None], used + again * (1.0 - used), 1.0)
    initial = physics.values["floor"] + physics.amplitude * (physics.shares * left).sum(axis=1)
    return Physics(
        values=physics.values,
        initial_loss=np.where(tuned, initial, physics.initial_loss),
        weight_decay=np.where(tuned, 0.01, physics.weight_decay),
        left=left,
    )


def _grow(physics: Physics, grown: Bools, rate: Floats) -> None:
    """Take weights that an earlier training at `rate`, in rate units, has made grow as the unit of some physics."""
    v = physics.values
    shrinking = 2.0 * RATE_UNIT * physics.weight_decay * v["shrinking"] * rate
    left = np.exp(-shrinking * EARLIER_STEPS)
    squared = left + v["growth"] * EARLIER_MOMENTUM_POWER * rate**2 * (1.0 - left) / shrinking
    weights = np.where(grown, np.sqrt(squared), 1.0)
    v["rate"] *= weights ** -v["growth_power"]
    v["stall_rate"] *= weights ** v["stall_growth"]
    v["noise"] *= weights ** (-v["noise_growth"] * v["noise_power"])
    v["growth"] /= weights**2
    v["update"] /= weights


def _batches(
    random: np.random.Generator, sequences: Floats, advised: Floats, weights: Floats, least_steps: Ints
) -> tuple[Ints, Ints, Floats]:
    """Return starting batches around the advised ones, what the machine runs, (n, 2), and its number of devices.

    At the start an interval has at least `least_steps` steps, unless a batch of one sequence has fewer.
    """
    n = len(sequences)
    most = np.minimum(np.log2(sequences / DECISIONS / least_steps), np.log2(LARGEST_BATCH))
    most = np.floor(np.maximum(most, 0.0))
    start = np.clip(np.round(np.log2(advised) + random.normal(size=n)), 0.0, most)
    devices = np.exp2(np.clip(np.round(np.log2(weights / 2.5e8) + random.uniform(-1.0, 3.0, n)), 0.0, 10.0))
    least = np.clip(np.round(np.log2(devices) - random.uniform(0.0, 3.0, n)), 0.0, np.maximum(start - 1.0, 0.0))
    largest = np.clip(start + np.round(random.uniform(1.0, 7.0, n)), start, np.maximum(most, start))
    limits: Ints = np.exp2(np.stack([least, largest], axis=1)).astype(np.int64)
    return np.exp2(start).astype(np.int64), limits, devices


def _hardware(random: np.random.Generator, weights: Floats, length: Floats, start: Ints, devices: Floats) -> Hardware:
    """Return GPUs whose throughput has half its height at a batch of some tokens on each, and that draw much at once.

    Measured on A40, V100 and RTX 6000 (You et al. 2023, Zeus, Apache-2.0): a step of BERT has half its throughput at
    less than 1 k to about 3 k tokens, and then draws 0.65 to 0.95 of the watts of a large batch. Devices that exchange
    gradients need more.
    """
    n = len(weights)
    sequence_s = 6.0 * weights * length / (devices * between(random, n, 2e13, 3e14))
    half = devices * between(random, n, 500.0, 30_000.0) / length
    speed = np.ones((n, len(PRECISIONS)))
    masked = np.ones((n, len(PRECISIONS)), dtype=np.bool_)
    masked[:, PRECISIONS.index("fp32")] = False
    for name, low, high in (("tf32", 1.1, 2.0), ("bf16", 1.2, 3.0), ("fp16", 1.1, 2.8)):
        column = PRECISIONS.index(name)
        speed[:, column] = random.uniform(low, high, n)
        masked[:, column] = random.random(n) < 0.3
    load = devices * between(random, n, 200.0, 700.0)
    return Hardware(
        overhead_s=sequence_s * half,
        sequence_s=sequence_s,
        speed=speed,
        masked=masked,
        width_share=random.uniform(0.3, 0.7, n),
        idle_w=load * random.uniform(0.35, 0.95, n),
        load_w=load,
        switch_s=sequence_s * start * between(random, n, 0.1, 20.0),
        memory_share=between(random, n, 0.05, 0.9),
    )


def _sensors(random: np.random.Generator, physics: Physics, spread: float) -> Sensors:
    n = len(physics.initial_loss)

    def around(typical: float | Floats, width: float) -> Floats:
        drawn: Floats = typical * np.exp(width * spread * random.normal(size=n))
        return drawn

    return Sensors(
        loss_spread=around(0.4, 0.3),
        validation_gap=0.04 * spread * random.normal(size=n),
        noise_scale=around(physics.values["gradient_noise"], 0.5),
        gradient_norm=around(2.0, 0.7),
        curvature=around(2.5e-3, 0.5),
        curvature_memory=random.uniform(0.8, 1.5, n),
        probe_spread=around(0.8, 0.2),
        alarm=between(random, n, 0.1, 1.0),
    )
