"""The web side: hpsched's live page beside the Optuna Dashboard, behind a log-in."""
