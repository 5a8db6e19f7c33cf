"""Log runs and the training of policies to TensorBoard, and draw a run as a figure."""
