"""What a guest may reach."""
