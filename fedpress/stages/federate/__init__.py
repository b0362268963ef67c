"""The federate stage: trains a model in rounds over clients that keep their data."""
