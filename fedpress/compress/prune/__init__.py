"""Channel pruning: trace the network, score its channels, plan which go, remove them, check the result."""
