"""Text from models, plain or adapted."""
