"""One step of a model for all chains: a contract and its implementations."""
