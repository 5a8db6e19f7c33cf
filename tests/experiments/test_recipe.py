"""Recipes are read with every name checked; the first fault is one line."""

from pathlib import Path

import pytest

from trainpilot.experiments.compare.cases import load_cases
from trainpilot.experiments.recipe import load_recipe


def test_shipped_recipes_load_and_vary() -> None:
    demo, tiny = load_recipe("demo"), load_recipe("tiny")
    assert len(demo.live_cases()) == len(demo.vary["base_learning_rate"]) * len(demo.vary["seed"])
    assert {case.model for case in tiny.live_cases()} == {"llama-nano", "gpt2-nano"}


def test_changes_reach_their_place() -> None:
    recipe = load_recipe("demo", ["ppo.learning_rate=1e-3", "ppo.hidden=[32]", "n_envs=3", "vary.seed=[7]"])
    assert recipe.ppo.learning_rate == pytest.approx(1e-3)
    assert recipe.ppo.hidden == (32,)
    assert recipe.n_envs == 3
    assert {case.seed for case in recipe.live_cases()} == {7}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("common: {tokens: 200000, text: stdlib}\nppo: {total_decisions: 10}\n")
    recipe = load_recipe(str(path))
    assert recipe.live_cases()[0].tokens == 200_000
    assert recipe.live_cases()[0].text == ("stdlib",)
    assert recipe.reference_cases() == recipe.live_cases()


def test_the_default_recipe_is_a_simulator_stage_alone() -> None:
    recipe = load_recipe("default")
    assert recipe.simulator is not None
    assert recipe.simulator.ppo.total_decisions == 24_000_000
    assert recipe.simulator.widening.spread == 1.0
    assert recipe.ppo.total_decisions == 0
    assert list(recipe.simulator.agents) == [0, 1]
    assert "step-law-429M" not in recipe.simulator.widening.published
    assert recipe.live_cases() == ()


def test_live_stage_of_the_default_recipe_has_its_cases_and_schedule() -> None:
    recipe = load_recipe("default", ["ppo.total_decisions=2000"])
    cases = recipe.live_cases()
    assert [case.base_learning_rate for case in cases] == [c.config.base_learning_rate for c in load_cases("train")]
    assert {(case.schedule, case.warmup_tokens, case.decisions) for case in cases} == {("wsd", 16_384, 50)}
    assert {case.base_learning_rate for case in recipe.reference_cases()} == {3e-3}


def test_live_cases_take_vocabularies(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("common: {vocabulary: 1024}\nvary: {vocabulary: [2048, 4096]}\nppo: {total_decisions: 10}\n")
    assert [case.vocabulary for case in load_recipe(str(path)).live_cases()] == [2048, 4096]


def test_changes_reach_the_simulator_stage() -> None:
    recipe = load_recipe("default", ["simulator.hide=[curvature]", "simulator.seeds=3"])
    assert recipe.simulator is not None
    assert recipe.simulator.hide == ("curvature",)
    assert list(recipe.simulator.agents) == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (None, [], "recipe must be one of default, demo, tiny or a YAML file, got '.*nope.yaml'"),
        ("- a\n- b\n", [], "must hold names and values, got list"),
        ("a: [\n", [], "is not readable YAML"),
        ("colour: red\n", [], "'colour' is unknown; known are simulator, cases, common"),
        ("cases: train\ncommon: {tokens: 5}\n", [], "cases cannot be combined with common or vary, got 'train'"),
        ("cases: nowhere\n", [], "cases must be one of .*got 'nowhere'"),
        ("reference_learning_rate: -1\n", [], "reference_learning_rate must be a positive number, got -1"),
        ("ppo: {total_decisions: 0}\n", [], "must be at least 1 where there is no simulator stage, got 0"),
        ("simulator: {runs: 3}\n", [], "simulator.*runs"),
        ("simulator: {seeds: 0}\n", [], "simulator.seeds must be a whole number of at least 1, got 0"),
        ("simulator: {hide: [colour]}\n", [], "hide must name observation fields .*got 'colour'"),
        ("simulator: {stack: 7}\n", [], "stack must be a whole number of at most 6, got 7"),
        ("simulator: {start_rates: [10, 1]}\n", [], "start_rates must be two rising positive numbers"),
        ("simulator: {utility: best}\n", [], "simulator.utility must be one of linear"),
        ("simulator: {validation: {seed: 1}}\n", [], "validation.seed must be none of the agents' own seeds, got 1"),
        ("simulator: {widening: {noise_batch: [0.5, 0.1]}}\n", [], "widening.noise_batch must be two rising numbers"),
        (
            "simulator: {widening: {published: [step-law-7B]}}\n",
            [],
            "published must be names among .*got 'step-law-7B'",
        ),
        ("simulator: {widening: {weights: [1e9, 1e8]}}\n", [], "widening.weights must be two rising positive numbers"),
        ("simulator: {widening: {spread: -1}}\n", [], r"widening.spread must be in \[0, 10\], got -1"),
        ("simulator: {widening: {edges: 2}}\n", [], r"edges must be in \[0, 1\], got 2"),
        ("simulator: {widening: {scratch: 0.6, fine_tuning: 0.6}}\n", [], "scratch . fine_tuning at most 1, got"),
        ("simulator: {start_advised: -1}\n", [], r"start_advised must be in \[0, 1\], got -1"),
        ("simulator: {ppo: {total_decisions: 0}}\n", [], "total_decisions must be a whole number of at least 1, got 0"),
        ("simulator: {decisions: 20}\n", [], "decisions must be the same .* got 20, 50"),
        ("common: {tokns: 5}\n", [], "'tokns' is unknown"),
        ("common: {tokens: many}\n", [], "tokens: .*got 'many'"),
        ("common: {tokens: -5}\n", [], "tokens must be a whole number of at least 1, got -5$"),
        ("ppo: {gamma: high}\n", [], "ppo.gamma"),
        ("ppo: {gama: 1}\n", [], "gama"),
        ("simulator: {calibrations: []}\n", [], r"simulator.calibrations must name at least one, .* got \(\)"),
        ("vary: {seed: []}\n", [], "vary must list at least one value of seed, got none"),
        ("utility: best\n", [], "utility must be one of linear"),
        ("vary: {decisions: [10, 20]}\n", [], "decisions must be the same"),
        ("{}\n", ["ppo"], "set must look like key=value, got 'ppo'"),
        ("n_envs: 2\n", ["n_envs.x=1"], "has no fields below it"),
    ],
)
def test_faults_are_one_line(tmp_path: Path, text: str | None, changes: list[str], message: str) -> None:
    path = tmp_path / ("nope.yaml" if text is None else "r.yaml")
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(str(path), changes)
    assert any(name in str(caught.value) for name in ("recipe", "set", "cases"))
