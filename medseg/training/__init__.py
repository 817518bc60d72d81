"""What only train.py enters: flags, recipes, checkpoints, optimizer, history."""
