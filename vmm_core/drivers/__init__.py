"""The hypervisors the engine can drive."""
