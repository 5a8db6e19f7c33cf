"""The training loop being steered: corpora, batches, models, the four controls, energy, telemetry. Knows no RL."""
