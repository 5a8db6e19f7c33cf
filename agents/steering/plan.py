"""What settings and policy together make of a run: who decides, how often, and along which base schedule."""

from __future__ import annotations

from dataclasses import dataclass

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, policy_path
from trainpilot.agents.controller import Policy, keep
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.llm_runtime.schedules import Course, Schedule

WITHOUT_POLICY = BaseSchedule(schedule="linear", warmup_share=0.02)
DECISIONS = 50


@dataclass(frozen=True)
class Plan:
    """How a run is steered."""

    bundle: PolicyBundle | None
    """The policy's file, if it comes from one."""
    policy: Policy
    base: BaseSchedule
    """What the policy multiplies."""
    decisions: int

    @classmethod
    def of(cls, settings: SteeringSettings) -> Plan:
        """Return the plan under these settings.

        Raises:
            ValueError: there is no such policy, or the budget is too small for its decisions.
        """
        bundle, policy = _policy(settings.policy)
        decisions = settings.decisions or (bundle.decisions if bundle else DECISIONS)
        settings.check_steps(decisions)
        base = settings.base_schedule or (bundle and bundle.base_schedule) or WITHOUT_POLICY
        return cls(bundle, policy, base, decisions)

    def course(self, settings: SteeringSettings, grain: int) -> Course:
        """Return the course of a run at its beginning."""
        length, tokens = settings.sequence_length, settings.sequences * settings.sequence_length
        warmup_tokens = self.base.warmup_tokens(tokens)
        schedule = Schedule(name=self.base.schedule, budget_tokens=tokens, warmup_tokens=warmup_tokens)
        return Course(
            schedule=schedule,
            budget=settings.sequences,
            sequence_length=length,
            decisions=self.decisions,
            grain=grain,
        )


def _policy(policy: str | Policy) -> tuple[PolicyBundle | None, Policy]:
    if not isinstance(policy, str):
        return None, policy
    if policy == "none":
        return None, keep
    bundle = PolicyBundle.load(policy_path(policy))
    return bundle, bundle.act


def name_of(policy: str | Policy) -> str:
    """Return a policy's name, for logs."""
    return policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)
