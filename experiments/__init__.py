"""Entry points: the command line, recipes, demo, replay. Imported by nobody."""
