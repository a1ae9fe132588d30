"""Evaluation: one file per benchmark."""
