"""Write runs and agent trainings to TensorBoard, and draw a run as a picture."""
