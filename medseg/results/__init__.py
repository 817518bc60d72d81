"""What is made of predicted masks: files, annotations, tables."""
