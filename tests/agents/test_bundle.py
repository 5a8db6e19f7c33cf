"""A bundle keeps what it was given, runs no code when loaded, and refuses what does not fit, naming it."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fakes import make_limits
from policies import N_CHOICES, N_INPUTS, random_weights
from safetensors.numpy import save_file

from trainpilot.agents import bundle as bundle_module
from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, field_tables, policy_digest, policy_path
from trainpilot.agents.controller import Controller, keep
from trainpilot.envs.action import ACTION_FIELDS, KEEP
from trainpilot.envs.decision import N_STACK, Preference
from trainpilot.envs.observation import OBSERVATION_FIELDS


def write_raw(path: Path, weights: dict[str, np.ndarray], content: object) -> None:
    save_file(weights, path, metadata={"trainpilot": json.dumps(content)})


def header(**changes: object) -> dict[str, object]:
    return {"format": 1, "fields": field_tables(), "provenance": {}, **changes}


def test_round_trip_gives_the_same_logits_and_provenance(tmp_path: Path) -> None:
    bundle = PolicyBundle(random_weights(), {"decisions": 25, "recipe": "demo"})
    bundle.save(tmp_path / "policy.safetensors")
    loaded = PolicyBundle.load(tmp_path / "policy.safetensors")
    observation = np.random.default_rng(1).uniform(-1, 1, N_INPUTS).astype(np.float32)
    np.testing.assert_array_equal(loaded.logits(observation), bundle.logits(observation))
    assert loaded.provenance == {"decisions": 25, "recipe": "demo"}
    assert loaded.decisions == 25
    assert [p.name for p in tmp_path.iterdir()] == ["policy.safetensors"]


def test_logits_by_hand() -> None:
    weights = {name: np.zeros_like(value) for name, value in random_weights().items()}
    weights["hidden.0.bias"][0] = 0.5
    weights["action.weight"][3, 0] = 2.0
    logits = PolicyBundle(weights).logits(np.zeros(N_INPUTS, np.float32))
    assert logits[3] == pytest.approx(2 * np.tanh(0.5))
    assert np.count_nonzero(logits) == 1


def test_act_takes_the_most_likely_allowed_choice() -> None:
    weights = {name: np.zeros_like(value) for name, value in random_weights().items()}
    weights["action.bias"] = np.arange(N_CHOICES, dtype=np.float32)
    bundle, observation = PolicyBundle(weights), np.zeros(N_INPUTS, np.float32)
    last = tuple(len(field.choices) - 1 for field in ACTION_FIELDS)
    assert bundle.act(observation, np.ones(N_CHOICES, bool)) == last
    only_keep = np.concatenate([np.arange(len(f.choices)) == f.keep for f in ACTION_FIELDS])
    assert bundle.act(observation, only_keep) == KEEP


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("should-not-exist"),))  # type: ignore[return-value]


def test_a_pickle_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "policy.safetensors"
    path.write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(ValueError, match="pickle or an SB3 zip"):
        PolicyBundle.load(path)
    assert not Path("should-not-exist").exists()


def test_an_sb3_zip_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as archive:
        archive.writestr("data", "{}")
    with pytest.raises(ValueError, match="SB3 zip"):
        PolicyBundle.load(tmp_path / "model.zip")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header(format=99), "format 99, expected 1"),
        (header(fields={**field_tables(), "n_stack": 2}), "n_stack 2, expected 6"),
        ([], "no JSON object"),
    ],
)
def test_a_wrong_header_is_refused(tmp_path: Path, content: object, message: str) -> None:
    write_raw(tmp_path / "p.safetensors", random_weights(), content)
    with pytest.raises(ValueError, match=message):
        PolicyBundle.load(tmp_path / "p.safetensors")


def test_changed_fields_are_refused_by_name(tmp_path: Path) -> None:
    tables = field_tables()
    curvature = next(f for f in tables["observations"] if f["name"] == "curvature")
    for change, message in (
        ({"name": "mood"}, "observations: 'mood' is unknown"),
        ({"high": 7}, "observations: 'curvature' is .*'high': 7.*, expected .*'high': 5"),
        ({"name": "noise_scale", "low": -2, "high": 3}, "observations: 'noise_scale' is listed twice"),
    ):
        changed = [{**f, **change} if f == curvature else f for f in tables["observations"]]
        write_raw(tmp_path / "p.safetensors", random_weights(), header(fields={**tables, "observations": changed}))
        with pytest.raises(ValueError, match=message) as caught:
            PolicyBundle.load(tmp_path / "p.safetensors")
        assert "\n" not in str(caught.value)
    tables["actions"][0]["choices"][0] = "x0.25"
    write_raw(tmp_path / "q.safetensors", random_weights(), header(fields=tables))
    with pytest.raises(ValueError, match=r"actions: 'learning_rate' is .*x0\.25"):
        PolicyBundle.load(tmp_path / "q.safetensors")


def test_a_bundle_may_list_fewer_fields_in_an_order_of_its_own(tmp_path: Path) -> None:
    fields = (OBSERVATION_FIELDS[3], OBSERVATION_FIELDS[0])
    weights = {"action.weight": np.ones((N_CHOICES, N_STACK * 2), np.float32), "action.bias": np.zeros(N_CHOICES, "f4")}
    PolicyBundle(weights, {}, fields).save(tmp_path / "p.safetensors")
    loaded = PolicyBundle.load(tmp_path / "p.safetensors")

    assert loaded.fields == fields
    state = Controller.of_bundle(loaded, make_limits(), Preference()).state
    assert list(state.fields()) == [field.name for field in fields]
    assert loaded.act(state.observation(), state.action_masks())
    tables = {**field_tables(fields), "observations": []}
    write_raw(tmp_path / "q.safetensors", weights, header(fields=tables))
    with pytest.raises(ValueError, match="observations: there are none"):
        PolicyBundle.load(tmp_path / "q.safetensors")


def test_a_policy_of_version_0_1_sees_the_fields_that_it_learnt_from() -> None:
    golden = Path(__file__).parents[1] / "golden"
    bundle = PolicyBundle.load(golden / "version_0_1" / "default.safetensors")
    recorded = json.loads((golden / "fields.json").read_text())["observation"]
    state = Controller.of_bundle(bundle, make_limits(), Preference()).state

    assert [field.name for field in bundle.fields] == list(state.fields()) == [each["name"] for each in recorded[:34]]
    assert Controller(bundle.act, make_limits(), Preference()).state.observation().size == N_STACK * 34
    assert Controller(keep, make_limits(), Preference()).state.observation().size == N_INPUTS


def test_a_policy_may_begin_at_a_lower_learning_rate(tmp_path: Path) -> None:
    for stored, scale in (({}, 1.0), ({"start_scale": 0.25}, 0.25)):
        PolicyBundle(random_weights(), stored).save(tmp_path / "p.safetensors")
        loaded = PolicyBundle.load(tmp_path / "p.safetensors")
        state = Controller.of_bundle(loaded, make_limits(), Preference()).state

        assert loaded.start_scale == state.controls.learning_rate_scale == scale
        assert state.decide(KEEP).controls.learning_rate_scale == scale
        assert state.decide((6, *KEEP[1:])).controls.learning_rate_scale == 2 * scale
        assert state.anew().controls.learning_rate_scale == scale
        assert state.limits.start.learning_rate_scale == 1  # the base schedule itself
    for wrong in (0, "half", 1.5):
        PolicyBundle(random_weights(), {"start_scale": wrong}).save(tmp_path / "p.safetensors")
        with pytest.raises(ValueError, match=r"start_scale must be a number in \(0, 1\], got"):
            PolicyBundle.load(tmp_path / "p.safetensors")


def test_wrong_weights_are_refused(tmp_path: Path) -> None:
    weights = random_weights()
    weights["hidden.0.weight"] = weights["hidden.0.weight"][:, :-1].copy()
    write_raw(tmp_path / "p.safetensors", weights, header())
    with pytest.raises(ValueError, match=rf"hidden\.0 must map {N_INPUTS} inputs"):
        PolicyBundle.load(tmp_path / "p.safetensors")
    weights = random_weights()
    weights["action.bias"][0] = np.nan
    write_raw(tmp_path / "q.safetensors", weights, header())
    with pytest.raises(ValueError, match="not finite"):
        PolicyBundle.load(tmp_path / "q.safetensors")


def test_other_files_are_refused_in_one_line(tmp_path: Path) -> None:
    for name, content in {"text": b"hello", "empty": b"", "foreign": None}.items():
        path = tmp_path / name
        if content is None:
            save_file({"a": np.zeros(2, np.float32)}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match="not a trainpilot bundle") as caught:
            PolicyBundle.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no file"):
        PolicyBundle.load(tmp_path / "missing")


@pytest.fixture
def policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "policies"
    folder.mkdir()
    PolicyBundle(random_weights()).save(folder / "default.safetensors")
    monkeypatch.setattr(bundle_module, "POLICIES", folder)
    return folder


def test_a_bare_name_is_a_policy_that_comes_with_trainpilot(policies: Path) -> None:
    assert policy_path("default") == policies / "default.safetensors"


@pytest.mark.parametrize("name", ["default.safetensors", "./default", "runs/default", "folder/"])
def test_a_suffix_or_a_folder_makes_it_a_path(policies: Path, name: str) -> None:
    assert policy_path(name) == Path(name)


@pytest.mark.parametrize("name", ["nope", "", ".."])
def test_an_unknown_name_is_refused_with_those_that_exist(policies: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"policy: no policy named .* comes with trainpilot, which has: default;"):
        policy_path(name)


def test_every_policy_that_comes_with_trainpilot_loads() -> None:
    for name in bundle_module.shipped_policies():
        assert PolicyBundle.load(policy_path(name)).weights


def test_a_bundle_brings_its_base_schedule(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    PolicyBundle(random_weights(), {"base_schedule": {"schedule": "wsd", "warmup_share": 0.1}}).save(path)
    base = PolicyBundle.load(path).base_schedule
    assert base == BaseSchedule(schedule="wsd", warmup_share=0.1)
    assert base.warmup_tokens(1_000_000) == 100_000
    assert PolicyBundle(random_weights()).base_schedule is None


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"schedule": "wave", "warmup_share": 0.1}, "schedule must be one of .*, got 'wave'"),
        ({"schedule": ["wsd"], "warmup_share": 0.1}, "schedule must be one of"),
        ({"schedule": "wsd", "warmup_share": 1.0}, r"warmup_share must be in \[0, 1\), got 1.0"),
        ({"schedule": "wsd", "warmup_share": "much"}, r"warmup_share must be in \[0, 1\), got 'much'"),
        ({"schedule": "wsd"}, "base_schedule: .*warmup_share"),
        ("wsd", "base_schedule"),
    ],
)
def test_a_wrong_base_schedule_is_refused_when_loaded(tmp_path: Path, stored: object, message: str) -> None:
    path = tmp_path / "p.safetensors"
    write_raw(path, random_weights(), header(provenance={"base_schedule": stored}))
    with pytest.raises(ValueError, match=message) as caught:
        PolicyBundle.load(path)
    assert str(path) in str(caught.value)


def test_the_digest_tells_files_apart(tmp_path: Path) -> None:
    for seed in (0, 0, 1):
        PolicyBundle(random_weights(seed)).save(tmp_path / f"{seed}.safetensors")
    first = policy_digest(tmp_path / "0.safetensors")
    assert first != policy_digest(tmp_path / "1.safetensors")
    PolicyBundle(random_weights(0)).save(tmp_path / "again.safetensors")
    assert first == policy_digest(tmp_path / "again.safetensors")


def test_logits_of_many_observations_are_those_of_each() -> None:
    bundle = PolicyBundle(random_weights())
    many = np.random.default_rng(1).uniform(-1, 1, (3, 2, N_INPUTS)).astype(np.float32)
    assert bundle.logits(many).shape == (3, 2, N_CHOICES)
    np.testing.assert_allclose(bundle.logits(many)[2, 1], bundle.logits(many[2, 1]), rtol=1e-4, atol=1e-5)
