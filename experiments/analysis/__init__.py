"""Turn finished runs into figures: compute multipliers, intervals, fronts. docs/measuring.md says what each means."""
