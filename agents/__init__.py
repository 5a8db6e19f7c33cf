"""Who decides: PPO training, policy bundles, the controller, TensorBoard. Gets its environment as an argument."""
