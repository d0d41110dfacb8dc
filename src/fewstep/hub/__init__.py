"""Other people's models in, ours out. Nothing that is read is ever executed."""
