"""Recipes: functions that drive models, training and analysis together. Only the command line
imports them."""
