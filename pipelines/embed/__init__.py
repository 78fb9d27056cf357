"""Images in, features out: plan, Ray Data workers, leak check, a user's own images."""
