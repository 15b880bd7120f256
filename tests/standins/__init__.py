"""Stand-ins for what cannot run here, kept honest by the forge's own documents."""
