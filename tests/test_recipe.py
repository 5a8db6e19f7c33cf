"""Recipes are read with every name checked; the first fault is one line."""

from pathlib import Path

import pytest

from trainpilot.experiments.recipe import load_recipe


def test_shipped_recipes_load_and_vary() -> None:
    demo, tiny = load_recipe("demo"), load_recipe("tiny")
    assert len(demo.cases()) == len(demo.vary["base_learning_rate"]) * len(demo.vary["seed"])
    assert {case.model for case in tiny.cases()} == {"llama-nano", "gpt2-nano"}


def test_changes_reach_their_place() -> None:
    recipe = load_recipe("demo", ["ppo.learning_rate=1e-3", "ppo.hidden=[32]", "n_envs=3", "vary.seed=[7]"])
    assert recipe.ppo.learning_rate == pytest.approx(1e-3)
    assert recipe.ppo.hidden == (32,)
    assert recipe.n_envs == 3
    assert {case.seed for case in recipe.cases()} == {7}


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("common: {tokens: 200000, text: stdlib}\nppo: {total_decisions: 10}\n")
    recipe = load_recipe(str(path))
    assert recipe.cases()[0].tokens == 200_000
    assert recipe.cases()[0].text == ("stdlib",)


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (None, [], "recipe must be one of demo, tiny or a YAML file, got '.*nope.yaml'"),
        ("- a\n- b\n", [], "must hold names and values, got list"),
        ("a: [\n", [], "is not readable YAML"),
        ("colour: red\n", [], "'colour' is unknown; known are common"),
        ("common: {tokns: 5}\n", [], "'tokns' is unknown"),
        ("common: {tokens: many}\n", [], "tokens: .*got 'many'"),
        ("common: {tokens: -5}\n", [], "tokens must be a whole number of at least 1, got -5$"),
        ("ppo: {gamma: high}\n", [], "ppo.gamma"),
        ("ppo: {gama: 1}\n", [], "gama"),
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
    assert "recipe" in str(caught.value) or "set" in str(caught.value)
