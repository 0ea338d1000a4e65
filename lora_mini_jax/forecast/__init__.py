"""What a step takes, before there are weights or devices."""
