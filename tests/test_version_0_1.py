"""Files that version 0.1 wrote are read, reused and resumed by this version. How they were made: their README.md."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from steering_loops import Loop

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.experiments import cli
from trainpilot.experiments.calibrate import command as calibrate_command
from trainpilot.experiments.calibrate.calibration import load_calibrations
from trainpilot.experiments.calibrate.design import design
from trainpilot.experiments.calibrate.runs import RunFile, run_key
from trainpilot.experiments.compare import command as compare_command
from trainpilot.experiments.compare.results import Comparison
from trainpilot.experiments.config_files import read_mapping, validated
from trainpilot.experiments.recipe import Recipe, load_recipe
from trainpilot.experiments.run_store import RunStore, read_records
from trainpilot.experiments.train_agent import physics_of
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.text_sources import content_digest
from trainpilot.llm_runtime.files import load_checkpoint
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
