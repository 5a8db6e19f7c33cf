from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainpilot.experiments import doctor
from trainpilot.experiments import doctor as machine
from trainpilot.experiments.doctor import diagnose, print_report
from trainpilot.llm_runtime.energy.host import RaplMeter
from trainpilot.llm_runtime.energy.meter import EnergyMeter, EnergyReading
from trainpilot.llm_runtime.timing import alternating_seconds

PAYOFF = {
    "model": "llama-micro",
    "batch_size": 4,
    "rounds": 5,
    "precision": {"fp32": 1.0, "bf16": 0.6},
    "batch": 0.7,
    "width": 0.97,
    "spread": 1.1,
}


class Meter(EnergyMeter):
    """A meter that counts 50 J from one reading to the next, a tenth of a second apart."""

    description = "test meter"

    def __init__(self) -> None:
        self.readings = 0
        self.closed = False

    def read(self) -> EnergyReading:
        self.readings += 1
        return EnergyReading(time_s=self.readings / 10, energy_j=50.0 * self.readings, source="measured_counter")

    def close(self) -> None:
        self.closed = True


def printed(report: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_report(report, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "MAX_ROUNDS", 1)
        lines: list[str] = []
        found = diagnose(lines.append)
        assert len(lines) == 4, "one line before each part"
        return found


def test_the_report_is_plain_json_and_can_be_printed(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    text = printed(report)
    for word in ("versions", "energy", "corpus stdlib", "cache", "learning_rate", "batch_size", "precision", "pruning"):
        assert word in text


def test_devices_threads_and_corpora_are_named(report: dict[str, Any]) -> None:
    host = report["devices"][-1]
    assert (host["kind"], host["compute_capability"]) == ("cpu", None)
    assert report["threads"]["torch"] >= 1
    assert report["corpora"]["stdlib"]["bytes"] > 5e6
    assert report["corpora"]["hub"]["offline"] is True, "the tests set HF_HUB_OFFLINE"
    assert report["corpora"]["hub"]["network_tried"] is False


def test_a_mac_s_gpu_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    monkeypatch.setattr("torch.mps.recommended_max_memory", lambda: 2**34)
    assert [(each.kind, each.memory_bytes) for each in doctor.devices()][-2] == ("mps", 2**34)


def test_the_estimate_is_called_one(report: dict[str, Any]) -> None:
    estimate = report["energy"]["meters"]["cpu_estimate"]

    assert estimate["available"] is True
    assert estimate["source"] == "estimated"
    assert 0.1 < estimate["power_w"] < 2000


def test_every_control_has_a_verdict(report: dict[str, Any]) -> None:
    assert set(report["controls"]) == {"learning_rate", "batch_size", "precision", "pruning"}
    assert all(about["verdict"] for about in report["controls"].values())


def test_every_meter_is_read_over_the_same_second_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, second = Meter(), Meter()

    def broken() -> Meter:
        raise RuntimeError("driver went away")

    monkeypatch.setattr(doctor, "select_meter", lambda _device: chosen)
    monkeypatch.setattr(doctor, "_meters", lambda: {"good": lambda: second, "broken": broken})
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)

    energy = doctor._energy("cpu")

    assert energy["source"] == "measured_counter"
    assert energy["meters"]["good"]["energy_j"] == 50.0
    assert energy["meters"]["good"]["power_w"] == pytest.approx(500.0)
    assert energy["meters"]["broken"]["description"] == "RuntimeError: driver went away"
    assert energy["meters"]["broken"]["power_w"] is None
    assert chosen.closed
    assert second.closed


def test_counters_for_root_only_come_with_the_way_out(tmp_path: Path) -> None:
    reading = doctor._reading("only root may read energy_uj; an administrator can allow it (chmod a+r)", None)
    assert reading["available"] is False
    assert reading["way_out"].startswith("sudo chmod a+r")
    assert doctor._open(lambda: RaplMeter(tmp_path / "none")) == f"no RAPL counter under {tmp_path / 'none'}"


def test_verdicts_follow_the_measured_ratios() -> None:
    lacking = {"tf32": "an NVIDIA GPU format"}
    controls = doctor._controls({"payoff": PAYOFF, "lacking_precisions": lacking})

    assert controls["batch_size"]["pays"] is True
    assert controls["batch_size"]["verdict"] == "pays: four times the batch takes 0.70 of the time per token"
    assert controls["precision"]["verdict"] == "pays: bf16 takes 0.60 of the fp32 time; no tf32 (an NVIDIA GPU format)"
    assert controls["pruning"]["pays"] is False
    assert controls["learning_rate"]["pays"] is None


def test_a_device_with_one_precision_has_nothing_to_switch_to() -> None:
    payoff = PAYOFF | {"precision": {"fp32": 1.0}}
    verdict = doctor._controls({"payoff": payoff, "lacking_precisions": {"bf16": "old"}})["precision"]

    assert (verdict["available"], verdict["pays"]) == (False, False)
    assert verdict["verdict"] == "not available: no bf16 (old)"


def test_a_measurement_that_fails_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(machine, "measure_payoff", fail)
    payoff = doctor._payoff()

    assert payoff == {"error": "RuntimeError: out of memory"}
    controls = doctor._controls({"payoff": payoff, "lacking_precisions": {}})
    assert controls["precision"]["pays"] is None
    assert "out of memory" in controls["precision"]["verdict"]


def test_a_busy_machine_is_told_apart(report: dict[str, Any]) -> None:
    assert "machine is busy" not in printed(report | {"payoff": PAYOFF})
    assert "This machine is busy" in printed(report | {"payoff": PAYOFF | {"spread": 3.0}})


def test_the_cache_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("TRAINPILOT_CACHE", str(folder))
    assert doctor._cache()["bytes"] == 0
    assert not folder.exists(), "looking makes nothing"

    (folder / "text").mkdir(parents=True)
    (folder / "text" / "a.bin").write_bytes(b"x" * 1234)
    cache = doctor._cache()
    assert cache["bytes"] == 1234
    assert cache["free_bytes"] > 0
    assert cache["writable"] is True


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_offline_is_read_and_not_tried(monkeypatch: pytest.MonkeyPatch, value: str, offline: bool) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", value)

    assert doctor._hub()["offline"] is offline


def test_a_missing_package_comes_with_what_to_install() -> None:
    about = doctor._optional("no-such-package-here", "nothing", "trainpilot[x]")

    assert about == {"version": None, "for": "nothing", "way_out": 'pip install "trainpilot[x]"'}


def test_passes_are_timed_in_alternating_order_after_a_warm_up() -> None:
    order: list[str] = []
    times = alternating_seconds(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=7, min_rounds=3, limit_s=0.0
    )

    assert order == ["a", "b"] * 4, "one round of warm-up and three that count"
    assert [len(times["a"]), len(times["b"])] == [3, 3]
