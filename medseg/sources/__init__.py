"""Other people's files: found, named, grouped and paired, and what the values of masks mean."""
