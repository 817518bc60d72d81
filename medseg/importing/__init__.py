"""What only download.py enters: files of other programs become the splits of a data set."""
