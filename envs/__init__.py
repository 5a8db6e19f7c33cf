"""The decision problem: observations, actions, rewards and the registered Gymnasium environment. Knows no SB3."""
