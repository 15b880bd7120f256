#!/bin/bash
# As the real env.sh: keeps PATH for the runner.
echo "$PATH" >"$(dirname "${BASH_SOURCE[0]}")/.path"
