"""Vet activation approximations for safety and utility, find the worst one, harden a model against it."""
