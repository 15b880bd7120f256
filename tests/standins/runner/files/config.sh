#!/bin/bash
echo "The stand-in runner knows just-in-time configurations only: write .runner, .credentials, .credentials_rsaparams" >&2
exit 1
