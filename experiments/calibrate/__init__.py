"""Calibrate the simulator on a machine: designed live runs, a fit of the physics, and its error on unseen runs."""
