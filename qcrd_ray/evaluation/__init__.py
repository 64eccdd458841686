"""Scoring students."""
