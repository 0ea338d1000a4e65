"""What runs train on: a model, its data and its loss, by kind."""
