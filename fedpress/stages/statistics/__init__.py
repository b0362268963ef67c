"""The statistics stage: mean, std, quantiles and frequent words of private rows, with noise."""
