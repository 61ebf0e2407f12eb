"""Scorers of generated answers: numpy only, from a file of predictions alone."""
