"""What is learned: how outputs become a loss, which metrics tell the result, which targets fit."""
