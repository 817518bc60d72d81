"""What the five scripts stand on: one noun a file. Nothing here imports a script."""
