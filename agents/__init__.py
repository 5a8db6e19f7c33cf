"""Who decides: PPO, policy bundles, the controller, TensorBoard. Gets its environment as an argument."""
