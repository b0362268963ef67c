"""The federate stage: settings, planned privacy, both sides, and the rounds."""
