"""Write a run's model in smaller formats, and weigh each against the unquantised model (`trainpilot export`)."""
