"""The federate stage: settings, planned privacy, both halves, and the rounds."""
