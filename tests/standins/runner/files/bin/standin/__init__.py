"""A stand-in for actions/runner: the same contract to the outside, another protocol to its stand-in forge."""
