"""Put the controller into a training loop that belongs to somebody else, within bounds that its owner sets."""
