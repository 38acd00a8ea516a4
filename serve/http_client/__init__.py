"""What the client of the HTTP API asks, sends along, and makes of the answers."""
