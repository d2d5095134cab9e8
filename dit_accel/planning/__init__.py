"""What an accelerated run will do, said before it: see `run.plan`."""
