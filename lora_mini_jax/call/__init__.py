"""How a model's call is adapted, whatever the library of its layers."""
