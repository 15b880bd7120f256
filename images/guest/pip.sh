#!/bin/sh
# Stands where pip stands: what is installed already need not be resolved again (see stash.py).
if [ "${1-}" = install ]; then
    exec /usr/bin/python3 -I -S /usr/lib/microvm/stash.py pip "$@"
fi
exec /usr/local/bin/python3 /usr/lib/microvm/real-pip "$@"
