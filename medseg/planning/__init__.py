"""What `train.py --recipe auto` and `data.py --plan` enter: a data set measured, and its flags."""
