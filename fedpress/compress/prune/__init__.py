"""Channel pruning: trace a network, score its channels, plan, remove them, check the result."""
