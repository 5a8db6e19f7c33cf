"""Build the fake NVML library and put it under the real pynvml."""

from __future__ import annotations

import atexit
import ctypes
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

NOT_SUPPORTED = 3
FUNCTION_NOT_FOUND = 13
GPU_IS_LOST = 15

UUIDS = [f"GPU-{letter}{letter}000000-0000-0000-0000-00000000000{i}" for i, letter in enumerate("abcdefgh")]


@functools.cache
def build_fake_nvml(*flags: str) -> Path:
    """Compile `fake_nvml.c`; return the folder of `libnvidia-ml.so.1`. Skips the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("the fake NVML needs Linux and a C compiler")
    folder = Path(tempfile.mkdtemp(prefix="fake-nvml-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source, library = Path(__file__).with_name("fake_nvml.c"), folder / "libnvidia-ml.so.1"
    options = ["-shared", "-fPIC", "-O1", "-Wall", "-Wl,-soname,libnvidia-ml.so.1", *flags]
    subprocess.run([compiler, *options, "-o", str(library), str(source)], check=True)
    return folder


class FakeNvml:
    """The state of the fake library, with pynvml already bound to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *flags: str) -> None:
        self._library = ctypes.CDLL(str(build_fake_nvml(*flags) / "libnvidia-ml.so.1"))
        self._library.fake_get.restype = ctypes.c_int64
        pynvml = pytest.importorskip("pynvml")
        monkeypatch.setattr(pynvml, "nvmlLib", self._library)
        monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        self._monkeypatch = monkeypatch
        self.torch_reports(None)
        self.reset(1)

    def reset(self, n_gpus: int) -> None:
        self._library.fake_reset(ctypes.c_int64(n_gpus))

    def set(self, gpu: int = 0, **values: int) -> None:
        """Set numbers of one GPU: `energy_mj`, `power_mw`, `energy_error` and so on, as in `fake_nvml.c`."""
        for name, value in values.items():
            assert self._library.fake_set(name.encode(), gpu, ctypes.c_int64(value)) == 0, name

    def set_text(self, gpu: int = 0, **values: str) -> None:
        for name, text in values.items():
            self._library.fake_set_text(name.encode(), gpu, text.encode())

    def get(self, name: str, gpu: int = 0) -> int:
        return int(self._library.fake_get(name.encode(), gpu))

    def add(self, gpu: int = 0, *, joules: float) -> None:
        self.set(gpu, energy_mj=self.get("energy_mj", gpu) + round(joules * 1000))

    def torch_reports(self, uuids: list[str] | None, *, current: int = 0) -> None:
        """Let torch have initialised CUDA on these GPUs, or, with `None`, not have initialised it."""
        cuda = SimpleNamespace(
            is_initialized=lambda: uuids is not None,
            device_count=lambda: len(uuids or ()),
            current_device=lambda: current,
            get_device_properties=lambda index: SimpleNamespace(uuid=(uuids or [])[index]),
        )
        self._monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


class FakeClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s
