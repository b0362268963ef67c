"""How the server combines the updates of a round."""
