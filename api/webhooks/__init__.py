"""What git servers tell: their signatures, and their payloads in one form. A module a provider."""
