"""Write trained models in smaller formats that other programs load, and measure how they run."""
