"""Validate an agent now and then while it learns in the simulator, and remember its best weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sb3_contrib import MaskablePPO

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.hidden_inputs import without_inputs
from trainpilot.agents.ppo import RememberedCallback, bundle_of
from trainpilot.agents.simulator_scores import SimulatorScores
from trainpilot.agents.tags import TAGS
from trainpilot.llm_runtime.simulator.records import Bools


class Validation(RememberedCallback):
    """Scores the policy without exploration every few rollouts, and keeps the best weights.

    Args:
        judge: Scores a policy.
        every: Rollouts from one validation to the next.
        seen: Inputs that the policy sees.
    """

    def __init__(self, judge: Callable[[PolicyBundle], SimulatorScores], every: int, seen: Bools) -> None:
        super().__init__()
        self.judge = judge
        self.every = every
        self.seen = seen
        self.rollouts = 0
        self.last = -1
        """Decisions at the last validation."""
        self.best: dict[str, Any] = {}
        """`score`, `scores`, `decisions` and the weights `policy` of policy and value network."""

    def state(self) -> dict[str, Any]:
        """Return rollouts so far and the best weights."""
        return {"rollouts": self.rollouts, "last": self.last, "best": self.best}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go back to what `state` returned."""
        self.rollouts, self.last, self.best = state["rollouts"], state["last"], state["best"]

    def best_bundle(self, model: MaskablePPO) -> PolicyBundle:
        """Put the best weights into the model, and return its policy."""
        model.policy.load_state_dict(self.best["policy"])
        return bundle_of(model, {})

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        if self.rollouts % self.every == 0:  # the update on the last rollout is done
            self._validate()

    def _on_rollout_end(self) -> None:
        self.rollouts += 1

    def _on_training_end(self) -> None:
        self._validate()
        self.logger.dump(self.model.num_timesteps)  # nobody else does, after the last update

    def _validate(self) -> None:
        assert isinstance(self.model, MaskablePPO)
        if self.model.num_timesteps == self.last:
            return
        self.last = self.model.num_timesteps
        scores = self.judge(without_inputs(bundle_of(self.model, {}), self.seen))
        if not self.best or scores.score > self.best["score"]:
            weights = {name: value.clone() for name, value in self.model.policy.state_dict().items()}
            plain = scores.to_json()
            self.best = {"score": scores.score, "scores": plain, "decisions": self.last, "policy": weights}
        self._log(scores)

    def _log(self, scores: SimulatorScores) -> None:
        names = ("multiplier", "multiplier_p10", "time_over_reference", "energy_over_reference", "diverged_share")
        values: dict[str, float | None] = {name: getattr(scores, name) for name in names}
        values |= {"score": scores.score, "best_score": self.best["score"]}
        values |= {f"from_{group}": value for group, value in scores.by_start.items()}
        for name, value in values.items():
            if value is not None:
                self.logger.record(TAGS[f"validation/{name}"].name, value)
