"""The federate stage: settings, privacy, binding, the rounds."""
