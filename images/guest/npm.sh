#!/bin/sh
# Stands where npm stands: two commands may find their tree in the stash of a warm parent (see stash.py).
case "${1-}" in
    ci | clean-install | install | i)
        exec /usr/bin/python3 -I -S /usr/lib/microvm/stash.py npm "$@"
        ;;
esac
exec /usr/local/lib/node_modules/npm/bin/npm-cli.js "$@"
