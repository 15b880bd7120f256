"""The control plane: from an event to a destroyed VM."""
