"""What keeps a storage sound: who is at work in it, where it was made, what a killed run left."""
