"""Both sides of the channel between a host process and the agent in a guest."""
