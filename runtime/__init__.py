"""Running programs on ranks: instruction lists, executors, engines. Knows nothing of FX or planning."""
