"""The training loop being steered: corpora, models, the four controls, energy, telemetry. Knows no RL."""
