"""Mixture-of-LoRAs models: adapters, routers and their life on disk."""
