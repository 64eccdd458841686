"""The losses of the paper as pure tensor functions: no model, no device, no rank."""
