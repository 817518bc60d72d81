"""What only predict.py and its page enter: inputs, models, reports, exports."""
