"""Training steps, failures and inference on modelled hardware, by the decision code of the live run. Torch-free."""
