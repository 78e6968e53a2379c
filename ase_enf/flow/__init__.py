"""The model: its density and its transport, from the velocity field to the weights file."""
