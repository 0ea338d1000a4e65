"""Settings: what has a name and hyper-parameters, how people write it, and what is allowed."""
