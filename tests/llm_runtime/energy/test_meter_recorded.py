"""A recording survives the round trip through CSV and is played back in order."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainpilot.llm_runtime.energy.meter import EnergyReading, RecordedMeter, read_recording, write_recording

READINGS = [
    EnergyReading(time_s=0.1, energy_j=0.0, source="measured_counter"),
    EnergyReading(
        time_s=1 / 3,
        energy_j=150.0625,
        source="measured_power",
        power_w=301.5,
        power_limit_w=700.0,
        utilisation=0.97,
        memory_used_bytes=150_000_000_000,
        memory_total_bytes=150_754_820_096,
    ),
    EnergyReading(time_s=2.0, energy_j=None, source=None),
]
HEADER = "time_s,energy_j,source,power_w,power_limit_w,utilisation,memory_used_bytes,memory_total_bytes"


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    write_recording(path, READINGS)

    assert read_recording(path) == READINGS
    assert path.read_text().splitlines()[:2] == [HEADER, "0.1,0.0,measured_counter,,,,,"]


def test_playback_repeats_the_last_reading(tmp_path: Path) -> None:
    path = tmp_path / "recording.csv"
    write_recording(path, READINGS[:2])
    meter = RecordedMeter(path)

    assert [meter.read() for _ in range(4)] == [READINGS[0], READINGS[1], READINGS[1], READINGS[1]]
    assert meter.description == "2 recorded readings from recording.csv"
    meter.close()


def test_a_list_plays_too() -> None:
    assert RecordedMeter(READINGS).read() is READINGS[0]


def test_an_empty_recording_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 reading, got 0"):
        RecordedMeter([])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("time_s,joules\n0,1\n", "columns missing or unknown: energy_j, joules, memory"),
        ("", "columns missing or unknown"),
        (f"{HEADER}\n,1,estimated,,,,,\n", "line 2: time_s is empty"),
        (f"{HEADER}\n0,many,estimated,,,,,\n", "line 2: energy_j must be a finite number, got 'many'"),
        (f"{HEADER}\n0,nan,estimated,,,,,\n", "energy_j must be a finite number, got 'nan'"),
        (f"{HEADER}\n0,1,guessed,,,,,\n", "source must be one of .*, got 'guessed'"),
        (f"{HEADER}\n0,1,estimated,,,,1.5,\n", "memory_used_bytes must be a finite number, got '1.5'"),
        (f"{HEADER}\n0,1,estimated\n", "line 2: expected 8 cells"),
        (f"{HEADER}\n0,1,estimated,,,,,,9\n", "line 2: expected 8 cells"),
    ],
)
def test_a_faulty_recording_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recording.csv"
    path.write_text(text)

    with pytest.raises(ValueError, match=message):
        read_recording(path)
